"""Abstract values: what is known of a tensor without its numbers.

An `Aval` is shape, strides, storage offset and dtype. Avals are interned, so two are equal exactly
when they are the same object, and a tuple of them is a cheap cache key.

    intern((1, 9, 768), (6912, 768, 1), 0, torch.float32)
    aval_of(tensor)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes


class Aval:
    """Shape, strides, offset and dtype of a dense tensor. Make one with `intern` or `aval_of`."""

    __slots__ = ("_meta", "dtype", "offset", "shape", "stride")

    def __init__(
        self, shape: torch.Size, stride: tuple[int, ...], offset: int, dtype: torch.dtype
    ) -> None:
        self.shape = shape
        self.stride = stride
        self.offset = offset
        self.dtype = dtype
        self._meta: torch.Tensor | None = None

    def __repr__(self) -> str:
        return f"{dtype_name(self.dtype)}{list(self.shape)}"

    @property
    def meta(self) -> torch.Tensor:
        """One meta tensor of this layout, shared: never write into it."""
        if self._meta is None:
            if torch._C._len_torch_dispatch_stack():  # it must not be a fake mode's tensor
                with _disable_current_modes():
                    self._meta = self.fresh()
            else:
                self._meta = self.fresh()
        return self._meta

    @property
    def nbytes(self) -> int:
        """Bytes of the elements (not of the storage behind a view)."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        return self.meta.is_contiguous()

    def fresh(self) -> torch.Tensor:
        """A meta tensor of this layout with a storage of its own."""
        return _meta(self.shape, self.stride, self.offset, self.dtype)


_INTERNED: dict[tuple, Aval] = {}


def intern(
    shape: tuple[int, ...], stride: tuple[int, ...], offset: int, dtype: torch.dtype
) -> Aval:
    """The one `Aval` of this layout."""
    key = (shape, stride, offset, dtype)
    found = _INTERNED.get(key)
    if found is None:
        if len(_INTERNED) > 100_000:
            _INTERNED.clear()  # equality by identity only misses cache entries afterwards
        size = torch.Size([int(n) for n in shape])
        found = _INTERNED[key] = Aval(size, tuple(stride), offset, dtype)
    return found


def aval_of(tensor: torch.Tensor) -> Aval:
    """The abstract value of a dense tensor (real, meta or fake)."""
    offset = int(tensor.storage_offset())
    return intern(tuple(tensor.shape), tuple(tensor.stride()), offset, tensor.dtype)


def contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Aval:
    """The abstract value of a freshly made tensor."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return intern(tuple(shape), tuple(reversed(stride)), 0, dtype)


def filled(arg: Any, make: Callable[[Aval], Any]) -> Any:
    """The arguments of a call, with what `make` gives for each `Aval`, in flattening order."""
    kind = type(arg)
    if kind is Aval:
        return make(arg)
    if kind is tuple or kind is list:
        return kind([filled(item, make) for item in arg])
    if kind is dict:
        return {key: filled(value, make) for key, value in arg.items()}
    if kind is slice:
        return slice(*[filled(part, make) for part in (arg.start, arg.stop, arg.step)])
    return arg


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` as `float32`."""
    return str(dtype).removeprefix("torch.")


def _meta(
    shape: tuple[int, ...], stride: tuple[int, ...], offset: int, dtype: torch.dtype
) -> torch.Tensor:
    if not offset:
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True) if n > 1)
    base = torch.empty(offset + span, dtype=dtype, device="meta")
    return base.as_strided(shape, stride, offset)
