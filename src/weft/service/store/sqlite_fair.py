"""Fair order in SQLite: what `jobs.fair` decides on, and what it decided. Used by `sqlite`.

Each function works inside the transaction of its caller. A claim asks the tables for the shares of
its queue and then, in their order, for the first job of one owner after another: two or three short
searches of an index, however many jobs wait.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator

import msgspec

from weft.service.jobs.fair import (
    PRICING,
    Head,
    Pace,
    Share,
    Turn,
    arrived,
    charge_of,
    choose,
    learnt,
    queue_of,
    run_queue,
    settled,
)
from weft.service.jobs.life import Job
from weft.service.store.said import Asked

TABLES = (
    "CREATE TABLE queue (name TEXT PRIMARY KEY, clock REAL NOT NULL) STRICT",
    """CREATE TABLE share (
        queue TEXT NOT NULL, owner TEXT NOT NULL, tag REAL NOT NULL, since REAL NOT NULL,
        PRIMARY KEY (queue, owner)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX share_in_order ON share (queue, tag, since, owner)",
    "ALTER TABLE job ADD COLUMN charge REAL NOT NULL DEFAULT 1e9",
    "ALTER TABLE job ADD COLUMN lane TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE job ADD COLUMN tokens INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE job ADD COLUMN peak INTEGER NOT NULL DEFAULT 0",
    """CREATE INDEX job_line ON job (model, state, owner, created, id, charge, token, ended)
        WHERE ended IS NULL""",
    """CREATE INDEX job_lane ON job (
        model, state, lane, owner, created, id, tokens, peak, token, ended
    ) WHERE ended IS NULL""",
    """INSERT INTO share SELECT 'run/' || model, owner, 0.0, min(created) FROM job
        WHERE state = 'queued' GROUP BY model, owner""",
    """INSERT INTO share SELECT 'price', owner, 0.0, min(created) FROM job
        WHERE state = 'received' GROUP BY owner""",
)
"""What these rows need: one step of `tables.MIGRATIONS`. Never change it."""
PACE_TABLES = (
    "ALTER TABLE queue ADD COLUMN charged REAL NOT NULL DEFAULT 0.0",
    "ALTER TABLE queue ADD COLUMN seconds REAL NOT NULL DEFAULT 0.0",
)
"""Another step: the pace of each queue."""

_FREE = "model = ? AND state = ? AND owner = ? AND token IS NULL AND ended IS NULL"
_IN_TURN = """AND (after IS NULL OR NOT EXISTS (
    SELECT 1 FROM job AS before WHERE before.id = job.after AND before.ended IS NULL))"""
"""A job of a session runs when the one before it is over."""
_SET_SHARE = "INSERT OR REPLACE INTO share (queue, owner, tag, since) VALUES (?, ?, ?, ?)"
_SET_CLOCK = """INSERT INTO queue (name, clock) VALUES (?, ?)
    ON CONFLICT (name) DO UPDATE SET clock = excluded.clock"""
_SET_PACE = """INSERT INTO queue (name, clock, charged, seconds) VALUES (?, 0.0, ?, ?)
    ON CONFLICT (name) DO UPDATE SET charged = excluded.charged, seconds = excluded.seconds"""
_job_of = msgspec.msgpack.Decoder(Job).decode


def anything(rows: sqlite3.Connection, asked: Asked) -> bool:
    """Whether any job may be there for the asking."""
    which, values = _fitting(asked)
    query = f"""SELECT 1 FROM job WHERE model = ? AND state = ? AND ended IS NULL
        AND token IS NULL {which} LIMIT 1"""
    found = (rows.execute(query, (one, asked.stage, *values)).fetchone() for one in asked.models)
    return any(row is not None for row in found)


def _fitting(asked: Asked) -> tuple[str, tuple[object, ...]]:
    """What `Asked.fits` says, in SQL."""
    wanted = {"lane =": asked.lane, "tokens <=": asked.tokens, "peak <=": asked.peak}
    wanted["peak >"] = asked.beyond
    given = {text: value for text, value in wanted.items() if value is not None}
    return "".join(f"AND {text} ? " for text in given), tuple(given.values())


