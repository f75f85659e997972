"""A process says that it lives, not more often than is of use.

sign = Sign(ledger, "checker", time.time)
sign.give()          # at each turn of its loop
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from weft.service.store.tallies import TallyRows

EVERY_SECONDS = 2.0
LOG = logging.getLogger("weft.store")


class Sign:
    """See the module's text."""

    def __init__(self, ledger: TallyRows, name: str, clock: Callable[[], float]) -> None:
        self._ledger = ledger
        self._name = name
        self._clock = clock
        self._given: float | None = None

    def give(self) -> None:
        """Writes it down, if the last time is a while ago. A store that fails is no reason to end:
        that nothing was written is what there is to be seen."""
        now = self._clock()
        if self._given is not None and 0 <= now - self._given < EVERY_SECONDS:
            return
        self._given = now
        try:
            self._ledger.beat(self._name, now)
        except Exception:
            LOG.exception("a sign of life could not be written down")
