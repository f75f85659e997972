"""`rehearsal`: the calls of a generation without its choices, for whoever wants to see shapes.

one = rehearsal(net, Layout(batch=1, length=9), sampling)
output = net(**one.begin()[1])
args, kwargs = one.next(output)      # the second step: one token, nine in the cache
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .call import ModelCall
from .decoding import Decoding
from .encoded import generation_of
from .forward import TENSOR_NAMES, LanguageFacts
from .prepare import positions_of
from .sampling import Sampling


class Layout(NamedTuple):
    """A prompt without its tokens; `masked`: some of its rows are padded.

    `encoded`: of an encoder-decoder, positions of the encoder; `length` are the decoder's then.
    """

    batch: int
    length: int
    masked: bool = False
    typed: bool = False  # it has token types
    encoded: int = 0


def layout_of(call: ModelCall) -> Layout:
    """The layout of a prompt of tokens."""
    typed = "token_type_ids" in call.kwargs
    encoded = (call.length or 1) if "decoder_input_ids" in call.kwargs else 0
    return Layout(call.batch or 1, call.begun or 1, call.mask is not None, typed, encoded)


def rehearsal(net: nn.Module, layout: Layout, sampling: Sampling) -> Decoding:
    """A generation that goes on for ever, with the same token. Numbers in it mean nothing."""
    lasting = replace(sampling, max_new_tokens=2, eos_token_id=None, stop_strings=None)
    first = next(net.parameters(), None)
    prompt = prompt_of(layout)
    found = generation_of(net, prompt if first is None else prompt.to(first.device), lasting)
    sampler: Any = _Any(layout.batch, layout.length)
    found.sampler = sampler
    return found


class _Any:
    """Takes any token, and never ends."""

    def __init__(self, batch: int, length: int) -> None:
        self._batch = batch
        self.longest = length + 2

    def choose(self, ids: Tensor, *_: Any) -> Tensor:
        return torch.ones(self._batch, dtype=torch.int64, device=ids.device)

    def ended(self, *_: Any) -> bool:
        return False


def prompt_of(layout: Layout) -> ModelCall:
    """A prompt of this layout. Its tokens mean nothing."""
    shape = layout.batch, layout.encoded or layout.length
    kwargs: dict[str, object] = {"input_ids": torch.ones(shape, dtype=torch.int64)}
    mask = None
    if layout.masked:
        mask = torch.ones(shape, dtype=torch.bool)
        side = -1 if layout.encoded else 0  # where the first row is padded
        mask[0, side] = shape[1] < 2
        kwargs["attention_mask"] = mask.long()
    if layout.typed:
        kwargs["token_type_ids"] = torch.zeros(shape, dtype=torch.int64)
    if layout.encoded:
        kwargs["decoder_input_ids"] = torch.ones((layout.batch, layout.length), dtype=torch.int64)
    return ModelCall((), kwargs, mask, None, *shape)


def first_keywords(call: ModelCall, sampling: Sampling, facts: LanguageFacts) -> dict[str, Any]:
    """What the prompt's forward is called with, but for the cache, which a model makes by itself.

    For signatures: the sites are those of `Decoding.begin`, and no net is needed.
    """
    kwargs = {name: call.kwargs[name] for name in TENSOR_NAMES if name in call.kwargs}
    if call.mask is None:
        kwargs.pop("attention_mask", None)
    if "position_ids" in facts.takes and "position_ids" not in kwargs:
        kwargs["position_ids"] = _positions(call)
    kwargs["use_cache"] = sampling.use_cache
    if "logits_to_keep" in facts.takes:
        kwargs["logits_to_keep"] = sampling.logits_to_keep
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(sampling, name):
            kwargs[name] = True
    return kwargs


def _positions(call: ModelCall) -> Tensor:
    if call.mask is not None:
        return positions_of(call.mask)
    return torch.arange(call.length or 1).repeat(call.batch or 1, 1)
