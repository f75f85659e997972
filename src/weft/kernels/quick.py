"""Abstract results of common elementwise operations by rule, for a first meeting with a shape.

`h + 1` on a meta tensor runs PyTorch's Python reference code: 100 us, where most operations take
20. With a fresh prompt length each time every operation is met first. For dense tensors of one
floating dtype in plain row-major layout, and for plain indexing, the result is known without
asking; all else goes to `abstract.evaluate`, and a test holds the two against each other.
"""

from __future__ import annotations

from typing import Any

import torch

from .abstract import MAX_ELEMENTS, LeafOut, Outcome, evaluate
from .aval import Aval, contiguous, intern
from .results import TENSOR

_UNARY_NAMES = """
    abs cos erf exp expm1 log log1p neg nn.functional.relu nn.functional.silu reciprocal relu rsqrt
    sigmoid sin sqrt square tanh
"""
_UNARY = frozenset(_UNARY_NAMES.split())
_BINARY = frozenset(("add", "div", "maximum", "minimum", "mul", "rsub", "sub"))
_COMPARISON = frozenset(("eq", "ge", "gt", "le", "lt", "ne"))
_IN_PLACE = frozenset(("Tensor.add_", "Tensor.div_", "Tensor.mul_", "Tensor.sub_"))
_NONE = type(None)
_TENSORS_ONLY = frozenset(("maximum", "minimum"))
_FLOATS = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))


def outcome(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
    """What `abstract.evaluate` says, often sooner. Raises the same."""
    found = None if kwargs else _by_rule(name, args)
    return evaluate(name, args, kwargs) if found is None else found


def _by_rule(name: str, args: tuple[Any, ...]) -> Outcome | None:
    if name in _UNARY:
        return _same_shape(args)
    if name in _BINARY or name in _COMPARISON:
        return _two(name, args)
    if name in _IN_PLACE:
        return _in_place(args)
    return _index(*args) if name == "Tensor.__getitem__" else None


def _same_shape(args: tuple[Any, ...]) -> Outcome | None:
    if len(args) != 1 or not _is_plain(args[0]):
        return None
    return _fresh(args[0].shape, args[0].dtype)


def _two(name: str, args: tuple[Any, ...]) -> Outcome | None:
    if len(args) != 2 or not _is_plain(args[0]):
        return None
    first, second = args
    dtype = torch.bool if name in _COMPARISON else first.dtype
    if type(second) in (int, float) and name not in _TENSORS_ONLY:
        return _fresh(first.shape, dtype)
    if not _is_plain(second) or second.dtype is not first.dtype:
        return None
    shape = _broadcast(first.shape, second.shape)
    return None if shape is None else _fresh(shape, dtype)


def _in_place(args: tuple[Any, ...]) -> Outcome | None:
    if len(args) != 2 or type(args[0]) is not Aval or args[0].dtype not in _FLOATS:
        return None
    first, second = args
    if not _is_dense(first):
        return None
    if type(second) not in (int, float):
        if type(second) is not Aval or second.dtype is not first.dtype:
            return None
        if _broadcast(first.shape, second.shape) != tuple(first.shape):
            return None
    return Outcome(TENSOR, (LeafOut(first, 0, 0),), (0,))


def _is_dense(aval: Aval) -> bool:
    """Whether no element stands twice: each stride steps over all that the smaller ones reach."""
    reach = 1
    for stride, size in sorted(zip(aval.stride, aval.shape, strict=True)):
        if size > 1 and stride < reach:
            return False
        reach = max(reach, stride * (size - 1) + reach) if size else reach
    return True


def _index(aval: Any, index: Any = None) -> Outcome | None:
    """Integers and slices with positive steps: a view."""
    items = index if type(index) is tuple else (index,)
    if type(aval) is not Aval or len(items) > len(aval.shape):
        return None
    shape, stride, offset = [], [], aval.offset
    for dim, item in enumerate(items):
        size, step = aval.shape[dim], aval.stride[dim]
        if type(item) is int:
            if not -size <= item < size:
                return None
            offset += step * (item % size)
        elif type(item) is slice and all(type(x) in (int, _NONE) for x in _parts(item)):
            if item.step is not None and item.step < 1:
                return None
            start, stop, by = item.indices(size)
            shape.append(max(0, -((start - stop) // by)))
            stride.append(step * by)
            offset += step * start
        else:
            return None
    shape += aval.shape[len(items) :]
    stride += aval.stride[len(items) :]
    if 0 in shape:
        return None
    found = intern(tuple(shape), tuple(stride), offset, aval.dtype)
    return Outcome(TENSOR, (LeafOut(found, 0, None),), ())


def _parts(item: slice) -> tuple[Any, Any, Any]:
    return item.start, item.stop, item.step


def _is_plain(arg: Any) -> bool:
    """A floating tensor with at least one dimension, in row-major layout."""
    if type(arg) is not Aval or arg.dtype not in _FLOATS or not arg.shape:
        return False
    return arg.stride == contiguous(arg.shape, arg.dtype).stride


def _broadcast(first: torch.Size, second: torch.Size) -> tuple[int, ...] | None:
    """The common shape; None where PyTorch would raise."""
    if len(first) < len(second):
        first, second = second, first
    padded = (1,) * (len(first) - len(second)) + tuple(second)
    shape = tuple([max(a, b) if a and b else 0 for a, b in zip(first, padded, strict=True)])
    fits = all(a == b or a == 1 or b == 1 for a, b in zip(first, padded, strict=True))
    return shape if fits else None


def _fresh(shape: tuple[int, ...], dtype: torch.dtype) -> Outcome | None:
    aval = contiguous(tuple(shape), dtype)
    if aval.nbytes > MAX_ELEMENTS * dtype.itemsize:
        return None
    return Outcome(TENSOR, (LeafOut(aval, None, None),), ())