def next_job(rows: sqlite3.Connection, asked: Asked, now: float) -> Job | None:
    """The next job in fair order; its turn is written down. Of several queues, the oldest job."""
    turns = [(queue, _turn(rows, queue, asked, now)) for queue in _queues(asked)]
    found = [(queue, turn) for queue, turn in turns if turn is not None]
    if not found:
        return None
    queue, turn = min(found, key=lambda one: (one[1].job.created, one[1].job.id))
    _set_clock(rows, queue, turn.clock)
    for owner, share in turn.shares.items():
        if share is None:
            rows.execute("DELETE FROM share WHERE queue = ? AND owner = ?", (queue, owner))
        else:
            rows.execute(_SET_SHARE, (queue, owner, share.tag, share.since))
    return turn.job


def _queues(asked: Asked) -> Iterable[str]:
    return [PRICING] if asked.stage == "received" else [run_queue(one) for one in asked.models]


def _turn(rows: sqlite3.Connection, queue: str, asked: Asked, now: float) -> Turn | None:
    mine = [model for model in asked.models if queue in (PRICING, run_queue(model))]

    def head(owner: str) -> Head:
        jobs = [job for model in mine if (job := _first(rows, asked, owner, model))]
        if not jobs:
            return _without(rows, queue, asked, owner, mine)
        job = min(jobs, key=lambda job: (job.created, job.id))
        most = asked.most_running(job)
        return "held" if most and _running(rows, owner) >= most else job

    return choose(_shares(rows, queue), _clock(rows, queue), head, now)


def _first(rows: sqlite3.Connection, asked: Asked, owner: str, model: str) -> Job | None:
    which, values = _fitting(asked)
    turn = _IN_TURN if asked.stage == "queued" else ""
    query = f"SELECT body FROM job WHERE {_FREE} {turn} {which} ORDER BY created, id LIMIT 1"
    row = rows.execute(query, (model, asked.stage, owner, *values)).fetchone()
    return None if row is None else _job_of(row[0])


def _without(
    rows: sqlite3.Connection, queue: str, asked: Asked, owner: str, models: list[str]
) -> Head:
    """What an owner has of whose jobs none may be taken."""
    anyhow = asked._replace(lane=None, tokens=None, peak=None, beyond=None)
    if asked.is_choosy and any(_first(rows, anyhow, owner, model) for model in models):
        return "unfit"
    waits = _waits(rows, queue, asked.stage, owner)
    if waits or _is_out_of_turn(rows, asked, owner, models):
        return "held"
    return "busy" if queue != PRICING and _runs(rows, owner, models) else "idle"


def _is_out_of_turn(rows: sqlite3.Connection, asked: Asked, owner: str, models: list[str]) -> bool:
    """Whether an owner has jobs here which wait for others of his own."""
    query = f"SELECT 1 FROM job WHERE {_FREE} LIMIT 1"
    found = (rows.execute(query, (one, asked.stage, owner)).fetchone() for one in models)
    return any(row is not None for row in found)


def _waits(rows: sqlite3.Connection, queue: str, stage: str, owner: str) -> bool:
    """Whether an owner has anything in the queue, which may be of other models too."""
    if queue != PRICING:
        return False
    query = """SELECT 1 FROM job
        WHERE owner = ? AND state = ? AND token IS NULL AND ended IS NULL LIMIT 1"""
    return rows.execute(query, (owner, stage)).fetchone() is not None


def _runs(rows: sqlite3.Connection, owner: str, models: list[str]) -> bool:
    """Whether a job of an owner runs on one of the models."""
    query = """SELECT 1 FROM job
        WHERE owner = ? AND model = ? AND ended IS NULL AND state = 'running' LIMIT 1"""
    found = (rows.execute(query, (owner, model)).fetchone() for model in models)
    return any(row is not None for row in found)


def _running(rows: sqlite3.Connection, owner: str) -> int:
    query = "SELECT count(*) FROM job WHERE owner = ? AND ended IS NULL AND state = 'running'"
    return rows.execute(query, (owner,)).fetchone()[0]


# -- shares ----------------------------------------------------------------------------------------


def arrive(rows: sqlite3.Connection, job: Job, now: float) -> None:
    """A job waits from now on, if it does: its owner may have to be given a place."""
    queue = queue_of(job)
    if queue is None:
        return
    if _is_alone(rows, queue, job):
        rows.execute("DELETE FROM share WHERE queue = ?", (queue,))
        _set_clock(rows, queue, 0.0)
    share = _share(rows, queue, job.owner)
    if share is None or not _has_others(rows, queue, job):
        place = arrived(share, _clock(rows, queue), now)
        rows.execute(_SET_SHARE, (queue, job.owner, place.tag, place.since))


