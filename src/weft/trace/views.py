"""The part of a tensor that a view of it is, taken again from something that stands for the tensor.

    same_part(value, Layout.of(acts), Layout.of(acts[2].T))       # value[2].T

`value` may be a recorded tensor: all steps are operations that give views.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

Index = tuple[int | slice, ...]


class Layout(NamedTuple):
    """Where the elements of a tensor lie in its storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def same_part(value: Any, base: Layout, view: Layout) -> Any:
    """The view of `value` that lies in it as `view` lies in the contiguous `base`.

    Raises ValueError for an expanded view, which has elements that lie on each other.
    """
    if any(size > 1 and not step for size, step in zip(view.shape, view.stride, strict=True)):
        raise ValueError("an expanded view")
    found = find(base, view)
    if found is None:
        return _unfolded(value.reshape(-1), view, view.offset - base.offset)
    index, order = found
    return value[index].permute(order).view(view.shape)


def find(base: Layout, view: Layout) -> tuple[Index, tuple[int, ...]] | None:
    """`(index, order)` such that `base[index].permute(order)` has the elements of `view`.

    Dimensions of size 1 are left out. None for a view that mixes dimensions (`base.view(-1)`).
    """
    offset = view.offset - base.offset
    starts = []
    for size, stride in zip(base.shape, base.stride, strict=True):
        starts.append(offset // stride % size if size else 0)
    index: list[int | slice] = list(starts)
    taken: list[int] = []
    for size, stride in zip(view.shape, view.stride, strict=True):
        if size == 1:
            continue
        dim = _dimension(base, stride, taken)
        if dim is None:
            return None
        step = stride // base.stride[dim]
        if starts[dim] + (size - 1) * step >= base.shape[dim]:
            return None
        index[dim] = slice(starts[dim], starts[dim] + (size - 1) * step + 1, step)
        taken.append(dim)
    rank = sorted(taken)
    return tuple(index), tuple([rank.index(dim) for dim in taken])


def _dimension(base: Layout, stride: int, taken: list[int]) -> int | None:
    """The dimension of `base` along which a step is `stride` elements."""
    for dim, (size, own) in enumerate(zip(base.shape, base.stride, strict=True)):
        if dim not in taken and size > 1 and own and stride >= own and stride % own == 0:
            return dim
    return None


def _unfolded(row: Any, view: Layout, first: int) -> Any:
    """Any view of a row: the reach of the view, unfolded once for each of its dimensions.

    `[..., reach]` becomes `[..., size, reach of the other dimensions]`.
    """
    steps = list(zip(view.shape, view.stride, strict=True))
    reach = 1 + sum([(size - 1) * step for size, step in steps])
    part = row[first : first + reach]
    for number, (size, step) in enumerate(steps):
        reach -= (size - 1) * step
        part = part.unfold(number, reach, max(step, 1))
    return part.select(-1, 0)
