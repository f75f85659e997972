"""How jobs are claimed, as both ledgers do it: one asks, and takes as many as there is room for.

Whose job is next is known to `memory_fair` and `sqlite_fair`; `_claim` is a transaction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

from weft.service.jobs.life import Event, Job
from weft.service.jobs.tally import Count
from weft.service.store.days import LIMIT
from weft.service.store.said import Asked, was_lost
from weft.settings import Settings

Step = tuple[str, Event, str | None]


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
        asked = self._asked(stage, tuple(models), lane, tokens, peak, beyond)
        found = self._claimed(asked, holder, now, until, 1)
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
        asked = self._asked(stage, tuple(models), lane, tokens, peak, None)
        return self._claimed(asked, holder, now, until, most)

    def _asked(
        self,
        stage: str,
        models: tuple[str, ...],
        lane: str | None,
        tokens: int | None,
        peak: int | None,
        beyond: int | None,
    ) -> Asked:
        settings = self._settings
        limits = settings.running_jobs, settings.run_seconds_per_day
        return Asked(stage, models, lane, tokens, peak, beyond, *limits)

    def _claimed(self, asked: Asked, holder: str, now: float, until: float, most: int) -> list[Job]:
        """Those whose key has no seconds of the day left are refused on the way: a few with each
        claim, and the rest with those that follow, at once where nothing else is there to do."""
        while True:
            jobs, refused = self._claim(asked, holder, now, until, most)
            if refused:
                self.step_all(refused, now)
                self.add_tallies([Count("weft_refusals_total", (("limit", LIMIT),), len(refused))])
            if jobs or not refused:
                return jobs

    @abstractmethod
    def _claim(
        self, asked: Asked, holder: str, now: float, until: float, most: int
    ) -> tuple[list[Job], list[Step]]:
        """Up to `most` jobs that are the holder's from now on; and steps by which others are to be
        refused."""

    @abstractmethod
    def step_all(self, steps: Iterable[Step], now: float) -> list[Job | Exception]: ...

    @abstractmethod
    def add_tallies(self, counts: Iterable[Count]) -> None: ...


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
