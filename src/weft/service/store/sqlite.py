"""The ledger on one machine: rows in an SQLite file, which all processes of a server open.

    ledger = open_ledger(folder / "weft.sqlite", settings, carry=Shell(bells, objects))

A job is one row: the `Job` as msgpack, and columns to find it by, which follow from it. A step and
the notes it commands are one transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable
from pathlib import Path

import msgspec
from msgspec.structs import replace

from weft.errors import NoSuchError
from weft.service.jobs import life
from weft.service.jobs.life import Job, Leased
from weft.service.jobs.tally import tallied
from weft.service.jobs.usage import spent
from weft.service.store import sqlite_fair as fair
from weft.service.store import sqlite_kept as kept
from weft.service.store.claims import Claiming, Step, in_turn
from weft.service.store.database import Database, one_of_many
from weft.service.store.ids import new_token
from weft.service.store.interface import Card, Carry, Key, LostClaimError, Note, Question
from weft.service.store.said import (
    Asked,
    check_claim,
    check_over,
    entries_of,
    full,
    lost,
)
from weft.service.store.session_rows import SqliteSessions
from weft.service.store.sqlite_claims import Turns, anything
from weft.service.store.sqlite_models import SqliteModels, use
from weft.service.store.sqlite_tallies import SqliteTallies, tally
from weft.service.store.sqlite_usage import SqliteUsage, add
from weft.service.store.tables import KEY, MIGRATIONS, key_of, row_of
from weft.settings import Settings

_REQUEST = "owner = ? AND request_id = ?"
_QUESTION = "id, kind, owner, body, answer, ok, created"
_FREE = "(0, 2)"
"""A question is free (0), taken (1), free once more (2), and taken for the last time (3)."""
_CARD = "model, state, fingerprint, card, tables, reason"


def open_ledger(
    path: Path, settings: Settings | None = None, carry: Carry | None = None
) -> SqliteLedger:
    """Opens the file, or makes it. Raises `ServerError` where it cannot be read."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    database = Database(path, MIGRATIONS)
    return SqliteLedger(database, settings or Settings(), carry or (lambda job, commands: None))


