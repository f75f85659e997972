"""Guards: whether a number that the recording looked at came out the same.

Integers and truth values must be equal; floating numbers within a part of the largest magnitude
(1e-5; 1e-2 for half precision). NaN equals NaN, infinities only themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

TOLERANCE = 1e-5
HALF_TOLERANCE = 1e-2


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