def settle(rows: sqlite3.Connection, job: Job, seconds: float) -> None:
    """A job that was begun is over, and took so long."""
    queue = run_queue(job.model)
    query = "SELECT charged, seconds FROM queue WHERE name = ?"
    known = rows.execute(query, (queue,)).fetchone()
    pace = learnt(Pace(*known) if known else Pace(), job, seconds)
    rows.execute(_SET_PACE, (queue, pace.charged, pace.seconds))
    share = _share(rows, queue, job.owner)
    if share is not None:
        place = settled(share, pace, job, seconds)
        rows.execute(_SET_SHARE, (queue, job.owner, place.tag, place.since))


def _is_alone(rows: sqlite3.Connection, queue: str, job: Job) -> bool:
    """Whether there is no other job that waits in this queue or came out of it and is not over."""
    if queue == PRICING:
        where, values = "state = 'received'", ()
    else:
        where, values = "model = ? AND state IN ('queued', 'running')", (job.model,)
    query = f"SELECT 1 FROM job WHERE {where} AND ended IS NULL AND id != ? LIMIT 1"
    return rows.execute(query, (*values, job.id)).fetchone() is None


def _has_others(rows: sqlite3.Connection, queue: str, job: Job) -> bool:
    """Whether something else of its owner waits in the queue."""
    query = """SELECT 1 FROM job WHERE owner = ?1 AND state = ?2 AND id != ?3
        AND (?4 IS NULL OR model = ?4) AND token IS NULL AND ended IS NULL LIMIT 1"""
    model = None if queue == PRICING else job.model
    return rows.execute(query, (job.owner, job.state, job.id, model)).fetchone() is not None


def _shares(rows: sqlite3.Connection, queue: str) -> Iterator[tuple[str, Share]]:
    """`fair.in_order`, read as far as somebody wants to know."""
    query = "SELECT owner, tag, since FROM share WHERE queue = ? ORDER BY tag, since, owner"
    return ((owner, Share(tag, since)) for owner, tag, since in rows.execute(query, (queue,)))


def _share(rows: sqlite3.Connection, queue: str, owner: str) -> Share | None:
    query = "SELECT tag, since FROM share WHERE queue = ? AND owner = ?"
    row = rows.execute(query, (queue, owner)).fetchone()
    return None if row is None else Share(*row)


def _clock(rows: sqlite3.Connection, queue: str) -> float:
    row = rows.execute("SELECT clock FROM queue WHERE name = ?", (queue,)).fetchone()
    return 0.0 if row is None else row[0]


def _set_clock(rows: sqlite3.Connection, queue: str, clock: float) -> None:
    rows.execute(_SET_CLOCK, (queue, clock))


def asked(rows: sqlite3.Connection, owner: str | None) -> None:
    """An owner's question was taken: others' come first now. None: nobody asks any more."""
    if owner is None:
        rows.execute("DELETE FROM share WHERE queue = 'ask'")
        return
    rows.execute(
        """INSERT OR REPLACE INTO share (queue, owner, tag, since)
            SELECT 'ask', ?, 0.0, coalesce(max(since), 0.0) + 1.0 FROM share WHERE queue = 'ask'""",
        (owner,),
    )


# -- what comes before -----------------------------------------------------------------------------

_AHEAD = """WITH place AS MATERIALIZED (
    SELECT id, created, coalesce(share.since, job.created) AS since,
        coalesce(share.tag, ?2) - job.charge + sum(job.charge) OVER (
            PARTITION BY job.owner ORDER BY created, id ROWS UNBOUNDED PRECEDING
        ) AS start
    FROM job LEFT JOIN share ON share.queue = 'run/' || ?1 AND share.owner = job.owner
    WHERE model = ?1 AND state IN ('received', 'queued') AND ended IS NULL
)
SELECT count(*) FROM place WHERE (start, since, created, id)
    < (SELECT start, since, created, id FROM place WHERE id = ?3)"""


def ahead(rows: sqlite3.Connection, job: Job) -> int:
    """`fair.before`, and those that run."""
    running = """SELECT count(*) FROM job
        WHERE model = ? AND state = 'running' AND ended IS NULL"""
    clock = _clock(rows, run_queue(job.model))
    (before,) = rows.execute(_AHEAD, (job.model, clock, job.id)).fetchone()
    return before + rows.execute(running, (job.model,)).fetchone()[0]


def columns(job: Job) -> tuple[object, ...]:
    """What stands in the row beside the job: `charge` for `ahead`, `lane`, `tokens`, `peak`."""
    return charge_of(job, "queued"), job.lane, job.tokens, job.peak
