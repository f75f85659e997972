"""Fair order in SQLite: what `jobs.fair` decides on, and what it decided. Used by `sqlite`.

Each function works inside the transaction of its caller. Whose job is next is asked in
`sqlite_claims`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping

from weft.service.jobs.fair import (
    PRICING,
    Pace,
    Share,
    arrived,
    charge_of,
    learnt,
    queue_of,
    run_queue,
    settled,
)
from weft.service.jobs.life import Job

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

_SET_SHARE = "INSERT OR REPLACE INTO share (queue, owner, tag, since) VALUES (?, ?, ?, ?)"
_SET_CLOCK = """INSERT INTO queue (name, clock) VALUES (?, ?)
    ON CONFLICT (name) DO UPDATE SET clock = excluded.clock"""
_SET_PACE = """INSERT INTO queue (name, clock, charged, seconds) VALUES (?, 0.0, ?, ?)
    ON CONFLICT (name) DO UPDATE SET charged = excluded.charged, seconds = excluded.seconds"""

# -- shares ----------------------------------------------------------------------------------------


def arrive(rows: sqlite3.Connection, job: Job, now: float) -> None:
    """A job waits from now on, if it does: its owner may have to be given a place."""
    queue = queue_of(job)
    if queue is None:
        return
    if _is_alone(rows, queue, job):
        rows.execute("DELETE FROM share WHERE queue = ?", (queue,))
        set_clock(rows, queue, 0.0)
    share = _share(rows, queue, job.owner)
    if share is None or not _has_others(rows, queue, job):
        place = arrived(share, clock_of(rows, queue), now)
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


def _share(rows: sqlite3.Connection, queue: str, owner: str) -> Share | None:
    query = "SELECT tag, since FROM share WHERE queue = ? AND owner = ?"
    row = rows.execute(query, (queue, owner)).fetchone()
    return None if row is None else Share(*row)


def clock_of(rows: sqlite3.Connection, queue: str) -> float:
    row = rows.execute("SELECT clock FROM queue WHERE name = ?", (queue,)).fetchone()
    return 0.0 if row is None else row[0]


def move(rows: sqlite3.Connection, queue: str, shares: Mapping[str, Share | None]) -> None:
    """Owners stand here from now on; None: nothing is known of them any more."""
    for owner, share in shares.items():
        if share is None:
            rows.execute("DELETE FROM share WHERE queue = ? AND owner = ?", (queue, owner))
        else:
            rows.execute(_SET_SHARE, (queue, owner, share.tag, share.since))


def set_clock(rows: sqlite3.Connection, queue: str, clock: float) -> None:
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
    clock = clock_of(rows, run_queue(job.model))
    (before,) = rows.execute(_AHEAD, (job.model, clock, job.id)).fetchone()
    return before + rows.execute(running, (job.model,)).fetchone()[0]


def columns(job: Job) -> tuple[object, ...]:
    """What stands in the row beside the job: `charge` for `ahead`, `lane`, `tokens`, `peak`."""
    return charge_of(job, "queued"), job.lane, job.tokens, job.peak
