"""Whose day is used up: jobs that are not begun any more, and what they are told.

    day = Day(asked, now, used)            # for one claim; `used(owner)` are seconds of today
    day.allows(queue, job)                 # False: it is to be refused instead
    steps = day.refusals()                 # for `Ledger.step_all`, when the claim is over

Seconds are looked at when a job is sent, and here when its turn comes: what was sent while there
were some left would run on for days otherwise. A job that was begun before, by a worker that died,
was let in and is no more refused. Of whose key has no such limit nothing is asked, of others once
in a claim; a claim refuses a few jobs of each only, so that nobody waits for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from weft.service.jobs.life import Event, Job, Refused
from weft.service.jobs.limits import no_seconds
from weft.service.store.said import Asked
from weft.wire.messages import encode
from weft.wire.reports import report_of

LOOKED = 16
"""At most so many of an owner's jobs are looked at for one that may be begun."""
LIMIT = "run_seconds_per_day"


class Day:
    """See the module's text. Used inside one transaction."""

    def __init__(self, asked: Asked, now: float, used: Callable[[str], float]) -> None:
        self._asked = asked
        self._now = now
        self._ask = used
        self._used: dict[str, float] = {}
        self._refused: dict[str, Event] = {}
        self._over: set[tuple[str, str]] = set()

    def is_over(self, queue: str, owner: str) -> bool:
        """Whether nothing of an owner's is begun out of a queue any more, in this claim."""
        return (queue, owner) in self._over

    def first(self, queue: str, owner: str, jobs: Iterable[Job]) -> Job | None:
        """The first that may be begun, of an owner's next ones in order. Those before it are to be
        refused; None: all of them, and then that is all for this claim."""
        found = next((job for job in jobs if self.allows(job)), None)
        if found is None:
            self._over.add((queue, owner))
        return found

    def allows(self, job: Job) -> bool:
        """Whether it may be begun; else it is to be refused."""
        most = self._asked.most_seconds(job)
        if not most or job.state != "queued" or job.attempts:
            return True
        if job.owner not in self._used:
            self._used[job.owner] = self._ask(job.owner)
        used = self._used[job.owner]
        if used < most:
            return True
        if job.id not in self._refused:
            report = report_of(no_seconds(most, used, self._now), job.id)
            self._refused[job.id] = Refused(encode(report, "json"))
        return False

    def refusals(self) -> list[tuple[str, Event, None]]:
        """Steps of the jobs that are to be refused."""
        return [(id, event, None) for id, event in self._refused.items()]