class SqliteLedger(SqliteModels, SqliteSessions, SqliteUsage, SqliteTallies, Claiming):
    """`interface.Ledger` in an SQLite file."""

    def __init__(self, database: Database, settings: Settings, carry: Carry) -> None:
        self._settings = settings
        self._carry = carry
        self._database = database

    # -- jobs --------------------------------------------------------------------------------

    def submit(self, job: Job, limit: int) -> tuple[Job, bool]:
        with self._database.write() as rows:
            known = _job(rows, _REQUEST, job.owner, job.request_id)
            if known is not None:
                return known, False
            if _waiting(rows, job.owner) >= limit:
                raise full(limit)
            _insert(rows, job)
            fair.arrive(rows, job, job.created)
            self._note_all(rows, job, life.BEGIN)
        self._carry(job, life.BEGIN)
        return job, True

    def job(self, id: str) -> Job | None:
        with self._database.read() as rows:
            return _job(rows, "id = ?", id)

    def find(self, owner: str, request_id: str) -> Job | None:
        with self._database.read() as rows:
            return _job(rows, _REQUEST, owner, request_id)

    def jobs(self, owner: str, limit: int = 100, before: str | None = None) -> list[Job]:
        older = "owner = ?1 AND (?2 IS NULL OR id < ?2) ORDER BY id DESC LIMIT ?3"
        with self._database.read() as rows:
            return _jobs(rows, older, owner, before, limit)

    def step(self, id: str, event: life.Event, now: float, token: str | None = None) -> Job:
        with self._database.write(durable=not isinstance(event, life.Priced)) as rows:
            change = self._step(rows, _held(rows, id, token), event, now)
        self._carry(change.job, change.commands)
        return change.job

    def step_all(
        self, steps: Iterable[tuple[str, life.Event, str | None]], now: float
    ) -> list[Job | Exception]:
        done: list[life.Change | Exception] = []
        steps = list(steps)
        durable = not all(isinstance(event, life.Priced) for _, event, _ in steps)
        with self._database.write(durable=durable) as rows:
            for id, event, token in steps:
                try:
                    with one_of_many(rows):
                        done.append(self._step(rows, _held(rows, id, token), event, now))
                except (LostClaimError, NoSuchError, life.IllegalStepError) as error:
                    done.append(error)
        for change in done:
            if isinstance(change, life.Change):
                self._carry(change.job, change.commands)
        return [change.job if isinstance(change, life.Change) else change for change in done]

    def _claim(
        self, asked: Asked, holder: str, now: float, until: float, most: int
    ) -> tuple[list[Job], list[Step]]:
        with self._database.read() as rows:
            if not anything(rows, asked):  # most calls end here: no writer is waited for
                return [], []
        changes: list[life.Change] = []
        with self._database.write(durable=False) as rows:
            turns = Turns(rows, asked, now)
            for job in in_turn(asked, most, turns.next):
                changes.append(self._step(rows, job, Leased(holder, new_token(), until), now))
            turns.write()
        for change in changes:
            self._carry(change.job, change.commands)
        return [change.job for change in changes], [*turns.day.refusals()]

    def renew(self, id: str, token: str, until: float) -> bool:
        with self._database.write(durable=False) as rows:
            job = replace(_held(rows, id, token), until=until)
            _update(rows, job)
        return not job.cancelling

    def release(self, holder: str | None, now: float) -> list[Job]:
        held = "token IS NOT NULL AND (?1 IS NULL OR holder = ?1) ORDER BY created, id"
        return self._lose(held, holder, now)

    def expire(self, now: float) -> list[Job]:
        return self._lose("token IS NOT NULL AND until < ?1 ORDER BY created, id", now, now)

    def _lose(self, which: str, value: str | float | None, now: float) -> list[Job]:
        with self._database.read() as rows:
            if not _jobs(rows, which, value):
                return []
        with self._database.write() as rows:
            attempts = self._settings.attempts
            changes = [
                self._step(rows, job, lost(job, attempts), now) for job in _jobs(rows, which, value)
            ]
        for change in changes:
            self._carry(change.job, change.commands)
        return [change.job for change in changes]

    def remove(self, id: str) -> None:
        with self._database.write() as rows:
            job = _job(rows, "id = ?", id)
            if job is not None:
                check_over(job)
                rows.execute("DELETE FROM job WHERE id = ?", (id,))

    def unfinished(self) -> list[Job]:
        with self._database.read() as rows:
            return _jobs(rows, "ended IS NULL ORDER BY created, id")

    def ahead(self, id: str) -> int:
        with self._database.read() as rows:
            job = _job(rows, "id = ? AND state IN ('received', 'queued')", id)
            return 0 if job is None else fair.ahead(rows, job)

    def counts(self) -> dict[tuple[str, str], int]:
        query = "SELECT model, state, count(*) FROM job WHERE ended IS NULL GROUP BY model, state"
        with self._database.read() as rows:
            return {(model, state): count for model, state, count in rows.execute(query)}

    def _step(
        self, rows: sqlite3.Connection, job: Job, event: life.Event, now: float
    ) -> life.Change:
        change = life.step(job, event, now)
        _update(rows, change.job)
        fair.arrive(rows, change.job, now)
        used = spent(job, change.job, now)
        if used is not None:
            add(rows, used)
            if job.state == "running":
                fair.settle(rows, change.job, used.seconds)
        tally(rows, tallied(job, change.job))
        if "running" in (job.state, change.job.state):
            use(rows, job.model, now)
        self._note_all(rows, change.job, change.commands)
        if change.job.ended is not None:
            kept.ended(rows, change.job)
        return change

    def _note_all(
        self, rows: sqlite3.Connection, job: Job, commands: Iterable[life.Command]
    ) -> None:
        for kind, data in entries_of(job, commands, self._settings.keep_seconds):
            _note(rows, job.id, kind, data)

    # -- what followers see --------------------------------------------------------------------

    def note(self, id: str, token: str, kind: str, data: bytes) -> int:
        with self._database.write(durable=False) as rows:
            _held(rows, id, token)
            return _note(rows, id, kind, data)

    def notes(self, id: str, after: int = 0, limit: int = 1000) -> list[Note]:
        query = "SELECT seq, kind, data FROM note WHERE job = ? AND seq > ? ORDER BY seq LIMIT ?"
        with self._database.read() as rows:
            return [Note(*row) for row in rows.execute(query, (id, after, limit))]

    def latest(self, ids: Collection[str]) -> dict[str, int]:
        query = """SELECT value, (SELECT max(seq) FROM note WHERE job = value) AS last
            FROM json_each(?) WHERE last IS NOT NULL"""
        with self._database.read() as rows:
            return dict(rows.execute(query, (msgspec.json.encode(list(ids)).decode(),)))

    # -- keys ----------------------------------------------------------------------------------

    def add_key(self, key: Key) -> None:
        with self._database.write() as rows:
            rows.execute(
                f"INSERT OR REPLACE INTO key ({KEY}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row_of(key),
            )

    def key(self, digest: str) -> Key | None:
        query = f"SELECT {KEY} FROM key WHERE digest = ? AND revoked IS NULL"
        with self._database.read() as rows:
            row = rows.execute(query, (digest,)).fetchone()
        return None if row is None else key_of(row)

    def keys(self) -> list[Key]:
        query = f"SELECT {KEY} FROM key ORDER BY created, digest"
        with self._database.read() as rows:
            return [key_of(row) for row in rows.execute(query)]

    def revoke(self, digest: str, now: float) -> None:
        with self._database.write() as rows:
            done = rows.execute("UPDATE key SET revoked = ? WHERE digest = ?", (now, digest))
            if done.rowcount == 0:
                raise NoSuchError(f"there is no key with the digest {digest}")

    def use_key(self, digest: str, now: float) -> None:
        with self._database.write(durable=False) as rows:
            rows.execute("UPDATE key SET used = ? WHERE digest = ?", (now, digest))

    # -- questions -----------------------------------------------------------------------------

    def ask(self, question: Question) -> None:
        with self._database.write(durable=False) as rows:
            rows.execute(
                f"INSERT INTO question ({_QUESTION}) VALUES (?, ?, ?, ?, ?, ?, ?)",
                msgspec.structs.astuple(question),
            )

    def next_question(self) -> Question | None:
        free = f"""SELECT id FROM question LEFT JOIN share
            ON share.queue = 'ask' AND share.owner = question.owner WHERE taken IN {_FREE}
            ORDER BY coalesce(share.since, 0.0), question.created, question.rowid LIMIT 1"""
        with self._database.read() as rows:
            if rows.execute(free).fetchone() is None:
                return None
        take = f"UPDATE question SET taken = taken + 1 WHERE id = ({free}) RETURNING {_QUESTION}"
        with self._database.write(durable=False) as rows:
            taken = _question(rows.execute(take).fetchone())
            fair.asked(rows, taken and taken.owner)
            return taken

    def reopen_questions(self) -> None:
        with self._database.write(durable=False) as rows:
            rows.execute("UPDATE question SET taken = 2 WHERE taken = 1 AND answer IS NULL")

    def answer(self, id: str, answer: bytes, ok: bool) -> None:
        with self._database.write(durable=False) as rows:
            rows.execute("UPDATE question SET answer = ?, ok = ? WHERE id = ?", (answer, ok, id))

    def take_answer(self, id: str) -> Question | None:
        answered = "FROM question WHERE id = ? AND answer IS NOT NULL"
        with self._database.read() as rows:
            if rows.execute(f"SELECT 1 {answered}", (id,)).fetchone() is None:
                return None
        with self._database.write(durable=False) as rows:
            taken = rows.execute(f"DELETE {answered} RETURNING {_QUESTION}", (id,))
            return _question(taken.fetchone())

    def withdraw(self, id: str) -> None:
        with self._database.write(durable=False) as rows:
            rows.execute("DELETE FROM question WHERE id = ?", (id,))

    def drop_questions(self, before: float) -> None:
        with self._database.write(durable=False) as rows:
            rows.execute("DELETE FROM question WHERE created < ?", (before,))

    # -- models --------------------------------------------------------------------------------

    def put_card(self, card: Card) -> None:
        with self._database.write() as rows:
            rows.execute(
                f"INSERT OR REPLACE INTO card ({_CARD}) VALUES (?, ?, ?, ?, ?, ?)",
                msgspec.structs.astuple(card),
            )

    def card(self, model: str) -> Card | None:
        with self._database.read() as rows:
            row = rows.execute(f"SELECT {_CARD} FROM card WHERE model = ?", (model,)).fetchone()
        return None if row is None else Card(*row)

    def cards(self) -> list[Card]:
        with self._database.read() as rows:
            return [Card(*row) for row in rows.execute(f"SELECT {_CARD} FROM card ORDER BY model")]

    def drop_cards(self) -> None:
        with self._database.write() as rows:
            rows.execute("DELETE FROM card")

    def close(self) -> None:
        self._database.close()


