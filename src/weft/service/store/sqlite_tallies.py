"""`tallies.TallyRows` in SQLite: a part of `sqlite.SqliteLedger`."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

import msgspec

from weft.service.jobs.tally import Count
from weft.service.store.database import Database

TABLES = (
    """CREATE TABLE tally (
        name TEXT NOT NULL, labels TEXT NOT NULL, value REAL NOT NULL, PRIMARY KEY (name, labels)
    ) STRICT, WITHOUT ROWID""",
    "CREATE TABLE beat (name TEXT PRIMARY KEY, moment REAL NOT NULL) STRICT",
)
"""What these rows need: one step of `tables.MIGRATIONS`. Never change it."""

_ADD = """INSERT INTO tally (name, labels, value) VALUES (?, ?, ?)
    ON CONFLICT (name, labels) DO UPDATE SET value = value + excluded.value"""
_LABELS = tuple[tuple[str, str], ...]


class SqliteTallies:
    """See the module's text."""

    _database: Database

    def add_tallies(self, counts: Iterable[Count]) -> None:
        with self._database.write(durable=False) as rows:
            tally(rows, counts)

    def tallies(self) -> list[Count]:
        with self._database.read() as rows:
            found = rows.execute("SELECT name, labels, value FROM tally").fetchall()
        counts = [Count(name, _labels(labels), value) for name, labels, value in found]
        return sorted(counts, key=lambda one: (one.name, one.labels))

    def beat(self, name: str, now: float) -> None:
        with self._database.write(durable=False) as rows:
            rows.execute("INSERT OR REPLACE INTO beat (name, moment) VALUES (?, ?)", (name, now))

    def beats(self) -> dict[str, float]:
        with self._database.read() as rows:
            return dict(rows.execute("SELECT name, moment FROM beat").fetchall())


def tally(rows: sqlite3.Connection, counts: Iterable[Count]) -> None:
    for one in counts:
        rows.execute(_ADD, (one.name, msgspec.json.encode(one.labels).decode(), one.value))


def _labels(text: str) -> tuple[tuple[str, str], ...]:
    return msgspec.json.decode(text, type=_LABELS)
