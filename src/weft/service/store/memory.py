"""The fake store: a ledger and objects in memory, for tests and for one process without a disk.

It keeps every promise of `interface` but durability. One lock makes each call one transaction.

    ledger, objects = MemoryLedger(), MemoryObjects()
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from msgspec.structs import replace

from weft.errors import NoSuchError
from weft.service.jobs import life
from weft.service.jobs.life import FINAL, Job, Leased
from weft.service.jobs.tally import tallied
from weft.service.jobs.usage import day_of, spent
from weft.service.store.claims import Claiming, Step, in_turn
from weft.service.store.days import Day
from weft.service.store.ids import new_token
from weft.service.store.interface import Card, Carry, Key, LostClaimError, Note, Question
from weft.service.store.kept import Gone, bytes_of
from weft.service.store.memory_fair import Lines
from weft.service.store.memory_models import MemoryModels
from weft.service.store.memory_usage import MemoryUsage
from weft.service.store.names import checked, checked_prefix, checked_range
from weft.service.store.said import (
    Asked,
    check_claim,
    check_over,
    entries_of,
    expires,
    full,
    lost,
)
from weft.service.store.session_rows import MemorySessions
from weft.service.store.tallies import MemoryTallies
from weft.settings import Settings

PIECE = 1 << 20


@dataclass
class _Row:
    job: Job
    notes: list[Note] = field(default_factory=list)

    def add(self, kind: str, data: bytes) -> int:
        self.notes.append(Note(len(self.notes) + 1, kind, data))
        return len(self.notes)


class MemoryLedger(MemoryModels, MemorySessions, MemoryUsage, MemoryTallies, Claiming):
    """`interface.Ledger` in memory."""

    def __init__(self, settings: Settings | None = None, carry: Carry | None = None) -> None:
        self._settings = settings or Settings()
        self._carry = carry or (lambda job, commands: None)
        self._lock = threading.Lock()
        self._rows: dict[str, _Row] = {}
        self._keys: dict[str, Key] = {}
        self._questions: dict[str, Question] = {}
        self._taken: dict[str, int] = {}  # how often; free those where that is even
        self._turns: dict[str, int] = {}  # of owners who ask, by number
        self._cards: dict[str, Card] = {}
        self._lines = Lines()
        self._gone: dict[str, Gone] = {}
        MemoryModels.__init__(self)
        MemoryUsage.__init__(self)
        MemoryTallies.__init__(self)
        MemorySessions.__init__(self)

    # -- jobs --------------------------------------------------------------------------------

    def submit(self, job: Job, limit: int) -> tuple[Job, bool]:
        with self._lock:
            known = self._find(job.owner, job.request_id)
            if known is not None:
                return known, False
            mine = (row.job for row in self._rows.values() if row.job.owner == job.owner)
            if sum(other.state in ("received", "queued") for other in mine) >= limit:
                raise full(limit)
            row = self._rows[job.id] = _Row(job)
            self._lines.arrive(job, self._jobs(), job.created)
            self._note(row, life.BEGIN)
        self._carry(job, life.BEGIN)
        return job, True

    def job(self, id: str) -> Job | None:
        with self._lock:
            row = self._rows.get(id)
            return None if row is None else row.job

    def find(self, owner: str, request_id: str) -> Job | None:
        with self._lock:
            return self._find(owner, request_id)

    def _find(self, owner: str, request_id: str) -> Job | None:
        jobs = (row.job for row in self._rows.values())
        mine = (job for job in jobs if (job.owner, job.request_id) == (owner, request_id))
        return next(mine, None)

    def jobs(self, owner: str, limit: int = 100, before: str | None = None) -> list[Job]:
        with self._lock:
            mine = [row.job for row in self._rows.values() if row.job.owner == owner]
        older = [job for job in mine if before is None or job.id < before]
        return sorted(older, key=lambda job: job.id, reverse=True)[:limit]

    def step(self, id: str, event: life.Event, now: float, token: str | None = None) -> Job:
        with self._lock:
            change = self._step(self._held(id, token), event, now)
        self._carry(*change)
        return change[0]

    def step_all(
        self, steps: Iterable[tuple[str, life.Event, str | None]], now: float
    ) -> list[Job | Exception]:
        found: list[Job | Exception] = []
        for id, event, token in steps:
            try:
                found.append(self.step(id, event, now, token))
            except (LostClaimError, NoSuchError, life.IllegalStepError) as error:
                found.append(error)
        return found

    def _claim(
        self, asked: Asked, holder: str, now: float, until: float, most: int
    ) -> tuple[list[Job], list[Step]]:
        day = Day(asked, now, lambda owner: self.seconds(owner, day_of(now)))

        def next_job(rest: Asked) -> Job | None:
            return self._lines.next_job(self._jobs(), rest, day, now)

        changes = []
        with self._lock:
            for job in in_turn(asked, most, next_job):
                leased = Leased(holder, new_token(), until)
                changes.append(self._step(self._rows[job.id], leased, now))
        for change in changes:
            self._carry(*change)
        return [job for job, _ in changes], [*day.refusals()]

    def renew(self, id: str, token: str, until: float) -> bool:
        with self._lock:
            row = self._held(id, token)
            row.job = replace(row.job, until=until)
            return not row.job.cancelling

    def release(self, holder: str | None, now: float) -> list[Job]:
        return self._lose(lambda job: job.holder is not None and holder in (None, job.holder), now)

    def expire(self, now: float) -> list[Job]:
        return self._lose(lambda job: job.until is not None and job.until < now, now)

    def _lose(self, is_lost: Callable[[Job], bool], now: float) -> list[Job]:
        with self._lock:
            rows = [row for row in self._rows.values() if is_lost(row.job)]
            changes = [self._step(row, lost(row.job, self._settings.attempts), now) for row in rows]
        for change in changes:
            self._carry(*change)
        return [job for job, _ in changes]

    def forget(self, now: float, keep_seconds: float) -> list[Job]:
        with self._lock:
            over = [row.job for row in self._rows.values() if row.job.ended is not None]
            old = [job for job in over if expires(job, keep_seconds) < now]
            for job in old:
                del self._rows[job.id]
                self._gone[job.id] = Gone(job.id, job.owner, job.ended or 0.0, now)
        return old

    def keep(self, id: str, seconds: float) -> Job:
        with self._lock:
            row = self._held(id, None)
            row.job = replace(row.job, keep=seconds)
            return row.job

    def kept_bytes(self, owner: str) -> int:
        with self._lock:
            mine = [row for row in self._rows.values() if row.job.owner == owner]
            return sum([bytes_of(r.job, sum([len(note.data) for note in r.notes])) for r in mine])

    def first_ended(self, owner: str) -> Job | None:
        with self._lock:
            jobs = [row.job for row in self._rows.values() if row.job.owner == owner]
        over = [job for job in jobs if job.ended is not None]
        return min(over, key=lambda job: job.ended or 0.0, default=None)

    def gone(self, id: str) -> Gone | None:
        with self._lock:
            return self._gone.get(id)

    def drop_gone(self, before: float) -> None:
        with self._lock:
            self._gone = {id: one for id, one in self._gone.items() if one.expired >= before}

    def recent(self, model: str, limit: int = 50) -> list[Job]:
        with self._lock:
            jobs = [row.job for row in self._rows.values()]
        done = [job for job in jobs if job.model == model and job.state == "done"]
        return sorted(done, key=lambda job: -(job.ended or 0.0))[:limit]

    def remove(self, id: str) -> None:
        with self._lock:
            if id in self._rows:
                check_over(self._rows[id].job)
                del self._rows[id]

    def unfinished(self) -> list[Job]:
        with self._lock:
            jobs = [row.job for row in self._rows.values() if row.job.state not in FINAL]
        return sorted(jobs, key=lambda job: (job.created, job.id))

    def ahead(self, id: str) -> int:
        with self._lock:
            row = self._rows.get(id)
            if row is None or row.job.state not in ("received", "queued"):
                return 0
            return self._lines.ahead(row.job, self._jobs())

    def counts(self) -> dict[tuple[str, str], int]:
        found: dict[tuple[str, str], int] = {}
        for job in self.unfinished():
            found[job.model, job.state] = found.get((job.model, job.state), 0) + 1
        return found

    def _jobs(self) -> list[Job]:
        return [row.job for row in self._rows.values()]

    def _step(
        self, row: _Row, event: life.Event, now: float
    ) -> tuple[Job, tuple[life.Command, ...]]:
        change = life.step(row.job, event, now)
        if "running" in (row.job.state, change.job.state):
            self.use(row.job.model, now)
        used = spent(row.job, change.job, now)
        if used is not None:
            self.spend(used)
            if row.job.state == "running":
                self._lines.settle(change.job, used.seconds)
        self.tally(tallied(row.job, change.job))
        row.job = change.job
        self._lines.arrive(change.job, self._jobs(), now)
        self._note(row, change.commands)
        return change.job, change.commands

    def _note(self, row: _Row, commands: tuple[life.Command, ...]) -> None:
        for kind, data in entries_of(row.job, commands, self._settings.keep_seconds):
            row.add(kind, data)

    def _held(self, id: str, token: str | None) -> _Row:
        row = self._rows.get(id)
        check_claim(row and row.job, id, token)
        assert row is not None
        return row

    # -- what followers see --------------------------------------------------------------------

    def note(self, id: str, token: str, kind: str, data: bytes) -> int:
        with self._lock:
            return self._held(id, token).add(kind, data)

    def notes(self, id: str, after: int = 0, limit: int = 1000) -> list[Note]:
        with self._lock:
            row = self._rows.get(id)
            return [] if row is None else row.notes[after : after + limit]

    def latest(self, ids: Collection[str]) -> dict[str, int]:
        with self._lock:
            rows = {id: row for id in ids if (row := self._rows.get(id)) is not None}
            return {id: len(row.notes) for id, row in rows.items() if row.notes}

    # -- keys ----------------------------------------------------------------------------------

    def add_key(self, key: Key) -> None:
        with self._lock:
            self._keys[key.digest] = key

    def key(self, digest: str) -> Key | None:
        with self._lock:
            key = self._keys.get(digest)
            return None if key is None or key.revoked is not None else key

    def keys(self) -> list[Key]:
        with self._lock:
            return sorted(self._keys.values(), key=lambda key: (key.created, key.digest))

    def revoke(self, digest: str, now: float) -> None:
        with self._lock:
            if digest not in self._keys:
                raise NoSuchError(f"there is no key with the digest {digest}")
            self._keys[digest] = replace(self._keys[digest], revoked=now)

    def use_key(self, digest: str, now: float) -> None:
        with self._lock:
            if digest in self._keys:
                self._keys[digest] = replace(self._keys[digest], used=now)

    # -- questions -----------------------------------------------------------------------------

    def ask(self, question: Question) -> None:
        with self._lock:
            self._questions[question.id] = question

    def next_question(self) -> Question | None:
        with self._lock:
            free = [q for q in self._questions.values() if self._taken.get(q.id, 0) % 2 == 0]
            if not free:
                self._turns.clear()
                return None
            turns = self._turns
            question = min(free, key=lambda one: (turns.get(one.owner, 0), one.created))
            turns[question.owner] = max(turns.values(), default=0) + 1
            self._taken[question.id] = self._taken.get(question.id, 0) + 1
            return question

    def reopen_questions(self) -> None:
        with self._lock:
            for id, times in self._taken.items():
                if times == 1 and self._questions[id].answer is None:
                    self._taken[id] = 2

    def answer(self, id: str, answer: bytes, ok: bool) -> None:
        with self._lock:
            if id in self._questions:
                self._questions[id] = replace(self._questions[id], answer=answer, ok=ok)

    def take_answer(self, id: str) -> Question | None:
        with self._lock:
            question = self._questions.get(id)
            if question is None or question.answer is None:
                return None
            self._taken.pop(id, None)
            return self._questions.pop(id)

    def withdraw(self, id: str) -> None:
        with self._lock:
            self._taken.pop(id, None)
            self._questions.pop(id, None)

    def drop_questions(self, before: float) -> None:
        with self._lock:
            for question in list(self._questions.values()):
                if question.created < before:
                    self._taken.pop(question.id, None)
                    del self._questions[question.id]

    # -- models --------------------------------------------------------------------------------

    def put_card(self, card: Card) -> None:
        with self._lock:
            self._cards[card.model] = card

    def card(self, model: str) -> Card | None:
        with self._lock:
            return self._cards.get(model)

    def cards(self) -> list[Card]:
        with self._lock:
            return [self._cards[model] for model in sorted(self._cards)]

    def drop_card(self, model: str) -> None:
        with self._lock:
            self._cards.pop(model, None)

    def drop_cards(self) -> None:
        with self._lock:
            self._cards.clear()

    def close(self) -> None:
        """Nothing to do: it goes with the process."""


class MemoryObjects:
    """`interface.Objects` in memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: dict[str, bytes] = {}
        self._times: dict[str, float] = {}

    def put(self, name: str, data: bytes | BinaryIO, *, durable: bool = True) -> bool:
        checked(name)
        whole = bytes(data) if isinstance(data, (bytes, bytearray, memoryview)) else data.read()
        with self._lock:
            if name in self._bytes:
                return False
            self._bytes[name], self._times[name] = whole, time.time()
            return True

    def get(self, name: str) -> bytes:
        with self._lock:
            return self._bytes[checked(name)]

    def size(self, name: str) -> int | None:
        with self._lock:
            data = self._bytes.get(checked(name))
            return None if data is None else len(data)

    def stream(self, name: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        checked_range(start, end)
        view = memoryview(self.get(name))[start:end]
        return (bytes(view[at : at + PIECE]) for at in range(0, len(view), PIECE))

    def delete(self, name: str) -> None:
        with self._lock:
            self._bytes.pop(checked(name), None)
            self._times.pop(name, None)

    def names(self, prefix: str) -> list[str]:
        checked_prefix(prefix)
        with self._lock:
            return sorted(name for name in self._bytes if name.startswith(prefix))

    def touch(self, name: str) -> bool:
        with self._lock:
            if checked(name) not in self._bytes:
                return False
            self._times[name] = time.time()
            return True

    def touched(self, name: str) -> float | None:
        with self._lock:
            return self._times.get(checked(name))

    def close(self) -> None:
        """Nothing to do: it goes with the process."""
