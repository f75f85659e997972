"""Structures: what a module takes and gives, taken apart into leaves and put together again.

`take_apart(x)` gives the shape of the containers (a `Tree`, plain hashable data) and the leaves
with their key paths; `put_together(tree, values)` makes containers of the same classes around other
leaves. Containers are tuples, lists, dicts (a ModelOutput is one) and dataclasses, as the recorder
sees them; everything else is one leaf.

    tree, keys, leaves = take_apart((h, {"mask": None}))
    keys                                    # [(0,), (1, "mask")]
    put_together(tree, [g, None])           # (g, {"mask": None})
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch.utils import _pytree

from weft.graph.site import Leaf
from weft.kernels.aval import aval_of

# None is a leaf, otherwise (kind, keys, children); kind is `tuple`, `list`, `dict` or a class.
Tree = tuple[str, tuple, tuple] | None

PLAIN = (type(None), bool, int, float, str)

# Classes met so far, by "module:name". Filled when an object of the class is taken apart.
_KINDS: dict[str, type] = {"tuple": tuple, "list": list, "dict": dict}


@dataclasses.dataclass(frozen=True, slots=True)
class Plain:
    """A leaf that is a plain value: None, bool, int, float or str."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return (
            type(other) is Plain
            and type(self.value) is type(other.value)
            and self.value == other.value
        )

    def __hash__(self) -> int:
        return hash((type(self.value), self.value))


@dataclasses.dataclass(frozen=True, slots=True)
class Opaque:
    """A leaf that is neither a tensor nor plain data, such as a cache; `kind` names its class."""

    kind: str

    def __str__(self) -> str:
        return self.kind


class Record(dict):
    """Stands for a class that is not known here (a signature from elsewhere): a dict with
    attributes, whose integer indices count the values, as in a ModelOutput."""

    def __getattr__(self, name: str) -> Any:
        try:
            return dict.__getitem__(self, name)
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, slice)):
            return tuple(self.values())[key]
        return dict.__getitem__(self, key)


def abstract(leaf: object) -> Any:
    """The leaf without its numbers: an `Aval`, `Plain` or `Opaque`."""
    if isinstance(leaf, torch.Tensor):
        if leaf.layout is torch.strided and not leaf.is_quantized:
            return aval_of(leaf)
    elif type(leaf) in PLAIN:
        return Plain(leaf)
    return Opaque(type(leaf).__qualname__)


def take_apart(value: Any) -> tuple[Tree, list[Leaf], list[Any]]:
    """(tree, key paths, leaves) of a structure."""
    keys: list[Leaf] = []
    leaves: list[Any] = []
    return _take(value, (), keys, leaves), keys, leaves


def _take(value: Any, at: Leaf, keys: list[Leaf], leaves: list[Any]) -> Tree:
    items = items_of(value)
    if items is None:
        keys.append(at)
        leaves.append(value)
        return None
    children = tuple([_take(item, (*at, key), keys, leaves) for key, item in items])
    return _kind(type(value)), tuple([key for key, _ in items]), children


def items_of(value: Any) -> list[tuple[Any, Any]] | None:
    """The (key, item) pairs of a container; None for a leaf."""
    if isinstance(value, dict):
        plain = all(type(key) in (str, int) for key in value)
        return list(value.items()) if plain else None
    if isinstance(value, (tuple, list)):
        return None if isinstance(value, torch.Size) else list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def _kind(cls: type) -> str:
    if cls is tuple or cls is list or cls is dict:
        return cls.__name__
    kind = f"{cls.__module__}:{cls.__qualname__}"
    _KINDS[kind] = cls
    return kind


def tensors_inside(value: Any) -> list[torch.Tensor]:
    """The tensors that an opaque object holds, such as a cache: in attributes, lists and dicts."""
    found: dict[int, torch.Tensor] = {}
    seen: set[int] = set()
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, torch.Tensor):
            found[id(item)] = item
        elif type(item) not in PLAIN and id(item) not in seen:
            seen.add(id(item))
            if isinstance(item, dict):
                todo += item.values()
            elif isinstance(item, (tuple, list, set)):
                todo += item
            elif not isinstance(item, type):
                todo.append(getattr(item, "__dict__", None))
    return list(found.values())


def put_together(tree: Tree, values: Any) -> Any:
    """The structure `tree` with `values` as its leaves, in order."""
    return _put(tree, iter(values))


def _put(tree: Tree, values: Any) -> Any:
    if tree is None:
        return next(values)
    kind, keys, children = tree
    items = [_put(child, values) for child in children]
    if kind == "tuple":
        return tuple(items)
    if kind == "list":
        return items
    if kind == "dict":
        return dict(zip(keys, items, strict=True))
    return _make(_class(kind), keys, items)


def _make(cls: Any, keys: tuple, items: list) -> Any:
    if issubclass(cls, tuple):
        # a namedtuple takes its fields one by one, torch.return_types a sequence
        return cls(*items) if hasattr(cls, "_fields") else cls(items)
    if issubclass(cls, list):
        return cls(items)
    pairs = zip(keys, items, strict=True)
    if issubclass(cls, dict) and hasattr(cls, "__dataclass_fields__"):
        return cls(**dict(pairs))  # a ModelOutput keeps its items twice
    made = cls.__new__(cls)
    if issubclass(cls, dict):
        made.update(pairs)
        return made
    for key, item in pairs:
        object.__setattr__(made, key, item)
    return made


def _class(kind: str) -> type:
    """The class of this name if it is known here. Never imports: names may come from elsewhere."""
    found = _KINDS.get(kind)
    if found is None:
        module, _, name = kind.partition(":")
        found = getattr(sys.modules.get(module), name, None)
        if not (isinstance(found, type) and found in _pytree.SUPPORTED_NODES):
            return Record
        _KINDS[kind] = found
    return found
