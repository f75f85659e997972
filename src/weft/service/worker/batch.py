"""Batches: jobs of one lane, claimed together and drawn through forwards that they share.

    jobs = Claims(ledger, "tiny", ...).next()       # [] where there is nothing to do
    for group in groups(entries, width, rows, settings.merge_tokens): ...

A job without a lane comes alone. One that was lost before (its worker died) has none any more: it
cannot take others with it a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from weft.service.jobs.life import Job
from weft.service.store.interface import Ledger
from weft.settings import Settings

from .space import Measured, Spaces

T = TypeVar("T")

STEPS = "steps"
"""The lane of generations."""
NARROWEST = 8
"""A row may be so many times as long as another in one forward."""


class Claims:
    """Claims what a worker is to do next."""

    def __init__(
        self,
        ledger: Ledger,
        model: str,
        holder: str,
        settings: Settings,
        clock: Callable[[], float],
        pause: Callable[[float], object],
        spaces: Spaces | None = None,
    ) -> None:
        self._ledger = ledger
        self._model = model
        self._holder = holder
        self._settings = settings
        self._clock = clock
        self._pause = pause
        self._spaces = spaces
        self._last = 1  # jobs of the last batch

    def one(self) -> Job | None:
        """The next job that fits into memory now, or that never will. Others wait."""
        space = self._space()
        if space is None:
            return self._claimed()
        return self._claimed(peak=space.free) or self._claimed(beyond=space.most)

    def steps(self, room: int, most: int) -> list[Job]:
        """The next generations, at most so many, and of so many positions together."""
        who, free = self._who(), self._free()
        return self._ledger.claim_all("queued", *who, most, lane=STEPS, tokens=room, peak=free)

    def _free(self) -> int:
        """Bytes that a batch may take now."""
        space, most = self._space(), self._settings.memory_bytes
        return most if space is None else min(most, space.free)

    def _space(self) -> Measured | None:
        return None if self._spaces is None else self._spaces.now()

    def _claimed(self, **fitting: str | int) -> Job | None:
        """`fitting` as in `Ledger.claim`."""
        return self._ledger.claim("queued", *self._who(), **fitting)  # type: ignore[arg-type]

    def _who(self) -> tuple[tuple[str, ...], str, float, float]:
        now = self._clock()
        return (self._model,), self._holder, now, now + self._settings.lease_seconds

    def next(self) -> list[Job]:
        """The next job, and those that may share a forward with it.

        Where the last forward was shared there is load: then more are waited for, for a moment.
        """
        first = self.one()
        if first is None:
            self._last = 1
            return []
        jobs = [first]
        if first.lane:
            self._fill(jobs)
            if self._last > 2 * len(jobs):
                self._pause(self._settings.merge_wait_seconds)
                self._fill(jobs)
        self._last = len(jobs)
        return jobs

    def _fill(self, jobs: list[Job]) -> None:
        settings, lane = self._settings, jobs[0].lane
        room = settings.merge_positions if lane == STEPS else settings.merge_tokens
        tokens = room - sum([job.tokens for job in jobs])
        peak = self._free() - sum([job.peak for job in jobs])
        most = settings.merge_jobs - len(jobs)
        if most > 0 and tokens > 0 and peak > 0:
            who = self._who()
            jobs += self._ledger.claim_all(
                "queued", *who, most, lane=lane, tokens=tokens, peak=peak
            )


def groups(
    items: Sequence[T], width: Callable[[T], int], rows: Callable[[T], int], tokens: int
) -> Iterator[list[T]]:
    """Those that share a forward, longest first: none is padded to more than `NARROWEST` times its
    length, and no forward has more than so many tokens, padding included."""
    group: list[T] = []
    longest = count = 0
    for item in sorted(items, key=width, reverse=True):
        longest = longest or width(item)
        fits = (count + rows(item)) * longest <= tokens and longest <= NARROWEST * width(item)
        if group and not fits:
            yield group
            group, longest, count = [], width(item), 0
        group.append(item)
        count += rows(item)
    if group:
        yield group
