"""`Decoding`: one generation, forward by forward. It says what to call next; somebody else calls.

    decoding = Decoding(net, prepare_language("The Eiffel", tokenizer, facts), sampling)
    call = decoding.begin()                     # (args, kwargs) of the prompt's forward: step 0
    while call is not None:
        output = net(*call[0], **call[1])       # whoever calls may draw a graph through it
        call = decoding.next(output)            # chooses a token for each row: the next step
    decoding.result                             # ids [batch, prompt + new]

The calls are those that `transformers`' own `generate` makes, keyword by keyword, so that each
step's numbers are its numbers. Rows that have ended go on with pads until all have.

Not here: forwards that several generations share (`decodings`), graphs, beams.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import InputError
from weft.run.part import ModuleCall

from .caches import fresh_cache
from .call import ModelCall
from .forward import LanguageFacts, language_facts
from .prepare import positions_of
from .ropes import ropes_kept
from .sampler import Sampler
from .sampling import Sampling
from .stopping import stop_strings


class Decoding:
    """One generation for the rows of one prompt. See the module's text.

    net: a causal language model of `transformers`; call: its prompt (`prepare_language`), on the
    model's device; tokenizer: only for `stop_strings`.

    `step` is the number of the forward that was called last, or is to be called; `ids` are prompt
    and answer so far, `[batch, pos]`, the answer alone after a prompt of embeddings; `tokens` were
    chosen last, `[batch]`; `over` says that there is nothing to call any more.

    Raises InputError for a model or prompt that it cannot go on from, or that has too few positions
    for an answer of that length.
    """

    def __init__(
        self, net: nn.Module, call: ModelCall, sampling: Sampling, tokenizer: Any = None
    ) -> None:
        self.net: Any = net
        self.facts = self._facts_of(net)
        self.sampling = sampling
        self.step = 0
        self.over = False
        self.tokens: Tensor | None = None
        self.prompt = call
        self.ids = self._ids_of(call)
        self.mask = self._mask_of(call)
        self.longest = self._longest()
        stopped = stop_strings(sampling, tokenizer)
        real = self.mask if self.ids.shape[1] else None
        self.sampler = Sampler(sampling, self.ids, real, self.longest, stopped)
        self.kept: dict[str, Any] = {}
        """What goes from step to step: masks, positions, the cache."""
        self._open = ExitStack()

    # -- step by step ------------------------------------------------------------------------------

    def begin(self) -> ModuleCall:
        """The call of the prompt's forward."""
        self._open.enter_context(ropes_kept(self.net))
        self.kept = self._first()
        return (), self._inputs(None, first=True)

    @torch.no_grad()
    def next(self, output: Any) -> ModuleCall | None:
        """Takes the result of the forward that was called: the call of the next one, or None.

        Tokens are chosen from `output.logits[:, -1]`, `[batch, vocab]`. Raises SamplingError, and
        lets go of everything, where they are nothing to draw from.
        """
        try:
            self.take(output.logits[:, -1])
            if self.over:
                return None
            self._grow(output)
            return (), self._inputs(1 if self.uses_cache else None, first=False)
        except BaseException:
            self.close()
            raise

    def take(self, logits: Tensor) -> None:
        """Chooses a token for each row from logits `[batch, vocab]`; the step is done."""
        self.tokens = self.sampler.choose(self.ids, logits)
        self.ids = torch.cat([self.ids, self.tokens[:, None]], dim=-1)
        if self.sampler.ended(self.ids):
            self.close()
        else:
            self.step += 1

    @property
    def result(self) -> Tensor:
        """Prompt and answer, `[batch, pos]`: what `generate` of `transformers` returns."""
        return self.ids

    @property
    def length(self) -> int:
        """Positions of prompt and answer so far, padding included."""
        return self.ids.shape[1] + (self.prompt.length or 0) * self._embeds

    @property
    def uses_cache(self) -> bool:
        """Whether a step runs one token; from embeddings there is no other way to go on."""
        return self.sampling.use_cache or self._embeds

    def close(self) -> None:
        """Lets go of the cache; the model is as it was. To be called also where one stops early."""
        self.over = True
        self.kept = {}
        self._open.close()

    # -- what a kind of model has of its own (`encoded`) -------------------------------------------

    def _facts_of(self, net: Any) -> LanguageFacts:
        return _facts_of(net)

    def _ids_of(self, call: ModelCall) -> Tensor:
        return _ids_of(call)

    def _mask_of(self, call: ModelCall) -> Tensor | None:
        return _mask_of(call)

    # -- calls -------------------------------------------------------------------------------------

    def _inputs(self, last: int | None, first: bool) -> dict[str, Any]:
        return inputs_of(self.net, self.ids, last, first, self.kept)

    def _grow(self, output: Any) -> None:
        """One position more; the cache is the one that the model says it is."""
        self.kept = self.net._update_model_kwargs_for_generation(output, self.kept)

    @property
    def _start(self) -> int:
        """Tokens that the answer goes on from."""
        return self.prompt.length or 0

    @property
    def _embeds(self) -> bool:
        return "inputs_embeds" in self.prompt.kwargs

    def _first(self) -> dict[str, Any]:
        given, takes = self.prompt.kwargs, self.facts.takes
        kept: dict[str, Any] = {"use_cache": self.uses_cache}
        if "attention_mask" in takes:
            kept["attention_mask"] = self._attention_mask()
        for name in ("inputs_embeds", "token_type_ids"):
            if name in given:
                kept[name] = given[name]
        if "position_ids" in takes:
            kept["position_ids"] = given.get("position_ids", self._positions())
        if "logits_to_keep" in takes:
            kept["logits_to_keep"] = self.sampling.logits_to_keep
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(self.sampling, name):
                kept[name] = True
        if self.uses_cache:
            kept |= fresh_cache(self.net)
        return kept

    def _attention_mask(self) -> Tensor | None:
        """None where all is real, as for one forward; but positions of a user's own without a cache
        would look like packed sequences (`prepare._call`)."""
        own = "position_ids" in self.prompt.kwargs and not self.uses_cache
        return self.prompt.kwargs.get("attention_mask") if self.mask is not None or own else None  # type: ignore[return-value]

    def _positions(self) -> Tensor:
        batch, length = self.prompt.batch or 1, self.prompt.length or 1
        if self.mask is not None:
            return positions_of(self.mask)
        return torch.arange(length, device=self.ids.device).repeat(batch, 1)

    def _longest(self) -> int:
        """Tokens of `ids` at the end, at most. Raises InputError where that cannot be."""
        length, start = self.ids.shape[1], self._start
        made_for = getattr(self.net.config, "max_position_embeddings", None)
        longest = self.sampling.longest(length, made_for)
        if self._embeds and self.sampling.max_new_tokens is None and self.sampling.max_length:
            longest -= start
        if longest <= length:
            raise InputError(
                f"the prompt has {start} tokens, max_length is {self.sampling.max_length}: nothing "
                "can be added",
                fix="give max_new_tokens",
            )
        table = self.facts.positions
        last = longest - length + start - 1  # the last token chosen is not run
        if table is not None and last > table:
            raise InputError(
                f"{start} tokens and {longest - length} new ones: this model has {table} positions",
                fix=f"max_new_tokens={table - start + 1}, or a shorter prompt",
            )
        return longest


