"""The structure of a result: which tensors it holds, and in what.

    tree = tree_of(torch.topk(x, 2))     # Many(torch.return_types.topk, (TENSOR, TENSOR))
    rebuild(tree, [values, indices])     # torch.return_types.topk(values, indices)

The tensors of a result are numbered depth first: `flatten` and `rebuild` agree on that order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor


class Many(NamedTuple):
    """A container in a result."""

    make: Callable[[list[Any]], Any]
    items: tuple[Tree, ...]


class Plain(NamedTuple):
    """A part of a result that holds no tensor."""

    value: Any


TENSOR = "tensor"
Tree = str | Many | Plain


def rebuild(tree: Tree, values: list[Any] | tuple[Any, ...]) -> Any:
    """The structure that the function returned, with `values` in place of its tensors."""
    if tree is TENSOR:
        return values[0]
    return _build(tree, iter(values))


def _build(tree: Tree, values: Iterator[Any]) -> Any:
    if isinstance(tree, Many):
        return tree.make([_build(item, values) for item in tree.items])
    return tree.value if isinstance(tree, Plain) else next(values)


def flatten(result: Any) -> list[Tensor]:
    """The tensors of a result, in the order of `Outcome.leaves`."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [tensor for item in result for tensor in flatten(item)]
    return []


def tree_of(result: Any) -> Tree:
    """The structure of a result, for `rebuild`."""
    if isinstance(result, Tensor):
        return TENSOR
    if isinstance(result, (tuple, list)) and flatten(result):
        return Many(_maker(type(result)), tuple(tree_of(item) for item in result))
    return Plain(result)


def _maker(kind: type) -> Callable[[list[Any]], Any]:
    """How to make a container of this type from a list; named tuples keep their names."""
    if kind is list:
        return list
    return (lambda items: kind(*items)) if hasattr(kind, "_make") else kind
