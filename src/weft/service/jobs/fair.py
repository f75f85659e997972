"""Whose job is next: weighted fair queueing by what jobs cost. Pure: no clock, no store.

Start-time fair queueing. Each owner has a *tag* in each queue: the virtual time at which its next
job begins. The job with the least tag is next; its owner's tag then grows by what the job counts,
its cost by its weight. So among owners who always have something waiting, each gets of the worker
what its weight says, whatever the number and the size of their jobs, up to one job each. The queue
has a *clock*, the least tag of those who wait. Who begins to wait starts at the clock: nobody saves
up for later what he did not use, and a newcomer waits for one job of each other owner at most.
What was begun is owed until the clock gets there, or nothing is left to do for anybody.

A price is a guess, so it is made good when the job is over: its owner's tag goes on, or back, to
where it would be had the job been charged the seconds that it took, at the queue's *pace* (what a
worker does of what it charges in a second, over the last hundred jobs or so). What each gets of the
worker is so what its weight says in measured time, however its jobs are priced.

    share = arrived(None, clock, now)
    turn = choose([("ann", share)], clock, head, now)   # whose turn it is, and what follows from it
    pace = learnt(pace, turn.job, seconds)              # it is over, and took so long
    share = settled(turn.shares["ann"], pace, turn.job, seconds)

There is a queue for the checker, where what counts is the size of a graph and nothing is made good,
and one for each model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from msgspec import Struct

from weft.service.jobs.life import Job

PRICING = "price"
"""The checker's queue; a model's is called `run/<model>`."""
OVERHEAD = 1e9
"""What running a job counts beside its cost: what a pass takes that computes next to nothing."""
NODES = 100
"""What pricing a graph counts beside its nodes, in nodes."""
FADING = 0.99
"""What is left of a job in the pace of its queue with each job after it."""


class Share(Struct, frozen=True):
    """An owner in a queue: where it stands, and since when."""

    tag: float = 0.0
    since: float = 0.0


class Pace(Struct, frozen=True):
    """What jobs of a queue were charged, before weights, and the seconds they took. Both fade."""

    charged: float = 0.0
    seconds: float = 0.0


class Turn(Struct, frozen=True):
    """Whose turn it is. `shares` are those that are others now; None: it says nothing any more."""

    job: Job
    clock: float
    shares: dict[str, Share | None]


Head = Job | Literal["unfit", "held", "busy", "idle"]
"""What an owner has in a queue for whoever asks: its next job; jobs, but none that fits; jobs that
must wait for others of the owner's own, or for a model that is not there; none but such as run,
whose price is still to be made good; none at all."""


def queue_of(job: Job) -> str | None:
    """The queue that it waits in, if it does."""
    if job.token is not None or job.ended is not None:
        return None
    return {"received": PRICING, "queued": run_queue(job.model)}.get(job.state)


def run_queue(model: str) -> str:
    return f"run/{model}"


def charge_of(job: Job, stage: str) -> float:
    """What doing it counts in the queue of `received` or `queued` jobs."""
    size = NODES + job.nodes if stage == "received" else _size_of(job)
    return size / job.weight


def _size_of(job: Job) -> float:
    return OVERHEAD + max(job.cost, 0.0)


def arrived(share: Share | None, clock: float, now: float) -> Share:
    """An owner of whom nothing waited, and now does."""
    return Share(clock if share is None else max(share.tag, clock), now)


def choose(
    shares: Iterable[tuple[str, Share]], clock: float, head: Callable[[str], Head], now: float
) -> Turn | None:
    """The next job in fair order among those that `head` offers, and what is to be kept of it.

    `shares` come `in_order`, and only as many are taken as are needed. Among equal tags it is the
    owner whose last turn was longest ago. The clock goes on to the least tag among those who could
    be served, not to that of the chosen one, which may be early because its job fits beside others.
    """
    changed: dict[str, Share | None] = {}
    least: float | None = None
    for owner, share in shares:
        found = head(owner)
        if found == "idle":
            if share.tag <= max(clock, least or 0.0):
                changed[owner] = None
        elif found == "held":
            changed[owner] = share
        elif found != "busy":
            least = share.tag if least is None else least
            if isinstance(found, Job):
                clock = max(clock, least)
                grown = share.tag + charge_of(found, found.state)
                lifted = {who: arrived(one, clock, one.since) for who, one in _held(changed)}
                return Turn(found, clock, changed | lifted | {owner: Share(grown, now)})
    return None


def _held(changed: Mapping[str, Share | None]) -> list[tuple[str, Share]]:
    return [(owner, share) for owner, share in changed.items() if share is not None]


def learnt(pace: Pace, job: Job, seconds: float) -> Pace:
    """The pace of a queue after a job of it that took so long."""
    charged = FADING * pace.charged + _size_of(job)
    return Pace(charged, FADING * pace.seconds + seconds)


def settled(share: Share, pace: Pace, job: Job, seconds: float) -> Share:
    """An owner whose job is over: it was charged its price, and took so long."""
    if not pace.seconds:
        return share
    took = seconds * pace.charged / pace.seconds
    return Share(share.tag + (took - _size_of(job)) / job.weight, share.since)


def in_order(shares: Mapping[str, Share]) -> list[tuple[str, Share]]:
    """Who is next stands first."""
    return sorted(shares.items(), key=place)


def place(one: tuple[str, Share]) -> tuple[float, float, str]:
    """Where an owner stands: the least is next."""
    owner, share = one
    return share.tag, share.since, owner


def before(mine: Job, waiting: Iterable[Job], shares: Mapping[str, Share], clock: float) -> int:
    """How many of the jobs that wait for a model come before one of them, as things stand.

    A job that has no price yet counts as one that costs nothing.
    """
    begins = starts(waiting, shares, clock)
    return sum(start < begins[mine.id] for start in begins.values())


def starts(
    waiting: Iterable[Job], shares: Mapping[str, Share], clock: float
) -> dict[str, tuple[float, float, float, str]]:
    """Where each job stands, by id: the least is next."""
    tags: dict[str, float] = {}
    found: dict[str, tuple[float, float, float, str]] = {}
    for job in sorted(waiting, key=lambda job: (job.created, job.id)):
        share = shares.get(job.owner, Share(clock, job.created))
        tag = tags.get(job.owner, max(share.tag, 0.0))
        found[job.id] = (tag, share.since, job.created, job.id)
        tags[job.owner] = tag + charge_of(job, "queued")
    return found
