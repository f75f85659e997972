"""Whose job is next, asked of SQLite: for whoever claims several inside one transaction.

    turns = Turns(rows, asked, now)
    while (job := turns.next(asked)) is not None:
        ...                                     # it is begun; `asked` may ask for less from now on
    turns.write()

What is next, `jobs.fair` decides. What each owner has is asked once, a search or two of an index
however many jobs wait, and only of as many owners as are needed; and again where a job of his was
taken, or has become too large: nothing else changes meanwhile. Where owners stand is written down
at the end. `turns.day` knows which jobs were passed over because a day is used up.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from heapq import merge

import msgspec

from weft.service.jobs.fair import (
    PRICING,
    Head,
    Share,
    Turn,
    choose,
    in_order,
    place,
    run_queue,
)
from weft.service.jobs.life import Job
from weft.service.jobs.usage import day_of
from weft.service.store.days import LOOKED, Day
from weft.service.store.said import Asked
from weft.service.store.sqlite_fair import clock_of, move, set_clock
from weft.service.store.sqlite_usage import seconds

_FITS = {"lane": "lane =", "tokens": "tokens <=", "peak": "peak <=", "beyond": "peak >"}
"""What `Asked.fits` says, in SQL."""
_job_of = msgspec.msgpack.Decoder(Job).decode


class Turns:
    """See the module's text."""

    def __init__(self, rows: sqlite3.Connection, asked: Asked, now: float) -> None:
        self._now = now
        self.day = Day(asked, now, lambda owner: seconds(rows, owner, day_of(now)))
        self._lines = [_Line(rows, queue, asked, self.day) for queue in _queues(asked)]

    def next(self, asked: Asked) -> Job | None:
        """The next job in fair order. Of several queues, the oldest one."""
        turns = [(line, line.turn(asked, self._now)) for line in self._lines]
        found = [(line, turn) for line, turn in turns if turn is not None]
        if not found:
            return None
        line, turn = min(found, key=lambda one: (one[1].job.created, one[1].job.id))
        line.take(turn)
        for one in self._lines:
            one.forget(turn.job.owner)
        return turn.job

    def write(self) -> None:
        for line in self._lines:
            line.write()


def anything(rows: sqlite3.Connection, asked: Asked) -> bool:
    """Whether any job may be there for the asking."""
    query = f"""SELECT 1 FROM job WHERE model = :model AND state = :stage AND ended IS NULL
        AND token IS NULL {_fitting(asked)} LIMIT 1"""
    values = _values(asked)
    found = (rows.execute(query, {**values, "model": one}).fetchone() for one in asked.models)
    return any(row is not None for row in found)


def _queues(asked: Asked) -> Iterable[str]:
    runs = [run_queue(one) for one in asked.models]
    return runs[:1] and [PRICING] if asked.stage == "received" else runs


class _Line:
    """One queue while somebody claims: owners in order, read as far as somebody wants to know."""

    def __init__(self, rows: sqlite3.Connection, queue: str, asked: Asked, day: Day) -> None:
        self._rows = rows
        self._day = day
        self._queue = queue
        self._models = [one for one in asked.models if queue in (PRICING, run_queue(one))]
        self._clock = clock_of(rows, queue)
        self._stood: list[tuple[str, Share]] = []  # where owners stood, in order
        self._moved: dict[str, Share | None] = {}  # where they stand now, if elsewhere
        self._read: dict[str, bytes | Head] = {}  # what there was when it was read in order
        self._heads: dict[str, tuple[Job | None, Head]] = {}
        self._rest = self._select(asked)
        self._taken = False

    def turn(self, asked: Asked, now: float) -> Turn | None:
        return choose(self._in_order(asked), self._clock, partial(self._head, asked), now)

    def take(self, turn: Turn) -> None:
        """It is this turn."""
        self._clock, self._taken = turn.clock, True
        self._moved |= turn.shares

    def forget(self, owner: str) -> None:
        """A job of an owner was taken."""
        self._heads.pop(owner, None)
        self._read.pop(owner, None)

    def write(self) -> None:
        self._rest.close()
        if self._taken:
            set_clock(self._rows, self._queue, self._clock)
            move(self._rows, self._queue, self._moved)

    def _in_order(self, asked: Asked) -> Iterator[tuple[str, Share]]:
        moved = {owner: share for owner, share in self._moved.items() if share is not None}
        others = (one for one in self._as_they_stood(asked) if one[0] not in self._moved)
        return merge(others, in_order(moved), key=place)

    def _as_they_stood(self, asked: Asked) -> Iterator[tuple[str, Share]]:
        yield from self._stood
        for owner, tag, since, found in self._rest:
            self._stood.append((owner, Share(tag, since)))
            self._read[owner] = found  # judged when it is his turn, which may be never
            yield self._stood[-1]

    def _head(self, asked: Asked, owner: str) -> Head:
        known = self._heads.get(owner)
        if known is not None and (known[0] is None or asked.fits(known[0])):
            return known[1]
        found = self._read.pop(owner, None)
        if found is None or not _fits(found, asked):
            ((*_, found),) = self._select(asked, owner)
        known = self._heads[owner] = self._judged(owner, found, asked)
        return known[1]

    def _judged(self, owner: str, found: bytes | Head, asked: Asked) -> tuple[Job | None, Head]:
        """The job that is first, if there is one, and what that comes to."""
        if not isinstance(found, bytes):
            return None, found
        job = _job_of(found)
        if not self._day.allows(job):
            job = self._day.first(self._queue, owner, self._next_few(asked, owner))
            if job is None:
                return None, "held"
        most = asked.most_running(job)
        return job, "held" if most and _running(self._rows, owner) >= most else job

    def _next_few(self, asked: Asked, owner: str) -> list[Job]:
        """An owner's next jobs, in order."""
        (model,) = self._models  # a queue of jobs that wait to be run has one
        turn = _IN_TURN.replace("share.owner", ":owner")
        query = f"""SELECT body FROM job WHERE model = :model AND {turn} {_fitting(asked)}
            ORDER BY created, id LIMIT {LOOKED}"""
        found = self._rows.execute(query, {**_values(asked), "model": model, "owner": owner})
        return [_job_of(body) for (body,) in found]

    def _select(self, asked: Asked, owner: str | None = None) -> sqlite3.Cursor:
        """Owner, tag, since, and what there is: the body of a job's row, or another `fair.Head`.

        Of one owner, or of all in order.
        """
        pricing = self._queue == PRICING
        query = _query(pricing, len(self._models), _fitting(asked), owner is not None)
        models = {f"model{number}": one for number, one in enumerate(self._models)}
        more = {"queue": self._queue, "owner": owner, **models}
        return self._rows.execute(query, {**_values(asked), **more})