def inputs_of(
    net: Any, ids: Tensor, last: int | None, first: bool, kept: dict[str, Any]
) -> dict[str, Any]:
    """The keywords of a forward for the `last` positions of `ids` (None: all of them).

    `kept` goes from step to step: masks and positions of the whole, the cache.
    """
    inputs = net.prepare_inputs_for_generation(
        ids, next_sequence_length=last, is_first_iteration=first, **kept
    )
    given = {name: value for name, value in inputs.items() if value is not None}
    return {**given, "return_dict": True}


# -- what a generation begins with -----------------------------------------------------------------


def _facts_of(net: Any) -> LanguageFacts:
    if not hasattr(net, "prepare_inputs_for_generation"):
        raise InputError(
            f"{type(net).__name__} cannot generate: it is no language model of transformers",
            fix="use weft.LanguageModel with a causal language model",
        )
    if getattr(net.config, "is_encoder_decoder", False):
        raise InputError(f"{type(net).__name__} has an encoder", fix="use EncoderDecoding")
    return language_facts(net.config, type(net))


def _ids_of(call: ModelCall) -> Tensor:
    ids = call.kwargs.get("input_ids")
    if isinstance(ids, Tensor):
        return ids
    embeds = call.kwargs.get("inputs_embeds")
    if not isinstance(embeds, Tensor):
        raise InputError(
            "a generation begins with token ids or embeddings",
            fix="give input_ids or inputs_embeds",
        )
    return torch.empty((len(embeds), 0), dtype=torch.int64, device=embeds.device)


def _mask_of(call: ModelCall) -> Tensor | None:
    """Where the prompt is real, bool `[batch, pos]`; None where all is."""
    if call.mask is None:
        return None
    ends = call.mask[:, -1]
    if not bool(ends.all()):
        raise InputError(
            f"row {int(ends.long().argmin())} of the prompt ends with padding: there would be no "
            "token to go on from",
            fix="pad on the left",
        )
    tensor: Any = call.kwargs.get("input_ids", call.kwargs.get("inputs_embeds"))
    return call.mask.to(tensor.device)
