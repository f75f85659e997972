"""Passes that also tell of the operations inside forwards: what each is given and what it gives.

    telling = Telling(digest, ("attention_interface_0",), note)
    learn(module, args, kwargs, device, telling=telling)     # a `Table` with their sites, too

Told are the operations of every module whose forward has the source of this hash, so that all
layers of a model are learnt at once, and those on the way given, inside the functions that are
called there. `note(path, operations, function)` hears what each calls.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from weft.errors import SourceError
from weft.graph.site import inside_of
from weft.sources.source import source_of
from weft.sources.stand import NOTHING, Ask, forward_of, stand_down, stand_in

from .structure import items_of, tensors_inside

Way = tuple[str, ...]
Event = Callable[[str, str, int, Any], None]
Note = Callable[[str, Way, Any], None]


def digest_of(module: nn.Module) -> str | None:
    """The hash of the source of a module's forward; None where it has none."""
    try:
        return source_of(forward_of(module)).digest
    except SourceError:
        return None


class Telling:
    """What a pass is to tell beside the sites of modules."""

    def __init__(self, digest: str, way: Way, note: Note) -> None:
        self.digest = digest
        self.way = way
        self.note = note

    @contextmanager
    def heard(self, root: nn.Module, event: Event) -> Iterator[None]:
        """While this is open, `event` hears of each operation, on this thread."""
        standing: list[tuple[nn.Module, Ask]] = []
        try:
            for path, module in root.named_modules():
                if digest_of(module) == self.digest:
                    ask = _Teller(self, path, event).ask
                    stand_in(module, ask)
                    standing.append((module, ask))
            yield
        finally:
            for one in standing:
                stand_down(*one)


class _Teller:
    """One module's operations in one pass."""

    def __init__(self, telling: Telling, path: str, event: Event) -> None:
        self.telling = telling
        self.path = path
        self.event = event
        self.counts: Counter[Way] = Counter()
        self.thread = threading.get_ident()

    def ask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return NOTHING
        return self.copied(forward_of(module), ())(*args, **kwargs)

    def copied(self, function: Any, way: Way) -> Any:
        """The function with its operations told."""

        def told(name: str, called: Any, /, *args: Any, **kwargs: Any) -> Any:
            return self.told((*way, name), called, args, kwargs)

        return source_of(function).copied(function, told)

    def told(self, names: Way, called: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return called(*args, **kwargs)
        number, port = self.counts[names], inside_of(names)
        self.counts[names] += 1
        if not number:
            self.telling.note(self.path, names, called)
        self.event(self.path, f"{port}inputs", number, veiled((args, kwargs)))
        if self.telling.way[: len(names)] == names:
            called = self._deeper(called, names)
        result = called(*args, **kwargs)
        self.event(self.path, f"{port}output", number, veiled(result))
        return result

    def _deeper(self, called: Any, names: Way) -> Any:
        try:
            return self.copied(called, names)
        except SourceError:
            return called  # in this module it is something else


class _Veil:
    """Stands for something that is no part of a site: only its kind is told."""


def veiled(value: Any) -> Any:
    """What an operation is given or gives, with tensors, numbers and containers only.

    Texts may be anything (a setting of the machine, the name of a file), and so may configurations:
    neither leaves the process by way of a signature, and no block can read them.
    """
    if isinstance(value, torch.Tensor) or value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        items = [veiled(item) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        made = getattr(type(value), "_make", type(value))
        return made(items)
    if type(value) is dict and items_of(value) is not None:
        return {key: veiled(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not tensors_inside(value):
        return _veil(value)
    return value if items_of(value) is not None else _veil(value)


def _veil(value: Any) -> Any:
    return type(type(value).__qualname__, (_Veil,), {})()


def plain_function(called: Any) -> FunctionType | str:
    """The function of Python behind what was called, or in words why there is none."""
    if isinstance(called, nn.Module):
        return "it is a module of the model: use that module's own source"
    if isinstance(called, MethodType):
        called = called.__func__
    if isinstance(called, FunctionType):
        return called
    return "it is no function of Python"