# -- rows of jobs ----------------------------------------------------------------------------------

_decode = msgspec.msgpack.Decoder(Job).decode
_encode = msgspec.msgpack.Encoder().encode


def _job(rows: sqlite3.Connection, where: str, *values: object) -> Job | None:
    row = rows.execute(f"SELECT body FROM job WHERE {where}", values).fetchone()
    return None if row is None else _decode(row[0])


def _jobs(rows: sqlite3.Connection, where: str, *values: object) -> list[Job]:
    found = rows.execute(f"SELECT body FROM job WHERE {where}", values)
    return [_decode(body) for (body,) in found]


def _held(rows: sqlite3.Connection, id: str, token: str | None) -> Job:
    return check_claim(_job(rows, "id = ?", id), id, token)


def _waiting(rows: sqlite3.Connection, owner: str) -> int:
    query = """SELECT count(*) FROM job
        WHERE owner = ? AND ended IS NULL AND state IN ('received', 'queued')"""
    return rows.execute(query, (owner,)).fetchone()[0]


def _insert(rows: sqlite3.Connection, job: Job) -> None:
    rows.execute(
        """INSERT INTO job (owner, request_id, model, created,
            state, holder, token, until, ended, charge, lane, tokens, peak, body,
            keep, after, bytes, id)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
        (
            *(job.owner, job.request_id, job.model, job.created),
            *(*_changing(job), job.keep, job.after, job.request_bytes, job.id),
        ),
    )


def _update(rows: sqlite3.Connection, job: Job) -> None:
    rows.execute(
        """UPDATE job SET state = ?, holder = ?, token = ?, until = ?, ended = ?, charge = ?,
            lane = ?, tokens = ?, peak = ?, body = ? WHERE id = ?""",
        (*_changing(job), job.id),
    )


def _changing(job: Job) -> tuple[object, ...]:
    held = job.state, job.holder, job.token, job.until, job.ended
    return *held, *fair.columns(job), _encode(job)


def _note(rows: sqlite3.Connection, id: str, kind: str, data: bytes) -> int:
    add = """INSERT INTO note (job, seq, kind, data)
        SELECT ?1, coalesce(max(seq), 0) + 1, ?2, ?3 FROM note WHERE job = ?1 RETURNING seq"""
    return rows.execute(add, (id, kind, data)).fetchone()[0]


def _question(row: tuple | None) -> Question | None:
    if row is None:
        return None
    id, kind, owner, body, answer, ok, created = row
    return Question(id, kind, owner, body, answer, bool(ok), created)
