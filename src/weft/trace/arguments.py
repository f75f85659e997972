"""From the arguments of a torch call to data: one walk that also makes the cache key.

`Walk` lowers Python arguments to graph `Arg`s, collects the tensors among them in order, and
builds a key that says everything on which the abstract result depends.
"""

from __future__ import annotations

import math
from types import EllipsisType, NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from weft.graph.node import Arg, Complex, Map, Name, Seq, Shape, Slice
from weft.kernels.aval import dtype_name

from .value import Sizes, Value

if TYPE_CHECKING:
    from .clients import Client
    from .recorder import Recorder

_SCALARS = frozenset((int, bool, str, NoneType))


class TensorBound(Exception):
    """A tensor stands where a slice needs a number."""


class Walk:
    """Lowers the arguments of one call."""

    __slots__ = ("key", "recorder", "tensors")

    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder = recorder
        self.key: list[Any] = [name]
        self.tensors: list[Value | Client] = []

    def lower(self, arg: Any) -> Arg:
        """`arg` as graph data."""
        kind = type(arg)
        if kind is Value:
            return self._value(arg)
        if kind in _SCALARS:
            self.key += (kind, arg)
            return arg
        if kind is float:
            self.key += (float, arg)
            return arg if math.isfinite(arg) else Name("float", str(arg))
        if kind is tuple:
            self.key += ("(", len(arg))
            return Seq("tuple", tuple([self.lower(item) for item in arg]))
        if kind is slice:
            self.key.append(":")
            return Slice(self._bound(arg.start), self._bound(arg.stop), self._bound(arg.step))
        return self._rare(arg)

    def _bound(self, bound: Any) -> Arg:
        kind = type(bound)
        if kind is int or bound is None:
            self.key.append(bound)
            return bound
        if isinstance(bound, torch.Tensor):
            raise TensorBound
        return self.lower(bound)

    def _value(self, value: Value) -> Arg:
        if value._rec is not self.recorder:
            return self.lower(self.recorder.own(value))
        self.tensors.append(value)
        self.key.append(value._aval)
        return value._ref

    def _rare(self, arg: Any) -> Arg:
        if isinstance(arg, torch.Tensor):
            client = self.recorder.clients.use(arg)
            self.tensors.append(client)
            self.key.append(client._aval)
            return client._ref
        if isinstance(arg, Sizes):
            self.key += ("size", tuple.__add__((), arg))  # type: ignore[operator]
            return Shape(arg._of._ref)
        if isinstance(arg, list):
            self.key += ("[", len(arg))
            return Seq("list", tuple([self.lower(item) for item in arg]))
        if isinstance(arg, torch.Size):
            self.key += ("size", arg)
            return Seq("size", tuple(int(size) for size in arg))
        if isinstance(arg, tuple):
            return self.lower(tuple(arg))
        if isinstance(arg, dict):
            self.key += ("{", tuple(arg))
            return Map(tuple(arg), tuple([self.lower(item) for item in arg.values()]))
        return self._plain(arg)

    def _plain(self, arg: Any) -> Arg:
        if isinstance(arg, np.ndarray):
            return self.lower(torch.from_numpy(arg))
        if isinstance(arg, np.generic):
            return self.lower(arg.item())
        for plain in (bool, int, float, str):
            if isinstance(arg, plain):
                return self.lower(plain(arg))
        named = _named(arg)
        self.key.append(named)
        return named if named is not None else self._refuse(arg)

    def _refuse(self, arg: Any) -> Arg:
        raise self.recorder.refusal(
            f"an argument of type {type(arg).__name__} cannot be part of a graph",
            "pass tensors, numbers, text, dtypes, or containers of these",
        )


def _named(arg: Any) -> Arg:
    if isinstance(arg, torch.dtype):
        return Name("dtype", dtype_name(arg))
    if isinstance(arg, EllipsisType):
        return Name("ellipsis")
    if isinstance(arg, torch.memory_format):
        return Name("memory_format", str(arg).removeprefix("torch."))
    if isinstance(arg, torch.layout):
        return Name("layout", str(arg).removeprefix("torch."))
    if isinstance(arg, complex):
        return Complex(arg.real, arg.imag)
    return None


def abstract(arg: Any, tensors: Any) -> Any:
    """`arg` with the next of `tensors` (an iterator over avals or reals) for each tensor in it."""
    if isinstance(arg, (torch.Tensor, np.ndarray)):
        return next(tensors)
    if isinstance(arg, Sizes):
        return torch.Size(tuple.__iter__(arg))
    if isinstance(arg, torch.Size):
        return arg
    if isinstance(arg, (tuple, list)):
        items = [abstract(item, tensors) for item in arg]
        return items if isinstance(arg, list) else tuple(items)
    if isinstance(arg, dict):
        return {key: abstract(item, tensors) for key, item in arg.items()}
    return arg


def has(kind: type, args: Any) -> bool:
    """Whether an object of `kind` stands anywhere among (nested) arguments."""
    for arg in args:
        if isinstance(arg, kind):
            return True
        if isinstance(arg, (tuple, list)) and not isinstance(arg, Sizes) and has(kind, arg):
            return True
        if isinstance(arg, dict) and has(kind, arg.values()):
            return True
    return False
