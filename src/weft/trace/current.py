"""Which recorder is at work here: one context variable, and one torch function mode per thread.

The mode is what lets a recorder see calls that hold no `Value`: factories with a `Value`'s shape,
and operations on client tensors that the block has written into. It is pushed while at least one
block is open on the thread and passes everything through that does not belong to the block of the
current task. Asyncio tasks may close their blocks in any order, so it is removed from wherever in
the stack it stands; a block that another thread closes (a generator that was dropped there) leaves
it, passive, until the next block of its thread closes.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

if TYPE_CHECKING:
    from .recorder import Recorder

CURRENT: ContextVar[Recorder | None] = ContextVar("weft_recorder", default=None)


def current() -> Recorder | None:
    """The recorder of this task's open block.

    A block that was closed elsewhere does not count, nor one of another thread, whose context
    `asyncio.to_thread` copies.
    """
    recorder = CURRENT.get()
    if recorder is None or not recorder.open or recorder.thread != threading.get_ident():
        return None
    return recorder


class _Watch(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        recorder = current()
        if recorder is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        return recorder.observe(func, types, args, kwargs or {})


class _Thread(threading.local):
    def __init__(self) -> None:
        self.mode = _Watch()
        self.blocks: set[Recorder] = set()


_THREAD = _Thread()


def blocks_here() -> set[Recorder]:
    """The open blocks of this thread."""
    return _THREAD.blocks


def enter_watch(recorder: Recorder, blocks: set[Recorder]) -> None:
    """Starts watching this thread's torch calls, for one more of its `blocks`."""
    blocks.add(recorder)
    if _THREAD.mode not in _get_current_function_mode_stack():
        torch._C._push_on_torch_function_stack(_THREAD.mode)


def leave_watch(blocks: set[Recorder]) -> None:
    """Stops watching when the last of the blocks of this thread has closed."""
    blocks.difference_update([recorder for recorder in tuple(blocks) if not recorder.open])
    if blocks or blocks is not _THREAD.blocks:
        return
    above = []
    while torch._C._len_torch_function_stack():
        top = torch._C._pop_torch_function_stack()
        if top is _THREAD.mode:
            break
        above.append(top)
    for mode in reversed(above):
        torch._C._push_on_torch_function_stack(mode)
