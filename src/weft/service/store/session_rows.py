"""Sessions as rows, in SQLite and in memory: the calls of `sessions.SessionRows`."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from msgspec.structs import replace

from weft.service.store.database import Database
from weft.service.store.sessions import Session, full

TABLES = (
    """CREATE TABLE session (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, request_id TEXT NOT NULL, until REAL NOT NULL,
        ended REAL, body BLOB NOT NULL, UNIQUE (owner, request_id)
    ) STRICT""",
    "ALTER TABLE job ADD COLUMN after TEXT",
)


class SqliteSessions:
    """The sessions of an SQLite ledger."""

    _database: Database

    def open_session(self, session: Session, limit: int) -> Session:
        mine = "owner = ? AND request_id = ?"
        open_ones = "owner = ? AND ended IS NULL AND until >= ?"
        with self._database.write() as rows:
            known = _found(rows, mine, session.owner, session.request_id)
            if known:
                return known[0]
            if len(_found(rows, open_ones, session.owner, session.created)) >= limit:
                raise full(limit)
            _put(rows, session)
        return session

    def session(self, id: str) -> Session | None:
        with self._database.read() as rows:
            return next(iter(_found(rows, "id = ?", id)), None)

    def seat(self, id: str, number: int, job: str, until: float) -> None:
        with self._database.write(durable=False) as rows:
            for known in _found(rows, "id = ?", id):
                _put(rows, seated(known, number, job, until))

    def end_session(self, id: str, now: float) -> None:
        with self._database.write(durable=False) as rows:
            for known in _found(rows, "id = ? AND ended IS NULL", id):
                _put(rows, replace(known, ended=now))

    def open_sessions(self, now: float) -> dict[str, int]:
        with self._database.read() as rows:
            return counted(_found(rows, "ended IS NULL AND until >= ?", now))

    def forget_sessions(self, before: float) -> None:
        with self._database.write(durable=False) as rows:
            rows.execute("DELETE FROM session WHERE coalesce(ended, until) < ?", (before,))


class MemorySessions:
    """The sessions of a ledger in memory."""

    _lock: threading.Lock

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}

    def open_session(self, session: Session, limit: int) -> Session:
        with self._lock:
            mine = [one for one in self._sessions.values() if one.owner == session.owner]
            for known in mine:
                if known.request_id == session.request_id:
                    return known
            if sum(not one.over(session.created) for one in mine) >= limit:
                raise full(limit)
            self._sessions[session.id] = session
        return session

    def session(self, id: str) -> Session | None:
        with self._lock:
            return self._sessions.get(id)

    def seat(self, id: str, number: int, job: str, until: float) -> None:
        with self._lock:
            if id in self._sessions:
                self._sessions[id] = seated(self._sessions[id], number, job, until)

    def end_session(self, id: str, now: float) -> None:
        with self._lock:
            known = self._sessions.get(id)
            if known is not None and known.ended is None:
                self._sessions[id] = replace(known, ended=now)

    def open_sessions(self, now: float) -> dict[str, int]:
        with self._lock:
            return counted([one for one in self._sessions.values() if not one.over(now)])

    def forget_sessions(self, before: float) -> None:
        with self._lock:
            for id, one in list(self._sessions.items()):
                if (one.until if one.ended is None else one.ended) < before:
                    del self._sessions[id]


def counted(sessions: Iterable[Session]) -> dict[str, int]:
    """How many there are, by model."""
    found: dict[str, int] = {}
    for session in sessions:
        found[session.model] = found.get(session.model, 0) + 1
    return found


def seated(session: Session, number: int, job: str, until: float) -> Session:
    """After request `number` (0: none, only a sign of life); the lease never gets shorter."""
    until = max(session.until, until)
    if number > session.last:
        return replace(session, last=number, job=job, until=until)
    return replace(session, until=until)


def _found(rows: Any, where: str, *values: object) -> list[Session]:
    found: Iterator[Any] = rows.execute(f"SELECT body FROM session WHERE {where}", values)
    return [msgspec.msgpack.decode(body, type=Session) for (body,) in found]


def _put(rows: Any, session: Session) -> None:
    rows.execute(
        """INSERT OR REPLACE INTO session (id, owner, request_id, until, ended, body)
            VALUES (?, ?, ?, ?, ?, ?)""",
        (
            session.id,
            session.owner,
            session.request_id,
            session.until,
            session.ended,
            msgspec.msgpack.encode(session),
        ),
    )
