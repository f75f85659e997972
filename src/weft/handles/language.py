"""`LanguageModel`: a causal language model of `transformers`, by id, folder or module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from weft.client.backend import Backend
from weft.errors import InputError
from weft.families.call import ModelCall
from weft.families.forward import language_facts, split_keywords
from weft.families.loading import (
    Source,
    load,
    load_config,
    load_options,
    load_tokenizer,
    skeleton,
)
from weft.families.prepare import prepare_language

from .handle import Handle
from .weights import Weights


class LanguageModel(Handle):
    """A causal language model to experiment on.

        model = LanguageModel("openai-community/gpt2")      # its tree at once, no weights yet
        with model.trace("The Eiffel Tower is in the city of") as tracer:
            h = model.transformer.h[5].output.save()        # [batch, pos, d_model]

    source: an id on the hub, a folder, or a `transformers` model that is there already.
    tokenizer: an id, a folder or an object; the default is the model's own.
    dispatch: True loads the weights now; else the first local run does.
    options: dtype, device_map, attn_implementation, experts_implementation, revision, token,
    cache_dir, local_files_only, as in `from_pretrained`; any other raises `UnknownOptionError`.

    `trace` takes one text, texts, chat messages, token ids (`[pos]` or `[batch, pos]`, lists of
    different lengths are padded on the left with mask and position ids), tensors, or what a
    tokenizer returns; and the forward options of `weft.families.forward.ForwardOptions`.
    """

    def __init__(
        self,
        source: str | nn.Module | Any,
        *,
        tokenizer: Any = None,
        dispatch: bool = False,
        backend: Backend | None = None,
        **options: Any,
    ) -> None:
        chosen = load_options(**options)
        place = Source.of(source)
        tree = skeleton(place, chosen)
        given = place.module is not None
        weights = Weights(tree, None if given else lambda: load(place, chosen))
        if dispatch:
            weights.loaded()
        super().__init__(weights, backend)
        self.__dict__.update(
            config=load_config(place, chosen) if given else tree.config,
            _facts=language_facts(tree.config, type(tree)),
            _place=(place, chosen),
            _tokenizer=tokenizer,
            _tokenizer_ready=False,
        )

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None for a bare module without one."""
        if not self._tokenizer_ready:
            place, chosen = self._place
            found = load_tokenizer(place, self._tokenizer, chosen)
            self.__dict__.update(_tokenizer=found, _tokenizer_ready=True)
        return self._tokenizer

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


def _has_text(given: Any) -> bool:
    if isinstance(given, str):
        return True
    if isinstance(given, Mapping):
        return any(_has_text(item) for item in given.values())
    return isinstance(given, (list, tuple)) and any(_has_text(item) for item in given)
