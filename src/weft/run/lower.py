"""Lowering: the arguments of a node, made ready for filling in tensors.

Whatever holds no `Ref` becomes its Python value once. What remains is a list with holes: a hole is
the number of a slot, or, for a container with tensors in it, a function from slots to the value.

    args = Args([...]);  args.build(env)    # -> [tensor, 2.0], {}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from weft.graph.node import Arg, Complex, Map, Name, Ref, Seq, Shape, Slice

Env = dict[int, torch.Tensor]
Hole = int | Callable[[Env], Any] | None

_PLAIN = frozenset((type(None), bool, int, float, str))
_NO_KWARGS: dict[str, Any] = {}


class Args:
    """Positional and keyword arguments with holes; keywords lie behind the positions."""

    __slots__ = ("count", "deep", "names", "proto", "slots")

    def __init__(
        self,
        args: Sequence[Arg],
        kwargs: Sequence[tuple[str, Arg]],
        base: Sequence[int],
        uses: list[int],
    ) -> None:
        self.count = len(args)
        self.names = [name for name, _ in kwargs] if kwargs else ()
        self.proto: list[Any] = []
        self.slots: list[tuple[int, int]] = []
        self.deep: list[tuple[int, Callable[[Env], Any]]] = []
        for arg in args:
            self._add(arg, base, uses)
        for _, arg in kwargs:
            self._add(arg, base, uses)

    def _add(self, arg: Arg, base: Sequence[int], uses: list[int]) -> None:
        proto, value = self.proto, arg
        if type(arg) not in _PLAIN:
            value, hole = lower(arg, base, uses)
            if isinstance(hole, int):
                self.slots.append((len(proto), hole))
            elif hole is not None:
                self.deep.append((len(proto), hole))
        proto.append(value)

    def build(self, env: Env) -> tuple[list[Any], dict[str, Any]]:
        """The arguments, with the tensors that are in the slots now."""
        args = self.proto.copy()
        for position, slot in self.slots:
            args[position] = env[slot]
        for position, make in self.deep:
            args[position] = make(env)
        if not self.names:
            return args, _NO_KWARGS
        kwargs = dict(zip(self.names, args[self.count :], strict=True))
        del args[self.count :]
        return args, kwargs


def lower(arg: Arg, base: Sequence[int], uses: list[int]) -> tuple[Any, Hole]:
    """The value of an argument, or its hole. `base[n]` is the first slot of node `n`."""
    kind = type(arg)
    if kind in _PLAIN:
        return arg, None
    if kind is Ref:
        slot = base[arg.node] + arg.out  # type: ignore[union-attr]
        uses.append(slot)
        return None, slot
    return _LOWER[kind](arg, base, uses)


def _seq(arg: Seq, base: Sequence[int], uses: list[int]) -> tuple[Any, Hole]:
    return _container([lower(item, base, uses) for item in arg.items], _FORMS[arg.form])


def _map(arg: Map, base: Sequence[int], uses: list[int]) -> tuple[Any, Hole]:
    keys = arg.keys
    parts = [lower(item, base, uses) for item in arg.values]
    return _container(parts, lambda values: dict(zip(keys, values, strict=True)))


def _slice(arg: Slice, base: Sequence[int], uses: list[int]) -> tuple[Any, Hole]:
    if type(arg.start) in _PLAIN and type(arg.stop) in _PLAIN and type(arg.step) in _PLAIN:
        return slice(arg.start, arg.stop, arg.step), None
    parts = [lower(item, base, uses) for item in (arg.start, arg.stop, arg.step)]
    return _container(parts, lambda bounds: slice(*bounds))


def _shape(arg: Shape, base: Sequence[int], uses: list[int]) -> tuple[Any, Hole]:
    slot = base[arg.of.node] + arg.of.out
    uses.append(slot)
    return None, lambda env: env[slot].shape


def _container(
    parts: list[tuple[Any, Hole]], finish: Callable[[list[Any]], Any]
) -> tuple[Any, Hole]:
    for _, hole in parts:
        if hole is not None:
            break
    else:
        return finish([value for value, _ in parts]), None
    return None, lambda env: finish([_value(part, env) for part in parts])


def _value(part: tuple[Any, Hole], env: Env) -> Any:
    value, hole = part
    if hole is None:
        return value
    return env[hole] if type(hole) is int else hole(env)  # type: ignore[operator]


def _name(arg: Name, base: Sequence[int], uses: list[int]) -> tuple[Any, Hole]:
    if arg.form == "ellipsis":
        return ..., None
    return float(arg.name) if arg.form == "float" else getattr(torch, arg.name), None


def _complex(arg: Complex, base: Sequence[int], uses: list[int]) -> tuple[Any, Hole]:
    return complex(arg.real, arg.imag), None


_FORMS: dict[str, Callable[[list[Any]], Any]] = {"tuple": tuple, "list": list, "size": torch.Size}
_LOWER: dict[type, Callable[..., tuple[Any, Hole]]] = {
    Seq: _seq,
    Map: _map,
    Slice: _slice,
    Shape: _shape,
    Name: _name,
    Complex: _complex,
}
