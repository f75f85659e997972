"""`LanguageModel`: a language model of `transformers`, by id, folder or module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from weft.client.backend import Backend
from weft.engine.known import Known
from weft.engine.merging import Merger, merger
from weft.errors import InputError, UnknownOptionError, WrongModelError
from weft.families.call import ModelCall
from weft.families.forward import OPTION_NAMES, TENSOR_NAMES, language_facts, split_keywords
from weft.families.loading import (
    LoadOptions,
    Source,
    load,
    load_config,
    load_options,
    load_tokenizer,
    skeleton,
)
from weft.families.prepare import prepare_language
from weft.families.together import language_together
from weft.trace.aliases import Rename, rename_tree
from weft.trace.lines import lined

from .generate import Generator, open_generator
from .grid import SEQUENCES
from .handle import Handle
from .options import OWN_OPTIONS
from .outright import generated
from .served import Served, only_served, served
from .weights import Weights
from .where import Remote, is_server

_MANY, _LONG = 8, 128
"""Rows and positions of the inputs that stand for any other."""
_TOKEN = 2
"""What they hold: zeros and ones would look like a mask, whose numbers may decide."""


class LanguageModel(Handle):
    """A language model to experiment on: a causal one, or an encoder with a decoder (T5).

        model = LanguageModel("openai-community/gpt2")      # its tree at once, no weights yet
        with model.trace("The Eiffel Tower is in the city of") as tracer:
            h = model.transformer.h[5].output.save()        # [batch, pos, d_model]

    source: an id on the hub, a folder, or a `transformers` model that is there already.
    tokenizer: an id, a folder or an object; the default is the model's own.
    dispatch: True loads the weights now; else the first local run does.
    remote: where its blocks run, unless they say so themselves: False, True, an address, "local" or
    "auto"; see `trace`. With True or an address `source` may be the id of a model of that server
    (`weft.models()` lists them): tree, shapes, tokenizer and configuration come from there as data,
    and neither weights nor `transformers` are needed here. Raises `WrongModelError` where the
    server does not have it, `ServerAwayError` where it does not answer.
    rename: further names for modules, by name wherever it occurs, or by path:
    `{"transformer.h": "layers", "mlp": "ffn"}`. Graphs have the true paths. A name that is taken is
    refused.
    options: dtype, device_map, attn_implementation, experts_implementation, revision, token,
    cache_dir, local_files_only, as in `from_pretrained`; any other raises `UnknownOptionError`.

    `trace` takes one text, texts, chat messages, token ids (`[pos]` or `[batch, pos]`, lists of
    different lengths are padded on the left with mask and position ids), tensors, or what a
    tokenizer returns; and the forward options of `weft.families.forward.ForwardOptions`. Of an
    encoder-decoder the input is the encoder's, padded on the right, and `decoder_input_ids=` the
    decoder's; without, the token with which answers begin.
    """

    @lined
    def __init__(
        self,
        source: str | nn.Module | Any,
        *,
        tokenizer: Any = None,
        dispatch: bool = False,
        remote: Remote = None,
        backend: Backend | None = None,
        rename: Rename | None = None,
        **options: Any,
    ) -> None:
        chosen = load_options(**options)
        place = Source.of(source)
        found = _served(place, remote)
        if found is not None:
            self._open_served(found, remote, tokenizer, backend, chosen)
        else:
            self._open_here(place, remote, tokenizer, backend, chosen)
        # what a source calls is asked for outside of blocks, too
        example = partial(prepare_language, [0, 0], None, self._facts)
        self._signatures.inside.example = example
        if rename:
            rename_tree(self, rename)
        if dispatch:
            self.dispatch()

    def _open_here(
        self, place: Source, remote: Remote, tokenizer: Any, backend: Any, chosen: LoadOptions
    ) -> None:
        """A model of this machine: its tree now, its weights when they are needed."""
        tree = skeleton(place, chosen)
        given = place.module is not None
        weights = Weights(tree, None if given else lambda: load(place, chosen))
        super().__init__(weights, backend, family="language", remote=remote)
        self.__dict__.update(
            config=load_config(place, chosen) if given else tree.config,
            _facts=language_facts(tree.config, type(tree)),
            _place=place,
            _tokenizer=tokenizer,
            _tokenizer_of=lambda: load_tokenizer(place, tokenizer, chosen),
            _tokenizer_ready=False,
        )

    def _open_served(
        self, found: Served, remote: Remote, tokenizer: Any, backend: Any, chosen: LoadOptions
    ) -> None:
        """A model of a server, as data."""
        if given := chosen.chosen():
            raise UnknownOptionError(
                f"{', '.join(given)}: {found.card.info.id} is loaded already, by the server",
                fix="leave it out, or load the model here with remote=False",
            )
        weights = Weights(found.known.skeleton, found.no_weights)
        super().__init__(weights, backend, family="language", remote=found.server, served=found)
        self.__dict__.update(
            config=found.config(),
            _facts=found.known.facts,
            _generation=found.card.generation,
            _place=Source(name=found.card.info.id),
            _tokenizer=tokenizer,
            _tokenizer_of=lambda: found.tokenizer() if tokenizer is None else tokenizer,
            _tokenizer_ready=False,
        )

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None for a bare module without one."""
        if not self._tokenizer_ready:
            self.__dict__.update(_tokenizer=self._tokenizer_of(), _tokenizer_ready=True)
        return self._tokenizer

    def _name(self) -> tuple[str | None, bool]:
        place = self._place
        return place.name, place.name is not None and place.folder is None

    def _generation_defaults(self) -> Any:
        """What the model's own generation config says."""
        told = self.__dict__.get("_generation")  # by the server that has the model
        return told or getattr(self._weights.skeleton(), "generation_config", None)

    def _known(self) -> Known:
        return replace(super()._known(), facts=self._facts)

    def _prepare(self, inputs: tuple, options: dict[str, Any]) -> ModelCall:
        if len(inputs) > 1:
            raise InputError(
                f"trace takes one input, not {len(inputs)}",
                fix="give several prompts as one list: trace([a, b])",
            )
        chosen, tensors = split_keywords(options, self._facts)
        given = inputs[0] if inputs else None
        speaker = self._speaker(given)
        return prepare_language(given, speaker, self._facts, options=chosen, tensors=tensors)

    @lined
    def generate(self, *inputs: Any, trace: bool = True, **options: Any) -> Generator:
        """Opens a block in which a generation can be read and changed, step by step.

        inputs: as in `trace`; none in a block of several inputs, each with its own invoke.
        max_new_tokens, do_sample, temperature, top_k, top_p, ...: how tokens are chosen, as in
        `generate` of `transformers` (`weft.families.sampling.Sampling` lists them); what is not
        given is what the model's generation config says. seed: keys all draws, those of tokens too.
        remote, device, blocking, keep_seconds, eager: as in `trace`. trace: False opens no block,
        and returns the ids.

        Step 0 is the prompt's forward; each step makes one token. Sites outside of step loops are
        those of step 0; edits there act at every step. See `Generator`.
        """
        if trace is not True:
            return generated(self, trace, inputs, options)
        return open_generator(self, inputs, options)

    _takes_nothing = False

    def _is_empty(self, inputs: tuple, options: dict[str, Any]) -> bool:
        return not inputs and not split_keywords(options, self._facts)[1]

    def _is_coordinate(self, name: str, options: dict[str, Any]) -> bool:
        known = (*OWN_OPTIONS, *OPTION_NAMES, *TENSOR_NAMES)
        return name not in known and isinstance(options[name], SEQUENCES)

    def _examples(self, options: dict[str, Any]) -> list[ModelCall]:
        most = min(self._facts.positions or _LONG, _LONG)
        sizes = ((_MANY, most - 1), (_MANY + 1, most))
        ids = [torch.full(size, _TOKEN, dtype=torch.int64) for size in sizes]
        return [self._prepare((one,), options) for one in ids]

    def _merger(self) -> Merger:
        return merger(self._signatures, self._facts)

    def _together(self, calls: list[ModelCall], options: dict[str, Any]) -> ModelCall:
        chosen, _ = split_keywords(options, self._facts)
        return language_together(calls, None, self._facts, chosen)

    def _speaker(self, given: Any) -> Any:
        """The tokenizer, where the input may need it."""
        if given is None or isinstance(given, (torch.Tensor, np.ndarray)):
            return None
        try:
            return self.tokenizer
        except InputError:
            if _has_text(given):
                raise
            return None


def _served(place: Source, remote: Remote) -> Served | None:
    """The model of the server that is to be asked for it; None where it is opened here."""
    if place.name is None:
        return None
    if not is_server(remote):
        alone = remote in (None, "auto") and only_served()
        return served(True, place.name, "language") if alone else None
    try:
        return served(remote, place.name, "language")
    except WrongModelError:
        if place.folder is None:
            raise
        return None  # its own folder: the server may have it under another name


def _has_text(given: Any) -> bool:
    if isinstance(given, str):
        return True
    if isinstance(given, Mapping):
        return any(_has_text(item) for item in given.values())
    return isinstance(given, (list, tuple)) and any(_has_text(item) for item in given)
