"""What must be known of an operation before its abstract result is asked for, and what it hides.

On meta tensors an operation takes no memory, but it may still take forever: `split` makes as many
views as its numbers say. `refuse_bombs` looks at the numbers first. `inner_bytes` is what an
operation may need beside its arguments and results: `logsumexp` of an expanded tensor makes all of
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from weft.errors import GraphError
from weft.graph.check import MAX_OUTS
from weft.graph.node import Apply, Call, Map, Ref, Seq, Slice
from weft.kernels.abstract import Outcome
from weft.kernels.aval import Aval
from weft.kernels.forms import avals_in

MAX_DIMS = 64
_RESULTS = 3  # `unique` gives as many
_MASKS = (torch.bool, torch.uint8)
MAX_DIFFS = 64
MAX_FACTORS = 64


def tensor_refs(node: Call | Apply) -> list[Ref]:
    """The tensor arguments of a node in flattening order, as `Outcome` numbers them."""
    found: list[Ref] = []
    for arg in node.args:
        _collect(arg, found)
    for _, arg in node.kwargs:
        _collect(arg, found)
    return found


def _collect(arg: Any, found: list[Ref]) -> None:
    kind = type(arg)
    if kind is Ref:
        found.append(arg)
    elif kind is Seq:
        for item in arg.items:
            _collect(item, found)
    elif kind is Map:
        for item in arg.values:
            _collect(item, found)
    elif kind is Slice:
        for item in (arg.start, arg.stop, arg.step):
            _collect(item, found)


# -- numbers that are looked at first ------------------------------------------------------------


def refuse_bombs(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises `GraphError` for numbers that would keep even an abstract result busy for long."""
    if name not in _LISTS:
        for arg in (*args, *kwargs.values()):
            if isinstance(arg, (tuple, list)) and len(arg) > MAX_DIMS and not avals_in(arg[:1]):
                raise GraphError(f"torch.{name} is given {len(arg)} sizes; {MAX_DIMS} at most")
    rule = _COUNTS.get(name)
    count, most = rule(*args, **kwargs) if rule else (0, 0)
    if count > most:
        raise GraphError(f"torch.{name} would take {count} steps; {most} at most")


_LISTS = frozenset(
    {"Tensor.__getitem__", "Tensor.__setitem__", "Tensor.new_tensor", "index_put", "index_put_"}
    | {"split", "split_copy", "split_with_sizes", "split_with_sizes_copy", "Tensor.split"}
    | {"tensor_split", "hsplit", "vsplit", "dsplit"}
    | {"Tensor.hsplit", "Tensor.vsplit", "Tensor.dsplit"}
)
"""Operations that take long lists of numbers."""

Count = tuple[int, int]


def _size(tensor: Any, dim: Any) -> int:
    """The size of a dimension, or the largest there is."""
    shape = tensor.shape if type(tensor) is Aval else ()
    if type(dim) is int and -len(shape) <= dim < len(shape):
        return shape[dim]
    return max(shape, default=0)


def _split(tensor: Any = None, size: Any = 1, dim: Any = 0, **named: Any) -> Count:
    size = named.get("split_size_or_sections", named.get("split_size", size))
    if type(size) is not int:
        return 0, 0
    return _size(tensor, dim) // max(size, 1), MAX_OUTS


def _chunk(input: Any = None, chunks: Any = 1, dim: Any = 0, **_: Any) -> Count:
    return min(chunks if type(chunks) is int else 0, _size(input, dim)), MAX_OUTS


def _sections(input: Any = None, sections: Any = 1, *_: Any, **named: Any) -> Count:
    numbers = [value for value in (sections, *named.values()) if type(value) is int]
    return max(numbers, default=0), MAX_OUTS


def _unbind(input: Any = None, dim: Any = 0, **_: Any) -> Count:
    return _size(input, dim), MAX_OUTS


def _diff(input: Any = None, n: Any = 1, *_: Any, **__: Any) -> Count:
    return n if type(n) is int else 0, MAX_DIFFS


def _factors(tensors: Any = (), *_: Any, **__: Any) -> Count:
    return len(tensors) if isinstance(tensors, (tuple, list)) else 0, MAX_FACTORS


def _terms(*operands: Any, **_: Any) -> Count:
    return len(avals_in(operands)), MAX_FACTORS


_COUNTS: dict[str, Callable[..., Count]] = {
    **dict.fromkeys(("split", "split_copy", "Tensor.split"), _split),
    "chunk": _chunk,
    **dict.fromkeys(("tensor_split", "hsplit", "vsplit", "dsplit"), _sections),
    **dict.fromkeys(("Tensor.hsplit", "Tensor.vsplit", "Tensor.dsplit"), _sections),
    **dict.fromkeys(("unbind", "unbind_copy"), _unbind),
    "diff": _diff,
    "linalg.multi_dot": _factors,
    "einsum": _terms,
}


