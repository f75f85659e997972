"""How much memory a worker has for jobs, as measured: now, and at the most.

    space = Spaces(ledger, "tiny", torch.device("cpu"))
    space.now()                            # Space(free=..., most=...), or None: nobody knows
    space.check(job)                       # raises WorkerMemoryError where it can never fit

A job is claimed when its priced peak fits into what is free; one that does not fit now waits, and
one that would not fit into an idle worker is refused. On a GPU it is the GPU's memory that counts;
else the least of the machine's, of the container's and of the process's own limit. Where the system
does not tell (it is no Linux), nothing is held to it. Not counted is what the model's own pass
takes on the way; a tenth is kept for that.
"""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from weft.service.jobs.life import Job
from weft.service.store.interface import Ledger
from weft.service.store.said import check_space
from weft.service.store.usage import Space

SHARE = 0.9
"""So much of what is measured is for jobs."""
FRESH = 0.05
"""A measure may be so many seconds old."""
SECONDS = 5.0
"""What is measured is published so often at most, where it is not much different."""
_CGROUP = Path("/sys/fs/cgroup")


class Measured(NamedTuple):
    """Bytes: what can be had now, and what could if nobody else took any."""

    free: int
    most: int


class Spaces:
    """See the module's text."""

    def __init__(
        self,
        ledger: Ledger,
        model: str,
        device: torch.device,
        *,
        measure: Callable[[torch.device], Measured | None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._ledger = ledger
        self._model = model
        self._device = device
        self._measure = measure or measured
        self._clock = clock
        self._told: Space | None = None
        self._last: tuple[float, Measured | None] = (-1.0, None)

    def now(self) -> Measured | None:
        """What there is for jobs; published for whoever decides about them."""
        at, last = self._last
        if 0 <= time.monotonic() - at < FRESH:
            return last
        found = self._measure(self._device)
        if found is not None:
            before = 0 if self._told is None else self._told.most
            found = Measured(int(SHARE * found.free), max(before, int(SHARE * found.most)))
            self._publish(found)
        self._last = time.monotonic(), found
        return found

    def _publish(self, found: Measured) -> None:
        if self._is_news(found):
            self._told = Space(self._model, *found, self._clock())
            self._ledger.put_space(self._told)

    def _is_news(self, found: Measured) -> bool:
        told = self._told
        if told is None or found.most > told.most:
            return True
        moved = abs(found.free - told.free) > (1 - SHARE) * told.free
        return moved and self._clock() - told.measured >= SECONDS

    def check(self, job: Job) -> None:
        """Raises `WorkerMemoryError` for a job that no waiting would help."""
        if self._told is not None:
            check_space(self._told, job.peak)


# -- measuring -------------------------------------------------------------------------------------


def measured(device: torch.device) -> Measured | None:
    """Of the device, or of this process on its machine. None where the system does not tell."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_allocated(device)
        held = torch.cuda.memory_reserved(device)  # of which what is not used is free for us
        return Measured(free + held - used, total - used)
    found = [one for one in (_machine(), _container(), _process()) if one is not None]
    own = _own_bytes()
    if not found or own is None:
        return None
    return Measured(min(one.free for one in found), min(one.most for one in found) - own)


def _machine() -> Measured | None:
    try:
        told = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    sizes = dict(re.findall(r"^(\w+): +(\d+) kB", told, re.M))
    if not {"MemAvailable", "MemTotal"} <= sizes.keys():
        return None
    return Measured(int(sizes["MemAvailable"]) << 10, int(sizes["MemTotal"]) << 10)


def _container() -> Measured | None:
    """Pages of files that nobody uses count as used there, and can be had all the same."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        stat = (_CGROUP / "memory.stat").read_text()
    except (OSError, ValueError):
        return None  # there is none, or it says "max"
    idle = re.search(r"^inactive_file (\d+)$", stat, re.M)
    return Measured(max(0, limit - used + (int(idle[1]) if idle else 0)), limit)


def _process() -> Measured | None:
    """What the process may still map, where that is limited."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    pages = _pages()
    if limit == resource.RLIM_INFINITY or pages is None:
        return None
    left = max(0, limit - pages[0] * resource.getpagesize())
    return Measured(left, left + (_own_bytes() or 0))


def _own_bytes() -> int | None:
    pages = _pages()
    return None if pages is None else pages[1] * resource.getpagesize()


def _pages() -> tuple[int, int] | None:
    """Of this process: mapped, and in memory."""
    try:
        size, resident = Path("/proc/self/statm").read_text().split()[:2]
    except (OSError, ValueError):
        return None
    return int(size), int(resident)
