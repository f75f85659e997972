"""What stands around the tensors of a call: there and back in the same types, or refused."""

from __future__ import annotations

import math
from collections import OrderedDict, namedtuple
from enum import IntEnum
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import MessageError, TravelError
from weft.graph.node import Complex, Map, Name, Ref, Seq, Shape, Slice
from weft.wire.messages import PlainInputs, decode, encode
from weft.wire.structures import build, lower


class Tensor:
    """What stands for a tensor: only the caller knows what one is."""

    def __init__(self, number: int) -> None:
        self.number = number


TENSORS = [Tensor(number) for number in range(3)]


def ref_of(value: Any) -> Ref | None:
    return Ref(value.number) if isinstance(value, Tensor) else None


def value_of(ref: Ref) -> Any:
    return TENSORS[ref.node]


def same(got: Any, expected: Any) -> bool:
    """Equal, in type too, all the way down; the same tensors; not a number equals itself."""
    if type(got) is not type(expected):
        return False
    if isinstance(got, (tuple, list)):
        return len(got) == len(expected) and all(map(same, got, expected))
    if isinstance(got, dict):
        return list(got) == list(expected) and all(same(got[key], expected[key]) for key in got)
    if isinstance(got, slice):
        return same((got.start, got.stop, got.step), (expected.start, expected.stop, expected.step))
    if isinstance(got, float):
        return got.hex() == expected.hex()
    return got is expected if isinstance(got, Tensor) else got == expected


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats()
    | TEXT
    | st.just(...)
    | st.sampled_from(TENSORS)
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(TEXT, inner, max_size=3)
        | st.builds(slice, inner, inner, inner)
    ),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(value=VALUES, form=st.sampled_from(["msgpack", "json"]))
def test_values_go_there_and_back(value, form):
    message = PlainInputs(args=(lower(value, ref_of),))
    arg = decode(encode(message, form), PlainInputs, form).args[0]
    assert same(build(arg, value_of), value)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, -0.0, 1e16, 2.0, 5e-324])
def test_floats_stay_floats(number):
    for form in ("msgpack", "json"):
        sent = encode(PlainInputs(args=(lower(number, ref_of),)), form)
        assert same(build(decode(sent, PlainInputs, form).args[0], value_of), number)


Pair = namedtuple("Pair", "a b")


class Colour(IntEnum):
    RED = 1


class Text(str):
    pass


STRANGE = {
    "a set": ({1}, "set"),
    "bytes": (b"x", "bytes"),
    "a complex number": (1j, "complex"),
    "an object": (object(), "object"),
    "a function": (len, "builtin_function_or_method"),
    "a lambda": (lambda: 1, "function"),
    "a class": (int, "type"),
    "a path": (Path("x"), "Path"),
    "a fraction": (Fraction(1, 2), "Fraction"),
    "a named tuple": (Pair(1, 2), "Pair"),
    "an ordered dict": (OrderedDict(a=1), "OrderedDict"),
    "an enum": (Colour.RED, "Colour"),
    "a subclass of text": (Text("x"), "Text"),
    "a numpy number": (np.float64(1), "float64"),
    "an array": (np.zeros(2), "numpy.ndarray"),
    "a dtype": (torch.float32, "torch.dtype"),
    "sizes": (torch.Size([1]), "torch.Size"),
    "a device": (torch.device("cpu"), "torch.device"),
    "a tensor that nobody knows": (torch.zeros(1), "torch.Tensor"),
    "a generator": ((n for n in ()), "generator"),
    "a range": (range(3), "range"),
    "a dict with numbers": ({1: 2}, "a dict with a key of type int"),
    "a large number": (2**63, "64 bits"),
    "a large number below zero": (-(2**63), "64 bits"),
}


@pytest.mark.parametrize("strange", STRANGE)
def test_nothing_else_travels(strange):
    value, named = STRANGE[strange]
    for inside in (value, [1, (value,)], {"x": value}, slice(value, None)):
        with pytest.raises(TravelError, match=named):
            lower(inside, ref_of)


def test_a_refusal_names_the_way_out():
    with pytest.raises(TravelError) as caught:
        lower({1}, ref_of)
    assert "pass tensors" in str(caught.value)
    assert isinstance(caught.value, TypeError)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_what_is_nested_too_deeply_does_not_travel():
    assert lower(nested(32), ref_of)
    for depth in (33, 100_000):
        with pytest.raises(TravelError, match="nested deeper"):
            lower(nested(depth), ref_of)


def test_what_contains_itself_does_not_travel():
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(TravelError, match="nested deeper"):
        lower(loop, ref_of)


def deep(depth: int) -> Any:
    arg: Any = 1
    for _ in range(depth):
        arg = Seq("list", (arg,))
    return arg


BAD = {
    "an unknown container": Seq("set", ()),
    "sizes": Seq("size", (1,)),
    "a complex number": Complex(1.0, 2.0),
    "a shape": Shape(Ref(0)),
    "a dtype": Name("dtype", "float32"),
    "an unknown name": Name("module", "os"),
    "an unknown float": Name("float", "__import__"),
    "an ellipsis with a name": Name("ellipsis", "x"),
    "a dict with more keys than values": Map(("a", "b"), (1,)),
    "a dict with more values than keys": Map(("a",), (1, 2)),
    "a key twice": Map(("a", "a"), (1, 2)),
    "a large number": 2**63,
    "too deep": deep(33),
    "far too deep": deep(500),
}


@pytest.mark.parametrize("bad", BAD)
def test_data_that_stand_for_no_argument_are_refused(bad):
    for inside in (BAD[bad], Map(("x",), (BAD[bad],)), Slice(None, BAD[bad])):
        with pytest.raises(MessageError):
            build(inside, value_of)
