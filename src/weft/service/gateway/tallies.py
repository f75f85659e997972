"""What the gateway counts of requests, and writes into the store about once a second.

    counts = Tallies(ledger)
    if counts.add("weft_refusals_total", ("limit", "nodes")): counts.flush()     # it is due

Where a gateway is killed, what it counted in the last second is not counted.
"""

from __future__ import annotations

import logging
import threading
import time

from weft.service.jobs.tally import Count
from weft.service.store.tallies import TallyRows

SECONDS = 1.0
LOG = logging.getLogger("weft.gateway")


class Tallies:
    """See the module's text. All calls may come from any thread."""

    def __init__(self, ledger: TallyRows) -> None:
        self._ledger = ledger
        self._lock = threading.Lock()
        self._new: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._since: float | None = None

    def add(self, name: str, *labels: tuple[str, str]) -> bool:
        """Counts one. True: `flush` is due."""
        now = time.monotonic()
        with self._lock:
            self._new[name, labels] = self._new.get((name, labels), 0.0) + 1.0
            self._since = now if self._since is None else self._since
            return now - self._since >= SECONDS

    def flush(self) -> None:
        """Writes down what was counted. Blocks."""
        with self._lock:
            new, self._new, self._since = self._new, {}, None
        if not new:
            return
        try:
            self._ledger.add_tallies([Count(*key, value) for key, value in new.items()])
        except Exception:  # the server goes on, and what was counted is written later
            LOG.exception("what was counted cannot be written down")
            with self._lock:
                for key, value in new.items():
                    self._new[key] = self._new.get(key, 0.0) + value
                self._since = time.monotonic()
