"""How much the jobs of each owner take, in SQLite: a row for each, which triggers keep up to date.

Whoever adds, ends or removes a job has so put it to its owner's account, in the same transaction.
"""

from __future__ import annotations

import sqlite3

from weft.service.jobs.life import Job
from weft.service.store.kept import bytes_of

_ADD = """INSERT INTO kept (owner, bytes) VALUES (new.owner, {})
    ON CONFLICT (owner) DO UPDATE SET bytes = bytes + excluded.bytes"""

TABLES = (
    "ALTER TABLE job ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0",
    """CREATE TABLE kept (
        owner TEXT PRIMARY KEY, bytes INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
    f"""CREATE TRIGGER job_kept AFTER INSERT ON job WHEN new.bytes != 0 BEGIN
        {_ADD.format("new.bytes")};
    END""",
    f"""CREATE TRIGGER job_ended AFTER UPDATE OF bytes ON job WHEN new.bytes != old.bytes BEGIN
        {_ADD.format("new.bytes - old.bytes")};
    END""",
    """CREATE TRIGGER job_gone AFTER DELETE ON job WHEN old.bytes != 0 BEGIN
        UPDATE kept SET bytes = bytes - old.bytes WHERE owner = old.owner;
    END""",
    "CREATE INDEX job_ended_of_owner ON job (owner, ended) WHERE ended IS NOT NULL",
)
"""What these rows need: one step of `tables.MIGRATIONS`. Never change it. Jobs of before count for
nothing: what they take stands in no column."""


def ended(rows: sqlite3.Connection, job: Job) -> None:
    """A job is over, and all its notes are there."""
    told = "SELECT total(length(data)) FROM note WHERE job = ?"
    (bytes_,) = rows.execute(told, (job.id,)).fetchone()
    rows.execute("UPDATE job SET bytes = ? WHERE id = ?", (bytes_of(job, int(bytes_)), job.id))


def kept_bytes(rows: sqlite3.Connection, owner: str) -> int:
    row = rows.execute("SELECT bytes FROM kept WHERE owner = ?", (owner,)).fetchone()
    return 0 if row is None else row[0]
