"""`models.ModelRows` and `kept.KeptRows` in SQLite: a part of `sqlite.SqliteLedger`."""

from __future__ import annotations

import sqlite3

import msgspec
from msgspec.structs import replace

from weft.errors import NoSuchError
from weft.service.jobs.life import Job
from weft.service.store.database import Database
from weft.service.store.kept import Gone
from weft.service.store.models import Deployed, WorkerMemory
from weft.service.store.sqlite_kept import kept_bytes

TABLES = (
    "CREATE TABLE memory (model TEXT PRIMARY KEY, body BLOB NOT NULL, used REAL NOT NULL) STRICT",
    """CREATE TABLE deployed (
        id TEXT PRIMARY KEY, body BLOB NOT NULL, owner TEXT NOT NULL, created REAL NOT NULL,
        tries INTEGER NOT NULL
    ) STRICT""",
    "ALTER TABLE job ADD COLUMN keep REAL",
    """CREATE TABLE gone (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, ended REAL NOT NULL, expired REAL NOT NULL
    ) STRICT""",
    "CREATE INDEX gone_expired ON gone (expired)",
    "CREATE INDEX job_done_of_model ON job (model, ended) WHERE state = 'done'",
)
"""What these rows need: one step of `tables.MIGRATIONS`. Never change it."""

_MEMORY = "SELECT body, used FROM memory"
_DEPLOYED = "id, body, owner, created, tries"
_encode = msgspec.msgpack.Encoder().encode
_memory_of = msgspec.msgpack.Decoder(WorkerMemory).decode
_job_of = msgspec.msgpack.Decoder(Job).decode


class SqliteModels:
    """See the module's text."""

    _database: Database

    # -- memory ------------------------------------------------------------------------------

    def put_memory(self, memory: WorkerMemory) -> None:
        with self._database.write(durable=False) as rows:
            rows.execute(
                """INSERT INTO memory (model, body, used) VALUES (?, ?, ?)
                    ON CONFLICT (model) DO UPDATE SET body = excluded.body""",
                (memory.model, _encode(memory), memory.used),
            )

    def memory(self, model: str) -> WorkerMemory | None:
        with self._database.read() as rows:
            row = rows.execute(f"{_MEMORY} WHERE model = ?", (model,)).fetchone()
        return None if row is None else _memory(*row)

    def memories(self) -> list[WorkerMemory]:
        with self._database.read() as rows:
            return [_memory(*row) for row in rows.execute(f"{_MEMORY} ORDER BY model")]

    # -- deployed ----------------------------------------------------------------------------

    def put_deployed(self, deployed: Deployed) -> None:
        with self._database.write() as rows:
            rows.execute(
                f"INSERT OR REPLACE INTO deployed ({_DEPLOYED}) VALUES (?, ?, ?, ?, ?)",
                msgspec.structs.astuple(deployed),
            )

    def deployed(self) -> list[Deployed]:
        with self._database.read() as rows:
            found = rows.execute(f"SELECT {_DEPLOYED} FROM deployed ORDER BY id")
            return [Deployed(*row) for row in found]

    def remove_deployed(self, id: str) -> bool:
        with self._database.write() as rows:
            return rows.execute("DELETE FROM deployed WHERE id = ?", (id,)).rowcount > 0

    def drop_card(self, model: str) -> None:
        with self._database.write() as rows:
            rows.execute("DELETE FROM card WHERE model = ?", (model,))

    # -- jobs that are over ------------------------------------------------------------------

    def keep(self, id: str, seconds: float) -> Job:
        with self._database.write() as rows:
            row = rows.execute("SELECT body FROM job WHERE id = ?", (id,)).fetchone()
            if row is None:
                raise NoSuchError(f"no job {id} is here")
            job = replace(_job_of(row[0]), keep=seconds)
            rows.execute(
                "UPDATE job SET body = ?, keep = ? WHERE id = ?", (_encode(job), seconds, id)
            )
        return job

    def forget(self, now: float, keep_seconds: float) -> list[Job]:
        old = "FROM job WHERE ended IS NOT NULL AND ended + coalesce(keep, ?) < ?"
        with self._database.write() as rows:
            found = rows.execute(f"SELECT body {old}", (keep_seconds, now))
            jobs = [_job_of(body) for (body,) in found]
            rows.executemany(
                "INSERT OR REPLACE INTO gone (id, owner, ended, expired) VALUES (?, ?, ?, ?)",
                [(job.id, job.owner, job.ended, now) for job in jobs],
            )
            rows.executemany("DELETE FROM job WHERE id = ?", [(job.id,) for job in jobs])
        return jobs

    def kept_bytes(self, owner: str) -> int:
        with self._database.read() as rows:
            return kept_bytes(rows, owner)

    def first_ended(self, owner: str) -> Job | None:
        query = """SELECT body FROM job WHERE owner = ? AND ended IS NOT NULL
            ORDER BY ended LIMIT 1"""
        with self._database.read() as rows:
            row = rows.execute(query, (owner,)).fetchone()
        return None if row is None else _job_of(row[0])

    def gone(self, id: str) -> Gone | None:
        query = "SELECT id, owner, ended, expired FROM gone WHERE id = ?"
        with self._database.read() as rows:
            row = rows.execute(query, (id,)).fetchone()
        return None if row is None else Gone(*row)

    def drop_gone(self, before: float) -> None:
        with self._database.write(durable=False) as rows:
            rows.execute("DELETE FROM gone WHERE expired < ?", (before,))

    def recent(self, model: str, limit: int = 50) -> list[Job]:
        query = """SELECT body FROM job WHERE model = ? AND state = 'done'
            ORDER BY ended DESC LIMIT ?"""
        with self._database.read() as rows:
            return [_job_of(body) for (body,) in rows.execute(query, (model, limit))]


def use(rows: sqlite3.Connection, model: str, now: float) -> None:
    """A job of the model began or ended."""
    rows.execute("UPDATE memory SET used = max(used, ?) WHERE model = ?", (now, model))


def _memory(body: bytes, used: float) -> WorkerMemory:
    return replace(_memory_of(body), used=used)
