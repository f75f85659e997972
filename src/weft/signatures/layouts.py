"""Input layouts: what a call looks like, which calls look alike, and stand-ins of other sizes.

A layout is all that a forward pass can depend on except numbers. Calls that differ only in batch
`B` and length `S` belong to one `Family`: `B` is dimension 0 of the tensor inputs, `S` dimension 1
of the integer ones (ids, masks, positions). A family can make inputs of other sizes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from weft.kernels.aval import aval_of, contiguous

from .structure import PLAIN, Tree, put_together, take_apart

# Numbers of an integer input: all one, zeros and ones, positions from 0; otherwise the bytes.
FULL, HOLES, RANGE = "full", "holes", "range"

Point = tuple[int, int]


class Slot(NamedTuple):
    """A tensor input of a family: each dimension is "B", "S" or a number."""

    dims: tuple[str | int, ...]
    dtype: torch.dtype


class Family(NamedTuple):
    """What calls of different sizes have in common. `leaves` are `Slot`s and plain values, the
    latter with their types (True is not 1)."""

    tree: Tree
    leaves: tuple[tuple[type, Any], ...]

    def inputs(self, point: Point, kinds: dict[int, str], fill: int) -> tuple[tuple, dict]:
        """(args, kwargs) at batch and length `point`; tensor number n has numbers of `kinds[n]`,
        the other integers are `fill`."""
        values, number = [], 0
        for _, leaf in self.leaves:
            if isinstance(leaf, Slot):
                values.append(_stand_in(leaf, point, kinds.get(number), fill))
                number += 1
            else:
                values.append(leaf)
        return put_together(self.tree, values)


def _stand_in(slot: Slot, point: Point, kind: str | None, fill: int) -> torch.Tensor:
    sizes = {"B": point[0], "S": point[1]}
    shape = [sizes.get(dim, dim) for dim in slot.dims]  # type: ignore[arg-type]
    if not _is_integer(slot.dtype):
        return torch.empty(shape, dtype=slot.dtype, device="meta")  # type: ignore[arg-type]
    if kind == RANGE:
        line = torch.arange(shape[-1], dtype=slot.dtype)  # type: ignore[arg-type]
        return line.expand(shape).contiguous()  # type: ignore[arg-type]
    made = torch.full(shape, 1 if kind in (FULL, HOLES) else fill, dtype=slot.dtype)  # type: ignore[arg-type]
    if kind == HOLES:
        made.view(-1)[0] = 0  # the first row is padded on the left
    return made


def layout_of(args: tuple, kwargs: dict) -> tuple[Any, list[torch.Tensor]]:
    """(key of the layout, the tensors in order)."""
    tensors: list[torch.Tensor] = []
    parts: list[Any] = [len(args)]
    for arg in args:
        parts.append(_part(arg, tensors))
    for key, value in kwargs.items():
        parts.append(key)
        parts.append(_part(value, tensors))
    if len(tensors) > 1:
        storages = [t.untyped_storage()._cdata for t in tensors]
        if len(set(storages)) < len(storages):
            parts.append(tuple([storages.index(storage) for storage in storages]))
    return tuple(parts), tensors


def _part(value: Any, tensors: list[torch.Tensor]) -> Any:
    kind = type(value)
    if kind is torch.Tensor or issubclass(kind, torch.Tensor):
        tensors.append(value)
        return aval_of(value)
    if kind in PLAIN:
        return kind, value
    tree, _, leaves = take_apart(value)
    if tree is None:
        return _inside(value)
    return tree, tuple([_part(leaf, tensors) for leaf in leaves])


def _inside(value: Any) -> Any:
    """What is in an object that is no container, such as a cache: layouts and plain values."""
    seen: set[int] = set()

    def walk(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return aval_of(item)
        if type(item) in PLAIN:
            return type(item), item
        if isinstance(item, (torch.dtype, torch.device, torch.layout)):
            return str(item)
        if id(item) in seen:
            return None
        seen.add(id(item))
        if isinstance(item, (tuple, list)):
            return tuple([walk(part) for part in item])
        if isinstance(item, dict):
            return tuple([(str(key), walk(part)) for key, part in item.items()])
        return type(item), walk(getattr(item, "__dict__", None))

    return walk(value)


def family_of(args: tuple, kwargs: dict) -> tuple[Family, Point] | None:
    """The family of a call and its (batch, length); None where sizes cannot be varied.

    Length is 1 where no input has one, batch where no input is a tensor.
    """
    tree, _, leaves = take_apart((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not tensors or not all(map(_is_simple, tensors)):
        return None
    if len({t.untyped_storage()._cdata for t in tensors}) < len(tensors):
        return None
    if any(not isinstance(leaf, torch.Tensor) and type(leaf) not in PLAIN for leaf in leaves):
        return None
    point = max(t.shape[0] for t in tensors), _length(tensors)
    parts = [(type(leaf), _slot(leaf, point)) for leaf in leaves]
    return Family(
        tree, tuple([(Slot if isinstance(x, Slot) else kind, x) for kind, x in parts])
    ), point


def _is_simple(tensor: torch.Tensor) -> bool:
    whole = aval_of(tensor) is contiguous(tuple(tensor.shape), tensor.dtype)
    return tensor.dim() > 0 and tensor.numel() > 0 and whole


def _length(tensors: list[torch.Tensor]) -> int:
    lengths = [t.shape[1] for t in tensors if t.dim() >= 2 and _is_integer(t.dtype)]
    return lengths[0] if lengths else 1


def _slot(leaf: Any, point: Point) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    dims: list[str | int] = list(leaf.shape)
    if dims[0] == point[0]:
        dims[0] = "B"
    if len(dims) > 1 and dims[1] == point[1]:
        dims[1] = "S"
    return Slot(tuple(dims), leaf.dtype)


def _is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex


def kind_of(tensor: torch.Tensor) -> str | bytes:
    """What the numbers of an input are like: `FULL`, `HOLES`, `RANGE` or the numbers themselves."""
    if not _is_integer(tensor.dtype):
        return tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
    numbers = (tensor if tensor.device.type == "cpu" else tensor.cpu()).numpy()
    data = numbers.tobytes()
    key = (data, numbers.shape, tensor.dtype)
    found = _KIND_OF.get(key)
    if found is None:
        if len(_KIND_OF) >= 1024:
            _KIND_OF.clear()
        found = _kind(numbers)
        if len(data) < 1 << 16:
            _KIND_OF[key] = found
    return data if found is _OTHER else found


_OTHER = "other"
_KIND_OF: dict[tuple, str] = {}  # the same mask comes many times; to ask it anew takes longer


def _kind(numbers: Any) -> str:
    ones = numbers == 1
    if ones.all():
        return FULL
    if (ones | (numbers == 0)).all():
        return HOLES
    if numbers.ndim and (numbers == range(numbers.shape[-1])).all():
        return RANGE
    return _OTHER
