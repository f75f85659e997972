"""What the gateway counts of each owner: requests, refusals, bytes. Writes it down once a second.

    meter = Meter(ledger, clock)
    meter.count("ann", up=120, down=4000)
    meter.today("ann").down                # what the ledger has of today, and what it has not yet

Where a gateway is killed, what it counted in the last second is not counted. What jobs use is not
its business: that is written with the job.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from weft.service.jobs.limits import Bucket, take
from weft.service.jobs.usage import Usage, day_of, plus, total
from weft.service.store.interface import Ledger, Objects

LOG = logging.getLogger("weft.gateway")

SECONDS = 1.0
MINUTE = 60.0
OWNERS = 10_000
"""Buckets of so many owners are kept; those of more are forgotten, and so full."""


class Meter:
    """See the module's text. All calls may come from any thread."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float]) -> None:
        self._ledger = ledger
        self._clock = clock
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._new: dict[tuple[str, str], Usage] = {}
        self._known: dict[str, Usage] = {}  # of today, by owner, as far as it was written
        self._day = ""
        self._buckets: dict[str, Bucket] = {}
        self._since: float | None = None  # when the first of `_new` was counted

    def count(self, owner: str, *, up: int = 0, down: int = 0, refusals: int = 0) -> bool:
        """Counts one request. True: `flush` is due."""
        now = self._clock()
        one = Usage(owner=owner, day=day_of(now), up=up, down=down, requests=1, refusals=refusals)
        with self._lock:
            whose = (owner, one.day)
            self._new[whose] = plus(one, self._new[whose]) if whose in self._new else one
            self._since = now if self._since is None else self._since
            return not 0 <= now - self._since < SECONDS

    def flush(self) -> None:
        """Writes down what was counted. Blocks."""
        with self._writing:
            with self._lock:
                rows, self._new, self._since = list(self._new.values()), {}, None
            if not rows:
                return
            try:
                self._ledger.add_usage(rows)
            except Exception:  # the server goes on, and what was counted is written later
                LOG.exception("usage cannot be written down")
                self._put_back(rows)
                return
            with self._lock:
                for row in rows:
                    if row.day == self._day and row.owner in self._known:
                        self._known[row.owner] = plus(self._known[row.owner], row)

    def _put_back(self, rows: list[Usage]) -> None:
        with self._lock:
            for row in rows:
                whose = (row.owner, row.day)
                self._new[whose] = plus(row, self._new[whose]) if whose in self._new else row

    def today(self, owner: str) -> Usage:
        """What an owner sent and fetched today. The first time of a day it blocks.

        What jobs used is not in it, as others write that.
        """
        day = day_of(self._clock())
        with self._lock:
            if day != self._day:
                self._day, self._known = day, {}
            missing = owner not in self._known
        if missing:
            with self._writing:  # else what is just being written would count twice
                written = total(self._ledger.usage(owner, day, day))
                with self._lock:
                    self._known.setdefault(owner, written)
        with self._lock:
            known = self._known.get(owner, Usage(owner=owner, day=day))
            new = self._new.get((owner, day))
        return known if new is None else plus(known, new)

    def wait(self, owner: str, per_minute: int) -> float:
        """Takes one request of a minute's out; seconds until there is one, where there is none."""
        with self._lock:
            if len(self._buckets) > OWNERS:
                self._buckets.clear()
            bucket = self._buckets.get(owner, Bucket())
            seconds, self._buckets[owner] = take(bucket, per_minute, MINUTE, self._clock())
        return seconds


class Stored:
    """How many bytes of constants and saved edits are kept of each owner. All calls block."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}

    def fits(self, owner: str, size: int, most: int) -> bool:
        """Whether so many bytes more are not too many; they then count as kept.

        What was counted may have gone since: before it says no, it looks.
        """
        with self._lock:
            known = self._sizes.get(owner)
            if known is None or known + size > most:
                known = self._measured(owner)
            fit = known + size <= most
            self._sizes[owner] = known + size if fit else known
            return fit

    def _measured(self, owner: str) -> int:
        folders = (f"constants/{owner}/", f"edits/{owner}/")
        names = [name for folder in folders for name in self._objects.names(folder)]
        return sum(self._objects.size(name) or 0 for name in names)

    def oldest(self, owner: str) -> float | None:
        """When the constant was used that was not used for longest."""
        names = self._objects.names(f"constants/{owner}/")
        times = [self._objects.touched(name) for name in names]
        return min((time for time in times if time is not None), default=None)
