"""Guards: whether a number that the recording looked at came out the same.

Integers and truth values must be equal; floating numbers within a part of the largest magnitude
(1e-5; 1e-2 for half precision). NaN equals NaN, infinities only themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from weft.errors import GraphError, GuardError
from weft.graph.node import Bound

TOLERANCE = 1e-5
HALF_TOLERANCE = 1e-2
_SHOWN = 200


def value_of(tensor: torch.Tensor, look: str) -> Any:
    """What the look saw: the numbers in nested lists, or the shape."""
    return tuple(tensor.shape) if look == "shape" else tensor.tolist()


def agree(expected: Any, got: Any, dtype: torch.dtype) -> bool:
    """Whether two nested lists of numbers are the same within the tolerance of `dtype`."""
    if _shape(expected) != _shape(got):
        return False
    pairs = list(zip(_numbers(expected), _numbers(got), strict=True))
    bound = _bound(pairs, dtype)
    return all(_close(one, other, bound) for one, other in pairs)


def check_look(look: str, expected: Any, shape: Sequence[int], line: object) -> None:
    """Raises `GuardError` where a tensor of this shape cannot be what a look saw."""
    if look == "shape":
        if tuple(expected) != tuple(shape):
            raise guard_error(look, tuple(expected), tuple(shape), line)
    elif _sizes(expected) != _listed(shape):
        raise guard_error(look, expected, f"of shape {list(shape)}", line)


def _sizes(value: Any) -> tuple[int, ...] | None:
    """The sizes of nested lists of numbers; None for ragged ones."""
    if not isinstance(value, (list, tuple)):
        return ()
    inner = {_sizes(item) for item in value} or {()}
    first = inner.pop()
    return None if inner or first is None else (len(value), *first)


def _listed(shape: Sequence[int]) -> tuple[int, ...]:
    """What is left of a shape in nested lists: nothing stands inside of no lists."""
    sizes = tuple(shape)
    return sizes[: sizes.index(0) + 1] if 0 in sizes else sizes


def guard_error(look: str, expected: Any, got: Any, line: object) -> GuardError:
    """A look that came out differently."""
    expected, got = str(expected)[:_SHOWN], str(got)[:_SHOWN]
    return GuardError(
        f"the recording depended on this {look} being {expected}, but it is {got}",
        line=line,
        fix="record the experiment again on this input",
    )


def check_bound(bound: Bound, shape: Sequence[int], line: object) -> None:
    """Raises `GraphError` unless a size that the recording read as a number is that number."""
    if bound.dim >= len(shape):
        raise GraphError(
            f"the experiment read dimension {bound.dim} of a tensor with less of them",
            line=line,
            fix="record the experiment on an input like this one",
        )
    if shape[bound.dim] != bound.size:
        raise GraphError(
            f"the experiment read dimension {bound.dim} as the number {bound.size}; "
            f"on this input it is {shape[bound.dim]}",
            line=line,
            fix="record it again on an input of this size",
        )


def _shape(value: Any) -> Any:
    return tuple(map(_shape, value)) if isinstance(value, (list, tuple)) else None


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)
    else:
        yield value


def _bound(pairs: list[tuple[Any, Any]], dtype: torch.dtype) -> float:
    sizes = [abs(number) for pair in pairs for number in pair if not isinstance(number, int)]
    part = HALF_TOLERANCE if dtype in (torch.float16, torch.bfloat16) else TOLERANCE
    return part * max((size for size in sizes if math.isfinite(size)), default=0.0)


def _close(one: Any, other: Any, bound: float) -> bool:
    if one == other or (one != one and other != other):
        return True
    if isinstance(one, int) and isinstance(other, int):
        return False
    return abs(one - other) <= bound
