"""What a model must be after each job: the same weights, the same buffers, the same attributes.

    with Kept.of(net).job():
        run(graph, constants, net, ...)

A forward may leave traces on its module: dynamic rope rebinds its frequencies and notes the longest
row so far, so that one job would change the next. Afterwards all of that is put back. A weight that
was written in place cannot be: this is a `ServerError`, marked `retire`, for the model is spoilt.

Jobs on one module take turns here. Not watched: what lies in lists and dicts that a module owns.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from weft.errors import ServerError


class SpoiltError(ServerError):
    """A job has changed a weight. `retire`: whoever has this model loaded must not go on."""

    retire = True


class Kept:
    """One module's state. `Kept.of(net)` gives it.

    `stays`: nobody but jobs touches the module, and it lives as long as the process: what was seen
    of it is kept from job to job, which saves walking through it again.
    """

    def __init__(self) -> None:
        self.stays = False
        self._lock = threading.RLock()
        self._copies: dict[int, tuple[torch.Tensor, int, torch.Tensor]] = {}
        self._last: _State | None = None

    @classmethod
    def of(cls, net: nn.Module) -> Kept:
        """The state of a module; one for each."""
        with _MAKING:
            found = _MADE.get(net)
            if found is None:
                found = _MADE[net] = cls()
            return found

    @contextmanager
    def job(self, net: nn.Module) -> Iterator[None]:
        """One job's turn on a module. Raises `SpoiltError` after one that changed a weight."""
        with self._lock:
            before = self._last
            if before is None or not before.whole:
                before = _State(net, self._copies)
            before.begin()
            self._last = before if self.stays else None
            try:
                yield
            finally:
                before.put_back()


_MADE: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()
_MAKING = threading.Lock()


class _State:
    """A module as it stands. Buffers have a copy each, made anew only where they have changed."""

    def __init__(
        self, net: nn.Module, copies: dict[int, tuple[torch.Tensor, int, torch.Tensor]]
    ) -> None:
        self._copies = copies
        self._modules = list(net.modules())
        self._spaces = [space for module in self._modules for space in _spaces(module)]
        self._were = [dict(space) for space in self._spaces]
        self._sizes = list(map(len, self._spaces))
        self._names = [*chain.from_iterable(self._spaces)]
        self._values = [*chain.from_iterable(map(dict.values, self._spaces))]
        self._weights = list(net.parameters())
        self._buffers = {id(buffer): buffer for buffer in net.buffers()}
        self._loud: set[int] = set()
        self.whole = True  # after the last job all names stood for the very same objects
        for gone in copies.keys() - self._buffers.keys():
            del copies[gone]

    def holds(self) -> bool:
        """Whether all names still stand for the very same objects."""
        spaces = self._spaces
        if list(map(len, spaces)) != self._sizes:
            return False
        values = chain.from_iterable(map(dict.values, spaces))
        names = chain.from_iterable(spaces)
        return all(map(is_, values, self._values)) and all(map(is_, names, self._names))

    def begin(self) -> None:
        """Notes what may have changed without a new object."""
        self._versions = list(map(version, self._weights))
        self._loud = _loud_buffers(self._modules)
        for buffer in self._buffers.values():
            self._copy(buffer)

    def _copy(self, buffer: torch.Tensor) -> None:
        known = self._copies.get(id(buffer))
        fresh = known is not None and known[0] is buffer and known[1] == version(buffer)
        if not fresh or id(buffer) in self._loud:
            self._copies[id(buffer)] = (buffer, version(buffer), buffer.detach().clone())

    def put_back(self) -> None:
        self.whole = self.holds()
        if not self.whole:
            for space, was in zip(self._spaces, self._were, strict=True):
                _put_back(space, was)
        for buffer in self._buffers.values():
            self._refill(buffer)
        if list(map(version, self._weights)) != self._versions:
            raise SpoiltError("a job has changed a weight of the model")

    def _refill(self, buffer: torch.Tensor) -> None:
        _, known, copy = self._copies[id(buffer)]
        if version(buffer) != known or id(buffer) in self._loud:
            with torch.no_grad():
                buffer.copy_(copy)
            self._copies[id(buffer)] = (buffer, version(buffer), copy)


def _loud_buffers(modules: list[nn.Module]) -> set[int]:
    """Running statistics that the next forward will change: its kernel tells no version counter."""
    norms = [module for module in modules if isinstance(module, _NormBase) and module.training]
    return {id(buffer) for norm in norms for buffer in norm.buffers(recurse=False)}


def _spaces(module: nn.Module) -> list[dict[str, Any]]:
    return [vars(module), module._parameters, module._buffers, module._modules]  # type: ignore[list-item]


def _put_back(space: dict[str, Any], was: dict[str, Any]) -> None:
    """What is there under a name is again the very object that was; new tensors go.

    Other new attributes stay: they may tell of something that stays too, as `transformers` marks a
    model to which it has added hooks of its own.
    """
    if [*map(id, space.values())] == [*map(id, was.values())] and [*space] == [*was]:
        return
    for name, value in was.items():
        if space.get(name, space) is not value:
            space[name] = value
    for name in [name for name in space if name not in was]:
        if isinstance(space[name], (torch.Tensor, nn.Module)):
            del space[name]


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place (inference tensors do not count)."""
    return 0 if tensor.is_inference() else tensor._version
