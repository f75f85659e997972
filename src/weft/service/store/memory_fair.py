"""Fair order in memory: the part of `memory.MemoryLedger` that `jobs.fair` decides on.

It looks at all jobs for each question: it is the fake, and has few.
"""

from __future__ import annotations

from collections.abc import Iterable

from weft.service.jobs.fair import (
    PRICING,
    Head,
    Pace,
    Share,
    Turn,
    arrived,
    before,
    choose,
    in_order,
    learnt,
    queue_of,
    run_queue,
    settled,
)
from weft.service.jobs.life import FINAL, Job
from weft.service.store.days import LOOKED, Day
from weft.service.store.said import Asked


class Lines:
    """All queues of one ledger: who stands where."""

    def __init__(self) -> None:
        self._shares: dict[str, dict[str, Share]] = {}
        self._clocks: dict[str, float] = {}
        self._paces: dict[str, Pace] = {}

    def next_job(self, jobs: list[Job], asked: Asked, day: Day, now: float) -> Job | None:
        """The next job in fair order; its turn is noted. Of several queues, the oldest job."""
        runs = [run_queue(model) for model in asked.models]
        queues = [PRICING] if asked.stage == "received" else runs
        turns = [(queue, self._turn(queue, jobs, asked, day, now)) for queue in queues]
        found = [(queue, turn) for queue, turn in turns if turn is not None]
        if not found:
            return None
        queue, turn = min(found, key=lambda one: (one[1].job.created, one[1].job.id))
        self._clocks[queue] = turn.clock
        for owner, share in turn.shares.items():
            if share is None:
                del self._shares[queue][owner]
            else:
                self._shares[queue][owner] = share
        return turn.job

    def _turn(self, queue: str, jobs: list[Job], asked: Asked, day: Day, now: float) -> Turn | None:
        def head(owner: str) -> Head:
            if day.is_over(queue, owner):
                return "held"
            mine = [job for job in jobs if job.owner == owner and queue_of(job) == queue]
            there = [job for job in mine if job.model in asked.models]
            waiting = {one.id for one in jobs if one.state not in FINAL}
            turn = [job for job in there if queue == PRICING or job.after not in waiting]
            if there and not turn:
                return "held"
            fit = [job for job in turn if asked.fits(job)]
            if not there:
                return "held" if mine else "busy" if _runs(jobs, queue, owner) else "idle"
            if not fit:
                return "unfit"
            first = sorted(fit, key=lambda job: (job.created, job.id))[:LOOKED]
            job = day.first(queue, owner, first)
            if job is None:
                return "held"
            most = asked.most_running(job)
            running = sum(one.owner == owner and one.state == "running" for one in jobs)
            return "held" if most and running >= most else job

        shares = in_order(self._shares.get(queue, {}))
        return choose(shares, self._clocks.get(queue, 0.0), head, now)

    def arrive(self, job: Job, jobs: Iterable[Job], now: float) -> None:
        """A job waits from now on, if it does: its owner may have to be given a place."""
        queue = queue_of(job)
        if queue is None:
            return
        others = [one for one in jobs if one.id != job.id]
        if not any(_is_of(one, queue) for one in others):
            self._shares[queue], self._clocks[queue] = {}, 0.0
        shares = self._shares.setdefault(queue, {})
        waits = any(one.owner == job.owner and queue_of(one) == queue for one in others)
        if not waits or job.owner not in shares:
            shares[job.owner] = arrived(shares.get(job.owner), self._clocks.get(queue, 0.0), now)

    def settle(self, job: Job, seconds: float) -> None:
        """A job that was begun is over, and took so long."""
        queue = run_queue(job.model)
        pace = self._paces[queue] = learnt(self._paces.get(queue, Pace()), job, seconds)
        share = self._shares.get(queue, {}).get(job.owner)
        if share is not None:
            self._shares[queue][job.owner] = settled(share, pace, job, seconds)

    def ahead(self, job: Job, jobs: Iterable[Job]) -> int:
        """`fair.before`, and those that run."""
        same = [one for one in jobs if one.model == job.model]
        waiting = [one for one in same if one.state in ("received", "queued")]
        queue = run_queue(job.model)
        first = before(job, waiting, self._shares.get(queue, {}), self._clocks.get(queue, 0.0))
        return first + sum(one.state == "running" for one in same)


def _runs(jobs: Iterable[Job], queue: str, owner: str) -> bool:
    """Whether a job of an owner runs that came out of the queue of a model."""
    mine = (job for job in jobs if job.owner == owner and job.state == "running")
    return any(run_queue(job.model) == queue for job in mine)


def _is_of(job: Job, queue: str) -> bool:
    """Whether it waits in the queue, or came out of it and is not over."""
    if queue == PRICING:
        return job.state == "received"
    return job.state in ("queued", "running") and run_queue(job.model) == queue
