"""Containers at a site: real tuples, lists, dicts and ModelOutputs that record assignments.

What a block receives for a site with a structure *is* a tuple (list, dict, ...), with handles as
its tensors. Assigning an item or attribute records a write of that leaf; what cannot be recorded
(`append`, `del`, a new key) raises.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from weft.errors import RecordingError
from weft.graph.site import Leaf
from weft.signatures.structure import take_apart

from .lines import user_line, where

if TYPE_CHECKING:
    from .sites import Sites, SiteState


class Unreadable:
    """Something at a site that is neither tensor nor plain data, such as a cache."""

    def __init__(self, shown: str, kind: str) -> None:
        self._shown = shown
        self._kind = kind

    def __repr__(self) -> str:
        return f"<{self._kind} at {self._shown}, not readable in a block>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RecordingError(
            f"{self._shown} is a {self._kind}; a graph cannot read inside it",
            line=where(user_line()),
            fix="read the tensors at the sites of the modules that made it",
        )


def flatten(structure: Any, leaf: Leaf = ()) -> list[tuple[Leaf, Any]]:
    """`(key path, object)` for every leaf of a structure, in order."""
    _, keys, leaves = take_apart(structure)
    return [((*leaf, *key), item) for key, item in zip(keys, leaves, strict=True)]


def hand_out(structure: Any, site: SiteState, sites: Sites, leaf: Leaf = ()) -> Any:
    """`structure` with its containers replaced by recording ones of the same kind."""
    if isinstance(structure, dict):
        for key in list(structure):
            item = hand_out(dict.__getitem__(structure, key), site, sites, (*leaf, key))
            dict.__setitem__(structure, key, item)
            if hasattr(structure, "__dict__") and key in structure.__dict__:
                structure.__dict__[key] = item
        return _remember(_become(structure, _recording_dict), site, sites, leaf)
    if isinstance(structure, tuple) and not isinstance(structure, torch.Size):
        items = [hand_out(v, site, sites, (*leaf, i)) for i, v in enumerate(structure)]
        if type(structure).__module__ == "torch.return_types":  # no class can derive from these
            return type(structure)(items)
        made = _recording_tuple(type(structure))
        return _remember(tuple.__new__(made, items), site, sites, leaf)
    if isinstance(structure, list):
        items = [hand_out(v, site, sites, (*leaf, i)) for i, v in enumerate(structure)]
        return _remember(_List(items), site, sites, leaf)
    if dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        for field in dataclasses.fields(structure):
            item = getattr(structure, field.name)
            object.__setattr__(
                structure, field.name, hand_out(item, site, sites, (*leaf, field.name))
            )
        return _remember(_become(structure, _recording_object), site, sites, leaf)
    return structure


def _remember(container: Any, site: SiteState, sites: Sites, leaf: Leaf) -> Any:
    object.__setattr__(container, "_weft", (site, sites, leaf))
    return container


def _assign(container: Any, key: Any, value: Any) -> None:
    """Records `container[key] = value` as writes of the leaves below."""
    site, sites, leaf = object.__getattribute__(container, "_weft")
    if not isinstance(key, (int, str)):
        _refuse(container, "an assignment to a slice")
    if isinstance(container, (tuple, list)) and isinstance(key, int) and key < 0:
        key += len(container)
    target: Leaf = (*leaf, key)
    for below, item in flatten(value, target):
        state = site.tensors.get(below)
        if state is None:
            old = dict(flatten(_item(container, key), target)).get(below, _refuse)
            if old is item or (old is not _refuse and old == item):
                continue
            _refuse(container, f"an assignment to {key!r}, which is not a tensor there")
        else:
            sites.write_leaf(state, item)


def _item(container: Any, key: Any) -> Any:
    try:
        return getattr(container, key) if dataclasses.is_dataclass(container) else container[key]
    except (LookupError, AttributeError):
        return None


def _refuse(container: Any, what: str) -> NoReturn:
    site = object.__getattribute__(container, "_weft")[0]
    raise RecordingError(
        f"{what} of the container at {site.site} cannot be recorded",
        line=where(user_line()),
        fix="assign a tensor to an existing item, or write the whole structure to the site",
    )


class _Saved:
    def save(self, name: str | None = None) -> Any:
        """As `weft.save`: all values in it, frozen as of this line. Returns itself."""
        return self._weft[1].recorder.saves.tree(self, name)  # type: ignore[attr-defined]


class _Recording(_Saved):
    """Item assignment that records; everything else that would change the container raises."""

    def __setitem__(self, key: Any, value: Any) -> None:
        _assign(self, key, value)
        self._put(key, value)

    def _put(self, key: Any, value: Any) -> None:
        """Keeps what was assigned in this handed-out container too, where it can change."""

    def __delitem__(self, key: Any) -> None:
        _refuse(self, "deleting an item")


class _List(_Recording, list):
    def _put(self, key: Any, value: Any) -> None:
        list.__setitem__(self, key, value)

    def append(self, *_: Any) -> Any:
        _refuse(self, "a change of length")

    extend = insert = pop = remove = clear = reverse = sort = __iadd__ = append  # type: ignore[assignment]


class _Object(_Saved):
    def __setattr__(self, name: str, value: Any) -> None:
        _assign(self, name, value)
        object.__setattr__(self, name, value)


class _Dict(_Recording):
    def _put(self, key: Any, value: Any) -> None:
        dict.__setitem__(self, key, value)  # type: ignore[arg-type]
        if key in self.__dict__:
            self.__dict__[key] = value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self:  # type: ignore[operator]
            self[name] = value
        else:
            _refuse(self, f"the new attribute {name!r}")

    def update(self, *_: Any, **__: Any) -> Any:
        _refuse(self, "update")

    pop = popitem = clear = setdefault = update


_CLASSES: dict[tuple[type, type], type] = {}


def _class(kind: type, mixin: type) -> type:
    found = _CLASSES.get((kind, mixin))
    if found is None:
        # `type.__new__` without kind's __init_subclass__: ModelOutput registers subclasses globally
        body = {"__init_subclass__": classmethod(lambda cls, **_: None)}
        silent = type("_Silent", (mixin,), body)
        found = _CLASSES[kind, mixin] = type(kind.__name__, (silent, kind), {})
    return found


def _recording_tuple(kind: type) -> type:
    return _class(kind, _Recording)


def _recording_dict(kind: type) -> type:
    return _class(kind, _Dict)


def _recording_object(kind: type) -> type:
    return _class(kind, _Object)


def _become(structure: Any, maker: Any) -> Any:
    """Gives a container the recording subclass of its own class."""
    kind = type(structure)
    if kind is dict:
        return maker(dict)(structure)
    object.__setattr__(structure, "__class__", maker(kind))
    return structure
