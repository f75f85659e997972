"""A tensor as bytes, for what leaves the process. No torch: see `kernels.frames`."""

from __future__ import annotations

import math

from msgspec import Struct

ITEM_SIZES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes per element of every dtype that a graph may hold."""


class Frame(Struct, frozen=True):
    """`data` holds the elements row-major, little-endian: bytes, or a read-only view of bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


def frame_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """How many bytes a tensor takes."""
    return ITEM_SIZES[dtype] * math.prod(shape)
