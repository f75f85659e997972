"""A model and what a client has of it, without a server: every question goes through its bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from weft.client.travel import pack_inputs
from weft.engine.known import Known
from weft.engine.publish import answer, card, know
from weft.engine.standin import known_of
from weft.graph.node import Ref
from weft.kernels.aval import Aval, dtype_name
from weft.wire import frames
from weft.wire.messages import (
    ApplyQuery,
    Layout,
    ModelCard,
    SignatureQuery,
    decode,
    encode,
)
from weft.wire.structures import lower


def told(known: Known, id: str = "m") -> ModelCard:
    """The card as it arrives."""
    return decode(encode(card(known, id)), ModelCard)


class Answers:
    """An asker that asks a model of this process, and counts."""

    def __init__(self, known: Known) -> None:
        self._known = known
        self.asked: list[str] = []

    def signature(self, args: tuple, kwargs: dict[str, Any]) -> bytes:
        self.asked.append("signature")
        inputs, tensors = pack_inputs(self._known.family, args, kwargs)
        query = SignatureQuery(
            model="m",
            fingerprint=self._known.fingerprint,
            inputs=inputs,
            tensors=frames.write(tensors),
        )
        return self._data(query)

    def apply(self, path: str, args: tuple, kwargs: dict[str, Any]) -> bytes:
        self.asked.append(path)
        return self._data(apply_query(self._known, path, args, kwargs))

    def _data(self, query: Any) -> bytes:
        found = answer(self._known, decode(encode(query), type(query)))
        return decode(encode(found), type(found)).data  # type: ignore[union-attr]


def apply_query(known: Known, path: str, args: tuple, kwargs: dict[str, Any]) -> ApplyQuery:
    layouts: list[Layout] = []

    def ref_of(value: Any) -> Ref | None:
        if not isinstance(value, Aval):
            return None
        layouts.append(
            Layout(dtype=dtype_name(value.dtype), shape=tuple(value.shape), stride=value.stride)
        )
        return Ref(len(layouts) - 1)

    return ApplyQuery(
        model="m",
        fingerprint=known.fingerprint,
        path=path,
        args=tuple([lower(arg, ref_of) for arg in args]),
        kwargs=tuple([(name, lower(arg, ref_of)) for name, arg in kwargs.items()]),
        layouts=tuple(layouts),
    )


def client_of(net: nn.Module, **options: Any) -> tuple[Known, Known, Answers]:
    """(the model as its server knows it, as its client does, the client's questions)"""
    here = know(net, **options)
    answers = Answers(here)
    return here, known_of(told(here), here.signatures.to_bytes(), answers), answers


def shapes_by_hooks(net: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What every module gives in one real pass: shape and dtype, by path; of the last call."""
    seen: dict[str, Any] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor):
                seen[path] = (tuple(first.shape), first.dtype)

        return hook

    handles = [m.register_forward_hook(note(path)) for path, m in net.named_modules()]
    try:
        with torch.no_grad():
            net(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen
