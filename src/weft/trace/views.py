"""Which part of a contiguous tensor a view of it is, as an index and an order of dimensions.

find(acts, acts[2].T[1:])        # ((2, slice(0, 5, 1), slice(1, 4, 1)), (1, 0))
"""

from __future__ import annotations

import torch

Index = tuple[int | slice, ...]


def find(base: torch.Tensor, view: torch.Tensor) -> tuple[Index, tuple[int, ...]] | None:
    """`(index, order)` such that `base[index].permute(order)` has the elements of `view`.

    Dimensions of size 1 are left out. None for a view that mixes dimensions, such as `base.view(-1)`.
    """
    offset = view.storage_offset() - base.storage_offset()
    starts = []
    for size, stride in zip(base.shape, base.stride(), strict=True):
        starts.append(offset // stride % size if size else 0)
    index: list[int | slice] = list(starts)
    taken: list[int] = []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        if size == 1:
            continue
        dim = _dimension(base, stride, taken)
        if dim is None:
            return None
        step = stride // base.stride(dim)
        if starts[dim] + (size - 1) * step >= base.shape[dim]:
            return None
        index[dim] = slice(starts[dim], starts[dim] + (size - 1) * step + 1, step)
        taken.append(dim)
    rank = sorted(taken)
    return tuple(index), tuple([rank.index(dim) for dim in taken])


def _dimension(base: torch.Tensor, stride: int, taken: list[int]) -> int | None:
    """The dimension of `base` along which a step is `stride` elements."""
    for dim, (size, own) in enumerate(zip(base.shape, base.stride(), strict=True)):
        if dim not in taken and size > 1 and own and stride >= own and stride % own == 0:
            return dim
    return None
