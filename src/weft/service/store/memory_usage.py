"""`usage.UsageRows` in memory: a part of `memory.MemoryLedger`."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from weft.service.jobs.usage import Usage, plus
from weft.service.store.usage import Space


class MemoryUsage:
    """See the module's text."""

    _lock: threading.Lock

    def __init__(self) -> None:
        self._usage: dict[tuple[str, str, str], Usage] = {}
        self._spaces: dict[str, Space] = {}

    def put_space(self, space: Space) -> None:
        with self._lock:
            self._spaces[space.model] = space

    def space(self, model: str) -> Space | None:
        with self._lock:
            return self._spaces.get(model)

    def add_usage(self, rows: Iterable[Usage]) -> None:
        with self._lock:
            for usage in rows:
                self.spend(usage)

    def spend(self, usage: Usage) -> None:
        """Within the lock."""
        whose = (usage.day, usage.owner, usage.model)
        before = self._usage.get(whose)
        self._usage[whose] = usage if before is None else plus(before, usage)

    def seconds(self, owner: str, day: str) -> float:
        """Those of a day, of all models. Within the lock."""
        rows = self._usage.values()
        return sum([row.seconds for row in rows if (row.owner, row.day) == (owner, day)])

    def usage(self, owner: str | None = None, since: str = "", until: str = "9") -> list[Usage]:
        with self._lock:
            found = [self._usage[whose] for whose in sorted(self._usage)]
        mine = [row for row in found if owner is None or row.owner == owner]
        return [row for row in mine if since <= row.day <= until]
