"""Structures: what a module takes and returns, and the tensors at their leaves.

A structure is a tensor, or tuples, lists, mappings and dataclasses of structures; a leaf is the
path of keys to one tensor in it. Nothing here changes a structure: `replaced` makes shallow copies
along the path and keeps every Python type (named tuples, a `ModelOutput`, a dataclass).

    replaced((hidden, None), (0,), edited)    # (edited, None)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch

from weft.graph.site import Leaf

MISSING: Any = object()


def at(structure: Any, leaf: Leaf) -> Any:
    """What stands at a leaf, or `MISSING`."""
    for key in leaf:
        structure = _child(structure, key)
        if structure is MISSING:
            return MISSING
    return structure


def _child(node: Any, key: str | int) -> Any:
    if isinstance(node, (tuple, list)):
        if isinstance(key, int) and -len(node) <= key < len(node):
            return node[key]
        return MISSING
    if isinstance(node, Mapping):
        return node.get(key, MISSING)
    if is_dataclass(node) and isinstance(key, str):
        return getattr(node, key, MISSING)
    return MISSING


def replaced(structure: Any, leaf: Leaf, value: Any) -> Any:
    """The structure with another value at a leaf."""
    if not leaf:
        return value
    key, rest = leaf[0], leaf[1:]
    return _with_child(structure, key, replaced(_child(structure, key), rest, value))


def _with_child(node: Any, key: Any, value: Any) -> Any:
    if isinstance(node, tuple):
        items = [*node]
        items[key] = value
        return _retuple(node, items)
    twin = copy.copy(node)
    if isinstance(node, (list, Mapping)):
        twin[key] = value
    else:
        object.__setattr__(twin, key, value)  # a dataclass may be frozen
    return twin


def _retuple(node: tuple, items: list) -> tuple:
    kind = type(node)
    if kind is tuple:
        return tuple(items)
    make = getattr(kind, "_make", kind)  # a named tuple takes its fields one by one
    return make(items)


def tensors(structure: Any) -> Iterator[torch.Tensor]:
    """Every tensor in tuples, lists and mappings."""
    if isinstance(structure, torch.Tensor):
        yield structure
    elif isinstance(structure, (tuple, list)):
        for item in structure:
            yield from tensors(item)
    elif isinstance(structure, Mapping):
        for item in structure.values():
            yield from tensors(item)


def mapped(structure: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The structure with every tensor in tuples, lists and mappings changed."""
    if isinstance(structure, torch.Tensor):
        return change(structure)
    if isinstance(structure, tuple):
        return _retuple(structure, [mapped(item, change) for item in structure])
    if isinstance(structure, list):
        return [mapped(item, change) for item in structure]
    if isinstance(structure, Mapping):
        twin: Any = copy.copy(structure)
        for key, item in structure.items():
            twin[key] = mapped(item, change)
        return twin
    return structure
