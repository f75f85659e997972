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
from collections import OrderedDict
from typing import Any

import torch

from weft.graph.site import Leaf
from weft.kernels.aval import aval_of

# None is a leaf, otherwise (kind, keys, children); kind is `tuple`, `list`, `dict` or a class.
Tree = tuple[str, tuple, tuple] | None

PLAIN = (type(None), bool, int, float, str)

# Classes met so far, by "module:name". Filled when an object of the class is taken apart.
_KINDS: dict[str, type] = {"collections:OrderedDict": OrderedDict}


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
    if _KINDS.get(kind) is not cls:
        _KINDS[kind] = cls
        _FITTING.clear()
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
    return _make(_class(kind, keys), keys, items)


def _make(cls: Any, keys: tuple, items: list) -> Any:
    if issubclass(cls, tuple):
        # of a namedtuple, so that no code of its own runs; torch.return_types have their own `new`
        return tuple.__new__(cls, items) if hasattr(cls, "_fields") else cls(items)
    if issubclass(cls, list):
        return cls(items)
    pairs = zip(keys, items, strict=True)
    if issubclass(cls, dict) and hasattr(cls, "__dataclass_fields__"):
        return cls(**dict(pairs))  # a ModelOutput keeps its items twice
    if issubclass(cls, dict):
        made = cls.__new__(cls)
        made.update(pairs)
        return made
    made = object.__new__(cls)
    for key, item in pairs:
        object.__setattr__(made, key, item)
    return made


def _class(kind: str, keys: tuple) -> type:
    """The class of this name if it is known here and can have these keys, else what stands in."""
    found = _FITTING.get((kind, keys))
    if found is not None:
        return found
    cls = _KINDS.get(kind) or _imported(kind)
    if cls is None or not _fits(cls, keys):
        return tuple if keys == tuple(range(len(keys))) else Record
    if len(_FITTING) >= 4096:
        _FITTING.clear()
    _FITTING[kind, keys] = cls
    return cls


_FITTING: dict[tuple[str, tuple], type] = {}


def _fits(cls: Any, keys: tuple) -> bool:
    if issubclass(cls, tuple):
        return len(keys) == len(getattr(cls, "_fields", keys))
    if dataclasses.is_dataclass(cls):
        names = tuple([field.name for field in dataclasses.fields(cls)])
        return set(keys) <= {*names} if hasattr(cls, "keys") else keys == names
    return True


def _imported(kind: str) -> type | None:
    """A class of containers that is here though none was taken apart yet. Never imports anything:
    also a look at a module that loads its parts when asked would."""
    module, _, name = kind.partition(":")
    home = sys.modules.get(module)
    found = None if home is None else vars(home).get(name)
    if not isinstance(found, type):
        return None
    return found if module == "torch.return_types" or _is_model_output(found) else None


def _is_model_output(cls: type) -> bool:
    """Whether it is one of the results of `transformers`, whose making does nothing else."""
    home = sys.modules.get("transformers.utils.generic")
    base = None if home is None else vars(home).get("ModelOutput")
    own = cls.__module__.startswith("transformers.")
    return own and isinstance(base, type) and issubclass(cls, base)


# -- trees from elsewhere ------------------------------------------------------------------------

_STRANGE = "?"  # stands before a kind that is not to be looked up


def foreign(kind: str) -> str:
    """The kind of a container as it may stand in a tree that was sent here.

    A sender may name any class. Only those whose making runs nobody's code are made: dataclasses
    and named tuples that were taken apart in this process, results of `transformers` and PyTorch.
    Anything else becomes a `Record`, or a tuple.
    """
    if kind in ("tuple", "list", "dict", "collections:OrderedDict"):
        return kind
    cls = _KINDS.get(kind) or _imported(kind)
    return kind if cls is not None and _is_harmless(cls) else _STRANGE + kind


def native(kind: str) -> str:
    """The reverse of `foreign`."""
    return kind.removeprefix(_STRANGE)


def _is_harmless(cls: type) -> bool:
    if issubclass(cls, dict):
        return _is_model_output(cls)
    if issubclass(cls, tuple):
        return hasattr(cls, "_fields") or cls.__module__ == "torch.return_types"
    return dataclasses.is_dataclass(cls) and not issubclass(cls, list)
