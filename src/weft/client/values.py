"""Values that a block streams, on their way to whoever listens.

event = ...                               # a `ValueEvent` of a job
(h,) = opened_value(event)                # its tensors are of this process, and nobody else's
listen(event.number, event.stream, (h,))
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch

from weft.errors import MessageError
from weft.graph.node import Log, Ref, refs
from weft.kernels.frames import to_tensor
from weft.wire import frames as files
from weft.wire.messages import ValueEvent
from weft.wire.structures import build

from .results import moved

Listen = Callable[[int, int, tuple[Any, ...]], None]
"""Is told of each value: its number in the run, its stream, and what it is."""


def opened_value(event: ValueEvent, device: torch.device | None = None) -> tuple[Any, ...]:
    """The value of an event. Raises `MessageError`."""
    frames = files.read(event.tensors)[0] if event.tensors else {}
    if {str(ref.node) for ref in refs(event.value)} != frames.keys():
        raise MessageError("a streamed value has other tensors than it speaks of")
    tensors = {name: to_tensor(frame) for name, frame in frames.items()}

    def tensor(ref: Ref) -> Any:
        return tensors[str(ref.node)]

    value = build(event.value, tensor)
    if not isinstance(value, tuple):
        raise MessageError("a streamed value is a tuple")
    return moved(value, device)


def listening(
    listen: Listen | None, device: torch.device | None
) -> Callable[[Log, tuple[Any, ...]], None] | None:
    """What a run in this process tells (`on_value`), for who listens."""
    if listen is None:
        return None
    numbers = count()

    def on_value(node: Log, parts: tuple[Any, ...]) -> None:
        listen(next(numbers), node.stream or 0, moved(parts, device))

    return on_value


def heard(event: ValueEvent, listen: Listen | None, device: torch.device | None) -> None:
    """An event has come from a server."""
    if listen is not None:
        listen(event.number, event.stream, opened_value(event, device))


def single(value: tuple[Any, ...]) -> Any:
    """What a user gets for a value: the one that was streamed, or several as a tuple."""
    return value[0] if len(value) == 1 else value
