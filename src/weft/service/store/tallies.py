"""What a store counts for whoever watches the server, and signs of life of its processes.

Rows are `jobs.tally.Count`. What jobs add is added in the transaction of the step that ends them;
the gateway adds what it counts itself. None of it is lost when a process ends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Protocol

from weft.service.jobs.tally import Count


class TallyRows(Protocol):
    """The part of a `Ledger` that counts."""

    def add_tallies(self, counts: Iterable[Count]) -> None:
        """Adds to what is there. Durable when the next step of a job is."""
        ...

    def tallies(self) -> list[Count]:
        """All of them, by name and labels."""
        ...

    def beat(self, name: str, now: float) -> None:
        """A process lives: the last time counts. Durable when the next step of a job is."""
        ...

    def beats(self) -> dict[str, float]:
        """When each process was heard of last, by name."""
        ...


class MemoryTallies:
    """The same in memory: a part of `memory.MemoryLedger`."""

    _lock: threading.Lock

    def __init__(self) -> None:
        self._tallies: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._beats: dict[str, float] = {}

    def add_tallies(self, counts: Iterable[Count]) -> None:
        with self._lock:
            self.tally(counts)

    def tally(self, counts: Iterable[Count]) -> None:
        """Within the lock."""
        for one in counts:
            key = one.name, one.labels
            self._tallies[key] = self._tallies.get(key, 0.0) + one.value

    def tallies(self) -> list[Count]:
        with self._lock:
            return [Count(*key, value) for key, value in sorted(self._tallies.items())]

    def beat(self, name: str, now: float) -> None:
        with self._lock:
            self._beats[name] = now

    def beats(self) -> dict[str, float]:
        with self._lock:
            return dict(self._beats)