def _fits(found: bytes | Head, asked: Asked) -> bool:
    """Whether what was read for somebody who asked for more will do."""
    return not isinstance(found, bytes) or asked.fits(_job_of(found))


def _fitting(asked: Asked) -> str:
    given = [name for name in _FITS if getattr(asked, name) is not None]
    return " ".join([f"AND {_FITS[name]} :{name}" for name in given])


def _values(asked: Asked) -> dict[str, object]:
    return {"stage": asked.stage, **{name: getattr(asked, name) for name in _FITS}}


@cache
def _query(pricing: bool, models: int, fitting: str, one: bool) -> str:
    """What `_Line._select` asks."""
    each = [f":model{number}" for number in range(models)]
    choosy = bool(fitting)
    unfit = f"WHEN {_any(each, _FREE if pricing else _IN_TURN)} THEN 'unfit'" if choosy else ""
    waits = f"EXISTS (SELECT 1 FROM job WHERE {_FREE})" if pricing else _any(each, _FREE)
    busy = "" if pricing else f"WHEN {_any(each, _RUNS)} THEN 'busy'"
    first = _first(each, f"{_FREE if pricing else _IN_TURN} {fitting}")
    whose = "AND owner = :owner" if one else "ORDER BY tag, since, owner"
    return f"""SELECT owner, tag, since, coalesce(
        {first}, CASE {unfit} WHEN {waits} THEN 'held' {busy} ELSE 'idle' END
    ) FROM share WHERE queue = :queue {whose}"""


_FREE = "owner = share.owner AND state = :stage AND token IS NULL AND ended IS NULL"
_IN_TURN = f"""{_FREE} AND (after IS NULL OR NOT EXISTS (
    SELECT 1 FROM job AS before WHERE before.id = job.after AND before.ended IS NULL))"""
"""A job of a session runs when the one before it is over."""
_RUNS = "owner = share.owner AND state = 'running' AND ended IS NULL"


def _any(models: Iterable[str], where: str) -> str:
    """Whether there is a job of one of the models."""
    found = [f"EXISTS (SELECT 1 FROM job WHERE model = {one} AND {where})" for one in models]
    return f"({' OR '.join(found)})"


def _first(models: Sequence[str], where: str) -> str:
    """The oldest job of any of the models: one search for each, however many jobs there are."""
    order = "ORDER BY created, id LIMIT 1"
    found = [f"SELECT body, created, id FROM job WHERE model = {m} AND {where}" for m in models]
    if len(found) == 1:
        return f"({found[0].replace(', created, id', '', 1)} {order})"
    every = " UNION ALL ".join([f"SELECT * FROM ({one} {order})" for one in found])
    return f"(SELECT body FROM ({every}) {order})"


def _running(rows: sqlite3.Connection, owner: str) -> int:
    query = "SELECT count(*) FROM job WHERE owner = ? AND ended IS NULL AND state = 'running'"
    return rows.execute(query, (owner,)).fetchone()[0]
