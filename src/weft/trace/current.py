"""Which recorder is at work here: one context variable, and one torch function mode per thread.

The mode is what lets a recorder see calls that hold no `Value`: factories with a `Value`'s shape,
and operations on client tensors that the block has written into. It is pushed while at least one
block is open on the thread and passes everything through that does not belong to the block of the
current task. Asyncio tasks may close their blocks in any order, so it is removed from wherever in
the stack it stands.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from .recorder import Recorder

CURRENT: ContextVar[Recorder | None] = ContextVar("weft_recorder", default=None)


class _Watch(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        recorder = CURRENT.get()
        if recorder is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        return recorder.observe(func, types, args, kwargs or {})


class _Thread(threading.local):
    def __init__(self) -> None:
        self.mode = _Watch()
        self.blocks = 0


_THREAD = _Thread()


def enter_watch() -> None:
    """Starts watching this thread's torch calls (counted)."""
    if _THREAD.blocks == 0:
        torch._C._push_on_torch_function_stack(_THREAD.mode)
    _THREAD.blocks += 1


def leave_watch() -> None:
    """Stops watching when the last open block of this thread closes."""
    _THREAD.blocks -= 1
    if _THREAD.blocks:
        return
    above = []
    while torch._C._len_torch_function_stack():
        top = torch._C._pop_torch_function_stack()
        if top is _THREAD.mode:
            break
        above.append(top)
    for mode in reversed(above):
        torch._C._push_on_torch_function_stack(mode)
