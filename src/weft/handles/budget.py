"""`Budget`: how many points of a sweep may be one block.

What a pass takes for a row is estimated from what the sites look like: a few tensors of the largest
size at any site live at once. It is an estimate: where memory runs out all the same, `shrink` is
called and the points are tried again, fewer at a time.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from weft.engine.merging import LARGEST
from weft.errors import WorkerMemoryError
from weft.families.call import ModelCall
from weft.graph.check import MAX_INVOKES
from weft.settings import Settings

if TYPE_CHECKING:
    from weft.trace.recorder import Recorder

    from .handle import Handle

ELSEWHERE = 2 << 30
"""Bytes of a pass on a server, whose memory is not known here."""

_LIVE = 4
"""How many tensors of the largest size one layer has at once."""

_SHARE = 4
"""Of free memory a pass takes one part in so many."""

_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


class Budget:
    """`points` is the most that one block has: of the user, of the grammar, or after `shrink`."""

    def __init__(self, row: int, rows: int, tokens: int, limit: int, points: int | None) -> None:
        self._row = row
        self._rows = rows
        self._limit = limit
        self._fixed = points is not None
        most = MAX_INVOKES if points is None else min(points, MAX_INVOKES)
        self.points = max(1, min(most, LARGEST // max(rows * tokens, 1)))

    @classmethod
    def of(cls, handle: Handle, call: ModelCall, settings: Settings, points: int | None) -> Budget:
        """The budget for points that are this call. `points` is the user's own number."""
        signature = handle._signatures.for_call(call.args, dict(call.kwargs))
        largest = signature.kept.get("largest tensor")
        if largest is None:
            sites = [signature.site(*key) for key in signature.order]
            sizes = [aval.nbytes for site in sites for _, aval in site.tensors]
            largest = signature.kept["largest tensor"] = max(sizes, default=0)
        limit = settings.sweep_bytes or _free(call)
        return cls(_LIVE * largest, call.batch or 1, call.length or 1, limit, points)

    def is_full(self, count: int, recorder: Recorder) -> bool:
        """Whether a block of `count` points takes no further one."""
        if self._fixed:
            return False
        graph = sum([tensor.nbytes for tensor in recorder.clients.constants.values()])
        graph += _saved(recorder)
        return (count + 1) * self._row + graph * (count + 1) // count > self._limit

    def shrink(self, points: int) -> None:
        """After memory ran out: from now on so many at most."""
        self.points = max(1, points)


def _saved(recorder: Recorder) -> int:
    """Bytes of what is saved so far."""
    records = recorder.saves.records.values()
    return sum([group[0]._aval.nbytes for record in records for group in record.handles])


def _free(call: ModelCall) -> int:
    """A part of the memory that is free where the call runs."""
    devices = [value.device for value in call.kwargs.values() if isinstance(value, torch.Tensor)]
    if devices and devices[0].type == "cuda":
        place = devices[0]
        kept = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        return (torch.cuda.mem_get_info(place)[0] + kept) // _SHARE
    try:
        pages: Any = os.sysconf("SC_AVPHYS_PAGES")
        return pages * os.sysconf("SC_PAGE_SIZE") // _SHARE
    except (ValueError, OSError, AttributeError):  # a system that does not say
        return ELSEWHERE


def is_memory(error: BaseException) -> bool:
    """Whether memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError, WorkerMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _MEMORY)
