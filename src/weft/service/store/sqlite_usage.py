"""`usage.UsageRows` in SQLite: a part of `sqlite.SqliteLedger`."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

import msgspec

from weft.service.jobs.usage import COUNTED, WHOSE, Usage
from weft.service.store.database import Database
from weft.service.store.usage import Space

TABLES = (
    """CREATE TABLE usage (
        owner TEXT NOT NULL, day TEXT NOT NULL, model TEXT NOT NULL, jobs INTEGER NOT NULL,
        cost REAL NOT NULL, seconds REAL NOT NULL, up INTEGER NOT NULL, down INTEGER NOT NULL,
        requests INTEGER NOT NULL, refusals INTEGER NOT NULL, weights INTEGER NOT NULL,
        PRIMARY KEY (owner, day, model)
    ) STRICT, WITHOUT ROWID""",
)
SPACE_TABLES = (
    """CREATE TABLE space (
        model TEXT PRIMARY KEY, free INTEGER NOT NULL, most INTEGER NOT NULL,
        measured REAL NOT NULL
    ) STRICT""",
)
"""What these rows need: a step of `tables.MIGRATIONS` each. Never change them."""

_COLUMNS = ", ".join((*WHOSE, *COUNTED))
_ADD = (
    f"INSERT INTO usage ({_COLUMNS}) VALUES ({', '.join('?' for _ in (*WHOSE, *COUNTED))}) "
    f"ON CONFLICT ({', '.join(WHOSE)}) DO UPDATE SET "
    + ", ".join(f"{name} = {name} + excluded.{name}" for name in COUNTED)
)


class SqliteUsage:
    """See the module's text."""

    _database: Database

    def put_space(self, space: Space) -> None:
        with self._database.write(durable=False) as rows:
            rows.execute(
                "INSERT OR REPLACE INTO space (model, free, most, measured) VALUES (?, ?, ?, ?)",
                msgspec.structs.astuple(space),
            )

    def space(self, model: str) -> Space | None:
        query = "SELECT model, free, most, measured FROM space WHERE model = ?"
        with self._database.read() as rows:
            row = rows.execute(query, (model,)).fetchone()
        return None if row is None else Space(*row)

    def add_usage(self, rows: Iterable[Usage]) -> None:
        with self._database.write(durable=False) as connection:
            for usage in rows:
                add(connection, usage)

    def usage(self, owner: str | None = None, since: str = "", until: str = "9") -> list[Usage]:
        query = f"""SELECT {_COLUMNS} FROM usage WHERE (?1 IS NULL OR owner = ?1)
            AND day >= ?2 AND day <= ?3 ORDER BY day, owner, model"""
        with self._database.read() as rows:
            return [_usage(row) for row in rows.execute(query, (owner, since, until))]


def seconds(rows: sqlite3.Connection, owner: str, day: str) -> float:
    """Those of a day, of all models."""
    query = "SELECT total(seconds) FROM usage WHERE owner = ? AND day = ?"
    return rows.execute(query, (owner, day)).fetchone()[0]


def add(rows: sqlite3.Connection, usage: Usage) -> None:
    rows.execute(_ADD, msgspec.structs.astuple(usage))


def _usage(row: tuple) -> Usage:
    return Usage(**dict(zip(Usage.__struct_fields__, row, strict=True)))
