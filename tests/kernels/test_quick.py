"""Quick shape rules say what the operation itself says on meta tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.kernels import quick
from weft.kernels.abstract import evaluate
from weft.kernels.aval import Aval, intern

FLOATS = (torch.float32, torch.bfloat16)


@st.composite
def avals(draw: Any) -> Aval:
    """Dense layouts, most of them row-major; some transposed, expanded or of another kind."""
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3]), max_size=3)))
    dtype = draw(st.sampled_from((*FLOATS, torch.int64)))
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    if draw(st.integers(0, 4)) == 0 and len(shape) > 1:
        tensor = tensor.transpose(0, 1)
    if draw(st.integers(0, 6)) == 0:
        tensor = tensor.expand((2, *tensor.shape))
    return intern(tuple(tensor.shape), tuple(tensor.stride()), 0, dtype)


SCALARS = st.sampled_from([0, 2, -1.5, 1e30, True])


@pytest.mark.parametrize("name", sorted(quick._UNARY))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(aval=avals())
def test_one_argument(name: str, aval: Aval) -> None:
    assert_same(name, (aval,))


@pytest.mark.parametrize("name", sorted(quick._BINARY | quick._COMPARISON))
@settings(max_examples=80, deadline=None, derandomize=True)
@given(first=avals(), second=st.one_of(avals(), SCALARS))
def test_two_arguments(name: str, first: Aval, second: Any) -> None:
    assert_same(name, (first, second))


@pytest.mark.parametrize("name", sorted(quick._IN_PLACE))
@settings(max_examples=80, deadline=None, derandomize=True)
@given(first=avals(), second=st.one_of(avals(), SCALARS))
def test_in_place(name: str, first: Aval, second: Any) -> None:
    assert_same(name, (first, second))


BOUNDS = st.one_of(st.none(), st.integers(-4, 4))
ITEMS = st.one_of(
    st.integers(-3, 2), st.builds(slice, BOUNDS, BOUNDS, st.one_of(st.none(), st.integers(1, 3)))
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(aval=avals(), index=st.one_of(ITEMS, st.lists(ITEMS, max_size=3).map(tuple)))
def test_indexing(aval: Aval, index: Any) -> None:
    assert_same("Tensor.__getitem__", (aval, index))
    by_rule = quick._by_rule("Tensor.__getitem__", (aval, index))
    if by_rule is not None:
        told = evaluate("Tensor.__getitem__", (aval, index), {})
        assert by_rule.leaves[0].aval is told.leaves[0].aval


def assert_same(name: str, args: tuple) -> None:
    by_rule = quick._by_rule(name, args)
    if by_rule is None:
        return
    told = evaluate(name, args, {})  # raises where the rule should have said None
    (leaf,), (expected,) = by_rule.leaves, told.leaves
    assert (leaf.aval.shape, leaf.aval.dtype) == (expected.aval.shape, expected.aval.dtype)
    if 0 not in leaf.aval.shape:
        assert leaf.aval.meta.is_contiguous() == expected.aval.meta.is_contiguous()
    assert (leaf.alias, leaf.same, by_rule.writes) == (expected.alias, expected.same, told.writes)


def test_the_rules_are_used() -> None:
    plain = intern((2, 3), (3, 1), 0, torch.float32)
    assert all(quick._by_rule(name, (plain,)) for name in quick._UNARY)
    assert all(quick._by_rule(name, (plain, plain)) for name in quick._BINARY | quick._COMPARISON)
    assert quick._by_rule("mul", (plain, 2.0))
    assert all(quick._by_rule(name, (plain, plain)) for name in quick._IN_PLACE)
    assert quick._by_rule("Tensor.__getitem__", (plain, (slice(None), -1)))
