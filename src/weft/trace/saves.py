"""Saves: which handles become tensors after the run, and how.

`torch.utils.swap_tensors` exchanges a handle with the real tensor, in place: the user's own
variable becomes a plain `torch.Tensor`. A handle that cannot be swapped (a weak reference to it
exists, or a live view of it) forwards to the real tensor instead.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any
from weakref import getweakrefcount

import torch

from weft.graph.node import Arg, Map, Ref, Save, Seq

from .value import Value

_ONLY_OURS = 3
"""References to a receiver that nobody kept: the group, the loop variable, the count's argument."""

if TYPE_CHECKING:
    from .clients import Client
    from .recorder import Recorder


class _Record:
    """One name: the node's handles, and the container that the user sees under this name."""

    __slots__ = ("arg", "container", "handles", "keys")

    def __init__(self, handles: list[list[Value]], container: Any, arg: Arg) -> None:
        self.arg = arg
        self.handles = handles
        self.container = container
        self.keys: set[int] = {id(value) for group in handles for value in group}


class Saves:
    """The saves of one recording."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.records: dict[str, _Record] = {}
        self.backs: dict[str, Client] = {}
        self.ordinals: dict[str, int] = {}
        self.groups: dict[int, list[Value]] = {}  # by the id of a receiver: where it is filled
        self.time = -1

    def value(self, value: Value, name: str | None) -> Value:
        """`value.save()`: a fresh handle, frozen at this version; the receiver ends as it too."""
        name = self._name(name)
        at = self.recorder.here()
        self.recorder.append(Save(name=name, value=value._ref, at=at))
        self.seen(value)
        handle = self.recorder.handle(value)
        self._forget(value)
        group = self.groups[id(value)] = [handle, value]
        self.records[name] = _Record([group], handle, value._ref)
        return handle

    def tree(self, container: Any, name: str | None) -> Any:
        """`weft.save(container)`: every value in a list, tuple or dict.

        A list or dict is saved as it is when the block ends; what it holds now is frozen now.
        """
        name = self._name(name)
        handles: list[list[Value]] = []
        arg = self._lower(container, handles)
        self.recorder.append(Save(name=name, value=arg, at=self.recorder.here()))
        self.records[name] = _Record(handles, container, arg)
        return container

    def reserve(self, name: str | None, stem: str) -> str:
        """A name for a save that is recorded later; `stem`, or the next of its kind, for None."""
        if name is None:
            name, number = stem, 2
            while name in self.records:
                name, number = f"{stem}.{number}", number + 1
        else:
            name = self._name(name)
        self.records[name] = _Record([], None, None)
        return name

    def close(self) -> None:
        """At the end of the block: what lists gained since, and client tensors written into."""
        for name, record in list(self.records.items()):
            new: list[list[Value]] = []
            _values_in(record.container, new)
            fresh = [group for group in new if id(group[0]) not in record.keys]
            if fresh:
                for group in fresh:
                    self.seen(self.recorder.own(group[0]))
                items = Seq("list", tuple([group[0]._ref for group in fresh]))
                self.recorder.append(Save(name=f"{name}+", value=items))
                self.records[f"{name}+"] = _Record(fresh, None, items)
        for number, client in enumerate(self.recorder.clients.dirty.values()):
            name = f"<{number}"
            self.recorder.append(Save(name=name, value=client._ref, at=client._at))
            self.backs[name] = client
            self.seen(client)

    def deliver(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Fills every handle; returns what the user saved, by name."""
        for name, record in self.records.items():
            tensors: list[torch.Tensor | None] = []
            _tensors_in(record.arg, saved.get(name), tensors)
            for group, tensor in zip(record.handles, tensors, strict=True):
                if tensor is None:
                    _miss(group)
                    continue
                for place in range(len(group)):
                    handle = group[place]
                    if place == 0 or sys.getrefcount(handle) > _ONLY_OURS:
                        _fill(handle, tensor)
        clients = self.recorder.clients
        for name, client in self.backs.items():
            if name in saved:
                clients.give_back(client, saved[name])
        clients.settle()
        results = {n: r.container for n, r in self.records.items() if r.container is not None}
        if self.recorder.stops or self.recorder.steps is not None:
            results = {name: kept for name, kept in results.items() if not _is_missed(kept)}
        self.groups.clear()
        self.records.clear()  # a handle that the user keeps leads here, and must not keep results
        self.backs.clear()
        return results

    def seen(self, value: Any) -> None:
        """Keeps the firing index of the latest site that a save needs."""
        self.time = max(self.time, value._time, value._family.time)

    def _name(self, name: str | None) -> str:
        if name is None:
            stem = f"line {self.recorder.line()[1]}"
            ordinal = self.ordinals[stem] = self.ordinals.get(stem, 0) + 1
            name = stem if ordinal == 1 else f"{stem}.{ordinal}"
            if name in self.records:  # a user's own name
                return self._name(None)
        elif not isinstance(name, str) or not name or name[-1] == "+" or name[0] == "<":
            raise self.recorder.refusal(
                f"{name!r} cannot name a save",
                "use a text that is not empty, does not begin with '<' and does not end with '+'",
            )
        elif name in self.records:
            raise self.recorder.refusal(f"two saves are named {name!r}", "give each its own name")
        return name

    def _forget(self, value: Value) -> None:
        """Takes `value` out of earlier saves: it ends as the version that it saved last."""
        group = self.groups.pop(id(value), None)
        if group is not None:
            group[:] = [handle for handle in group if handle is not value]

    def _lower(self, item: Any, handles: list[list[Value]]) -> Arg:
        if isinstance(item, Value):
            if not isinstance(self.recorder.own(item), Value):  # an earlier block has filled it
                item.save()
                return None
            self._forget(item)
            group = self.groups[id(item)] = [item]
            handles.append(group)
            self.seen(item)
            return item._ref
        if isinstance(item, (list, tuple)):
            form = "list" if isinstance(item, list) else "tuple"
            return Seq(form, tuple([self._lower(one, handles) for one in item]))
        if isinstance(item, dict):
            values = tuple([self._lower(one, handles) for one in item.values()])
            return Map(tuple([str(key) for key in item]), values)
        return None


