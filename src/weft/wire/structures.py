"""Python arguments as data, and back: what stands around the tensors of a call or a result.

`None`, `bool`, `int`, `float`, `str`, `...`, slices, tuples, lists and dicts with text keys travel,
in exactly these types: a subclass would arrive as something else. Tensors are the caller's: it
says which `Ref` stands for one, and what a `Ref` stands for. Nothing else travels.

    lower((x, {"scale": 2.0}), ref_of)     # Seq("tuple", (Ref(0), Map(("scale",), (2.0,))))
    build(arg, tensors.__getitem__)        # and back
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import EllipsisType
from typing import Any

from weft.errors import MessageError, TravelError
from weft.graph.node import Arg, Map, Name, Ref, Seq, Slice

MAX_DEPTH = 32
MAX_NUMBER = 2**63 - 1
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_PLAIN = (type(None), bool, str)


def lower(value: Any, ref_of: Callable[[Any], Ref | None], depth: int = 0) -> Arg:
    """`value` as data; `ref_of(x)` gives the `Ref` of a tensor, None for all else.

    Raises `TravelError` for what cannot travel.
    """
    if depth > MAX_DEPTH:
        raise TravelError(f"arguments nested deeper than {MAX_DEPTH} do not travel")
    ref = ref_of(value)
    if ref is not None:
        return ref
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is int or kind is float:
        return _number(value)
    return _container(value, lambda item: lower(item, ref_of, depth + 1))


def _number(value: int | float) -> Arg:
    if isinstance(value, float):
        return value if math.isfinite(value) else Name("float", str(value))
    if abs(value) > MAX_NUMBER:
        raise TravelError("a number beyond 64 bits does not travel")
    return value


def _container(value: Any, inner: Callable[[Any], Arg]) -> Arg:
    kind = type(value)
    if kind is tuple or kind is list:
        return Seq(kind.__name__, tuple([inner(item) for item in value]))
    if kind is dict and all(type(key) is str for key in value):
        return Map(tuple(value), tuple([inner(item) for item in value.values()]))
    if kind is slice:
        return Slice(inner(value.start), inner(value.stop), inner(value.step))
    if kind is EllipsisType:
        return Name("ellipsis")
    raise TravelError(
        f"{_called(value)} does not travel to a server",
        fix="pass tensors, numbers, text, or tuples, lists and dicts (with text keys) of these",
    )


def _called(value: Any) -> str:
    kind = type(value)
    if kind is dict:
        odd = next(key for key in value if type(key) is not str)
        return f"a dict with a key of type {type(odd).__name__}"
    return f"an argument of type {kind.__module__}.{kind.__qualname__}".replace("builtins.", "")


def build(arg: Arg, value_of: Callable[[Ref], Any], depth: int = 0) -> Any:
    """The value that data stand for. Raises `MessageError` for data that stand for none."""
    if depth > MAX_DEPTH:
        raise MessageError(f"arguments nested deeper than {MAX_DEPTH}")

    def inner(item: Arg) -> Any:
        return build(item, value_of, depth + 1)

    match arg:
        case Ref():
            return value_of(arg)
        case Seq(form="tuple"):
            return tuple([inner(item) for item in arg.items])
        case Seq(form="list"):
            return [inner(item) for item in arg.items]
        case Map():
            return _dict(arg, inner)
        case Slice():
            return slice(inner(arg.start), inner(arg.stop), inner(arg.step))
        case Name():
            return _named(arg)
        case None | bool() | int() | float() | str():
            return _plain(arg)
    raise MessageError(f"arguments cannot hold a {type(arg).__name__.lower()} of this form")


def _dict(arg: Map, inner: Callable[[Arg], Any]) -> dict[str, Any]:
    if not len(set(arg.keys)) == len(arg.keys) == len(arg.values):
        raise MessageError("a dict in the arguments needs different keys, and a value for each")
    return {key: inner(value) for key, value in zip(arg.keys, arg.values, strict=True)}


def _named(arg: Name) -> Any:
    if arg.form == "float" and arg.name in _FLOATS:
        return _FLOATS[arg.name]
    if arg.form == "ellipsis" and not arg.name:
        return ...
    raise MessageError(f"arguments cannot hold the name {arg.form[:40]!r} {arg.name[:40]!r}")


def _plain(arg: Any) -> Any:
    if type(arg) is int and abs(arg) > MAX_NUMBER:
        raise MessageError("a number in the arguments is beyond 64 bits")
    return arg