# -- memory inside an operation ------------------------------------------------------------------


def inner_bytes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], outcome: Outcome) -> int:
    """Bytes that an operation may need inside: as many as all it makes of its arguments.

    That is the shape to which they are expanded together, or what an operation's own rule says.
    Tensors that are whole in memory count nothing: they are there already.
    """
    if outcome.leaves and all(leaf.alias is not None for leaf in outcome.leaves):
        return 0
    avals = avals_in((args, kwargs))
    width = max([aval.dtype.itemsize for aval in avals], default=0)
    rule = _INNER.get(name)
    if rule is not None:
        return width * rule(args, kwargs, avals)
    most = max([math.prod(aval.shape) for aval in avals], default=0)
    spread = _broadcast(avals)
    return width * max(spread, most) if max(spread, most) > _whole(avals) else 0


def unknown_bytes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes that an operation may make whose result's shape depends on numbers, at most.

    Results of `kernels.own.COUNTED` are not bounded by their arguments: the run looks at those.
    """
    avals = avals_in((args, kwargs))
    if name == "Tensor.__getitem__":
        return avals[0].dtype.itemsize * _picked(avals[0], args[1])
    if name == "bincount":
        least = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
        return 8 * (least if type(least) is int else 0)
    dims = max([len(aval.shape) for aval in avals], default=1)
    most = max([math.prod(aval.shape) for aval in avals], default=0)
    return 8 * max(dims, _RESULTS) * max(most, _broadcast(avals))


def _picked(tensor: Aval, index: Any) -> int:
    """Elements of an indexed tensor, if each mask in the index is true everywhere."""
    items = index if isinstance(index, tuple) else (index,)
    given = [item for item in items if type(item) is Aval]
    masked = sum([len(i.shape) if i.dtype in _MASKS else 1 for i in given])
    rest = tensor.shape[: max(len(tensor.shape) - masked, 0)] if given else tensor.shape
    largest = sorted(tensor.shape, reverse=True)[: len(rest)]
    return math.prod([math.prod(item.shape) for item in given]) * math.prod(largest)


def _whole(avals: list[Aval]) -> int:
    """Elements of the largest argument that has each of its elements in memory."""
    dense = [math.prod(a.shape) for a in avals if 0 not in _steps(a)]
    return max(dense, default=0)


def _steps(aval: Aval) -> list[int]:
    return [step for size, step in zip(aval.shape, aval.stride, strict=True) if size > 1]


def _broadcast(avals: list[Aval]) -> int:
    """Elements of the shape to which arguments expand together; 0 where they do not."""
    rank = max([len(aval.shape) for aval in avals], default=0)
    total = 1
    for place in range(1, rank + 1):
        sizes = {aval.shape[-place] for aval in avals if place <= len(aval.shape)} - {1}
        if len(sizes) > 1:
            return 0
        total *= sizes.pop() if sizes else 1
    return total


def _attention(args: tuple[Any, ...], kwargs: dict[str, Any], avals: list[Aval]) -> int:
    """`q [..., l, e]`, `k [..., s, e]`: the pattern is `[..., l, s]`."""
    query, key = avals[0].shape, avals[1].shape
    return math.prod(query[:-1]) * key[-2]


def _heads(args: tuple[Any, ...], kwargs: dict[str, Any], avals: list[Aval]) -> int:
    heads = args[4] if len(args) > 4 else kwargs.get("num_heads", 1)
    query, key = avals[0].shape, avals[1].shape
    return math.prod(query[:-1]) * key[0] * (heads if type(heads) is int else 1)


def _bilinear(args: tuple[Any, ...], kwargs: dict[str, Any], avals: list[Aval]) -> int:
    return math.prod(avals[0].shape) * avals[1].shape[-1]


def _einsum(args: tuple[Any, ...], kwargs: dict[str, Any], avals: list[Aval]) -> int:
    """Of three operands or more, two may expand to the product of all letters."""
    if len(avals) < 3:
        return max([math.prod(aval.shape) for aval in avals], default=0)
    sizes: dict[str, int] = {}
    rest = 1
    terms = args[0].split("->")[0].replace(" ", "").split(",") if isinstance(args[0], str) else []
    for term, aval in zip(terms, avals, strict=False):
        if "." in term:
            rest = max(rest, math.prod(aval.shape))
        else:
            sizes |= dict(zip(term, aval.shape, strict=False))
    return (
        rest * math.prod(sizes.values())
        if terms
        else math.prod([math.prod(a.shape) for a in avals])
    )


_INNER: dict[str, Callable[[tuple[Any, ...], dict[str, Any], list[Aval]], int]] = {
    "nn.functional.scaled_dot_product_attention": _attention,
    "nn.functional.multi_head_attention_forward": _heads,
    "bilinear": _bilinear,
    "einsum": _einsum,
}