def _values_in(item: Any, found: list[list[Value]]) -> None:
    if isinstance(item, Value) and item._real is None and item._away is None:
        found.append([item])
    elif isinstance(item, Value):  # filled by an earlier block of this session
        item.save()
    elif isinstance(item, (list, tuple)):
        for one in item:
            _values_in(one, found)
    elif isinstance(item, dict):
        _values_in(list(item.values()), found)


def _tensors_in(arg: Arg, item: Any, found: list[torch.Tensor | None]) -> None:
    """The tensors of a save, in the order of its handles; None for what was not reached."""
    if isinstance(arg, Ref):
        found.append(item if isinstance(item, torch.Tensor) else None)
    elif isinstance(arg, Seq):
        items = item if isinstance(item, (list, tuple)) else (None,) * len(arg.items)
        for one, part in zip(arg.items, items, strict=True):
            _tensors_in(one, part, found)
    elif isinstance(arg, Map):
        items = item.values() if isinstance(item, dict) else (None,) * len(arg.values)
        for one, part in zip(arg.values, items, strict=True):
            _tensors_in(one, part, found)


def _miss(group: list[Value]) -> None:
    """Marks handles on what was not reached."""
    for handle in group:
        if type(handle) is Value:
            handle._missed = True


def _is_missed(item: Any) -> bool:
    """Whether nothing of a save was reached. Lists in it keep what was."""
    if isinstance(item, list):
        item[:] = [one for one in item if not _is_missed(one)]
    elif isinstance(item, (tuple, dict)):
        for one in item.values() if isinstance(item, dict) else item:
            _is_missed(one)
    return isinstance(item, Value) and item._missed


def _fill(handle: Value, tensor: torch.Tensor) -> None:
    if type(handle) is not Value:
        return
    try:
        with torch.enable_grad():  # of a run that kept what autograd knows
            _swap(handle, tensor.view_as(tensor) if tensor.requires_grad else tensor.detach())
    except RuntimeError:
        handle._real = tensor


def _swap(handle: Value, tensor: torch.Tensor) -> None:
    """`torch.utils.swap_tensors` for what these two are: a handle, and a tensor nobody else has."""
    if getweakrefcount(handle):
        raise RuntimeError("a weak reference to the handle exists")
    torch._C._swap_tensor_impl(handle, tensor)  # raises where a live view shares the handle
    vars(handle).clear()
    handle.__class__ = torch.Tensor  # type: ignore[assignment]
