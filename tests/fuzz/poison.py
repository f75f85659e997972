"""Memory that is full of a pattern before anybody writes to it, and beside what was given."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.kernels.opdb import Sample

PATTERNS = (0x5A, 0xA5)
_PERTURB, _MMAP_MAX, _MMAP_USUAL = -6, -4, 65_536

needs_glibc = pytest.mark.skipif(sys.platform != "linux", reason="needs the allocator of glibc")


@contextmanager
def poisoned(pattern: int) -> Iterator[None]:
    """Fresh memory of any size is full of a pattern, by switches of glibc's own: its blocks, and
    none that come from the kernel, which are full of zeros."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_MAX, 0)
    mallopt(_PERTURB, 255 ^ pattern)
    try:
        yield
    finally:
        mallopt(_PERTURB, 0)
        mallopt(_MMAP_MAX, _MMAP_USUAL)


def beside(sample: Sample, pattern: int) -> Sample:
    """The same call on tensors between whose elements, and around them, stands a pattern."""
    return Sample(
        sample.name, _spread(sample.args, pattern), _spread(sample.kwargs, pattern), sample.source
    )


def _spread(arg: Any, pattern: int) -> Any:
    if isinstance(arg, torch.Tensor):
        return _between(arg, pattern)
    if type(arg) in (tuple, list):
        return type(arg)(_spread(item, pattern) for item in arg)
    if isinstance(arg, dict):
        return {key: _spread(value, pattern) for key, value in arg.items()}
    if isinstance(arg, slice):
        return slice(*(_spread(part, pattern) for part in (arg.start, arg.stop, arg.step)))
    return arg


def _between(tensor: torch.Tensor, pattern: int) -> torch.Tensor:
    """Every second element of a wider tensor, three from its beginning and its end."""
    if not tensor.numel():
        return tensor.clone()
    size = 2 * tensor.numel() + 6
    raw = torch.full((size * tensor.element_size(),), pattern, dtype=torch.uint8)
    if tensor.dtype is torch.bool:
        raw %= 2  # no other number is a truth value
    wide = raw.view(tensor.dtype)
    strides = [2 * step for step in torch.empty(tensor.shape, device="meta").stride()]
    return wide.as_strided(tensor.shape, strides, 3).copy_(tensor)
