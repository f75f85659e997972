"""How jobs are claimed, as both ledgers do it: one asks, and takes as many as there is room for.

Whose job is next is known to `memory_fair` and `sqlite_fair`; `_claim` is a transaction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

from weft.service.jobs.life import Job
from weft.service.store.said import Asked, was_lost
from weft.settings import Settings


class Claiming(ABC):
    """`claim` and `claim_all` of `interface.Ledger`."""

    _settings: Settings

    def claim(
        self,
        stage: str,
        models: Iterable[str],
        holder: str,
        now: float,
        until: float,
        *,
        lane: str | None = None,
        tokens: int | None = None,
        peak: int | None = None,
        beyond: int | None = None,
    ) -> Job | None:
        running = self._settings.running_jobs
        asked = Asked(stage, tuple(models), lane, tokens, peak, beyond, running)
        found = self._claim(asked, holder, now, until, 1)
        return found[0] if found else None

    def claim_all(
        self,
        stage: str,
        models: Iterable[str],
        holder: str,
        now: float,
        until: float,
        most: int,
        *,
        lane: str | None = None,
        tokens: int | None = None,
        peak: int | None = None,
    ) -> list[Job]:
        running = self._settings.running_jobs
        asked = Asked(stage, tuple(models), lane, tokens, peak, None, running)
        return self._claim(asked, holder, now, until, most)

    @abstractmethod
    def _claim(self, asked: Asked, holder: str, now: float, until: float, most: int) -> list[Job]:
        """Up to `most` jobs that are the holder's from now on."""


def in_turn(asked: Asked, most: int, next_job: Callable[[Asked], Job | None]) -> Iterator[Job]:
    """One job after another, into the room that those before have left: each is to be claimed
    before the next is looked for."""
    for _ in range(most):
        job = next_job(asked)
        if job is None:
            return
        yield job
        rest = None if was_lost(job) else asked.without(job)
        if rest is None:
            return
        asked = rest
