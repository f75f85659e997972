"""A batch claimed at once takes the jobs, and leaves the queue, that asking each owner anew gives.

The ledger in memory asks every owner for what he has before each job, as `jobs.fair` is written.
"""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.service.jobs import CANCEL, FINISHED, PRICED, job
from weft.service.jobs.fair import OVERHEAD
from weft.service.jobs.life import Job
from weft.service.store.interface import Ledger
from weft.service.store.memory import MemoryLedger
from weft.service.store.sqlite import SqliteLedger, open_ledger
from weft.service.store.sqlite_claims import _Line
from weft.settings import Settings

OWNERS = ("ann", "bob", "eve", "dan", "zoe", "Ünal")
MODELS = ("tiny", "wide")
STEPS = 160


class Pair:
    """The same things happen to both; whatever they say must be the same."""

    LIMITS: tuple[dict[str, float], ...] = ({}, {}, {"running_jobs": 2})

    def __init__(self, folder: Path, drawn: random.Random) -> None:
        settings = Settings(attempts=3, running_jobs=drawn.choice([0, 0, 4]))
        self.file = folder / "weft.sqlite"
        self.memory = MemoryLedger(settings)
        self.sqlite = open_ledger(self.file, settings)
        self.drawn = drawn
        self.last: dict[tuple[str, str], str] = {}  # of an owner's session, its last job
        self.held: dict[str, list[str | None]] = {}
        self.alive: list[str] = []
        self.now = 1000.0

    @property
    def ledgers(self) -> tuple[Ledger, Ledger]:
        return self.memory, self.sqlite

    def submit(self) -> None:
        """A job, perhaps of a session, whose jobs wait for each other; mostly it is priced, too."""
        drawn, owner = self.drawn, self.drawn.choice(OWNERS)
        model = drawn.choice(MODELS)
        session = drawn.choice([None, None, f"{owner}'s"])
        made = job(
            self.now,
            owner=owner,
            model=model,
            weight=drawn.choice([0.5, 1.0, 4.0]),
            nodes=drawn.randrange(500),
            limits=drawn.choice(self.LIMITS),
            after=None if session is None else self.last.get((session, model)),
        )
        if session is not None:
            self.last[session, model] = made.id
        for ledger in self.ledgers:
            ledger.submit(made, 1000)
        self.alive.append(made.id)
        if drawn.random() < 0.8:
            self.priced(made)

    def priced(self, made: Job) -> None:
        drawn = self.drawn
        priced = replace(
            PRICED,
            cost=drawn.randrange(20) * 100 * OVERHEAD,
            lane=drawn.choice(["", "x", "y"]),
            tokens=drawn.randrange(60),
            peak=drawn.randrange(900),
        )
        for ledger in self.ledgers:
            ledger.step(made.id, priced, self.now + 0.1)

    def claim(self) -> int:
        """Takes jobs; how many."""
        drawn = self.drawn
        stage = drawn.choice(["received", "queued", "queued", "queued"])
        models = drawn.choice([MODELS[:1], MODELS[1:], MODELS, ("none", *MODELS)])
        fits: dict[str, Any] = {}
        if stage == "queued" and drawn.random() < 0.7:
            fits = {"lane": drawn.choice([None, "x", "y"])}
            fits |= {"tokens": drawn.choice([None, 50, 200]), "peak": drawn.choice([None, 2000])}
        who = stage, models, "w", self.now, self.now + 1e6, drawn.choice([1, 3, 12])
        found = [ledger.claim_all(*who, **fits) for ledger in self.ledgers]
        assert [one.id for one in found[0]] == [one.id for one in found[1]]
        for pair in zip(*found, strict=True):
            self.held[pair[0].id] = [one.token for one in pair]
        return len(found[0])

    def end(self) -> None:
        """A job that was taken is done with, or is given back."""
        if not self.held:
            return
        id = self.drawn.choice(list(self.held))
        tokens = self.held.pop(id)
        running = [one.id for one in self.memory.unfinished() if one.state == "running"]
        event = replace(FINISHED, seconds=self.drawn.random()) if id in running else PRICED
        for ledger, token in zip(self.ledgers, tokens, strict=True):
            ledger.step(id, event, self.now, token)

    def cancel(self) -> None:
        id = self.drawn.choice(self.alive) if self.alive else None
        if (
            id is not None
            and id not in self.held
            and id in {j.id for j in self.memory.unfinished()}
        ):
            for ledger in self.ledgers:
                ledger.step(id, CANCEL, self.now)

    def lose(self) -> None:
        for ledger in self.ledgers:
            ledger.release("w", self.now)
        self.held.clear()

    def turn(self) -> int:
        self.now += 1.0
        acts = (self.submit, self.claim, self.end, self.cancel, self.lose)
        act = self.drawn.choices(acts, (55, 22, 20, 2, 1))[0]
        return act() or 0

    def queues(self) -> list[dict[str, Any]]:
        """Where owners stand, and the clocks, as each has them."""
        lines = self.memory._lines
        mine = {q: {o: (s.tag, s.since) for o, s in of.items()} for q, of in lines._shares.items()}
        theirs: dict[str, Any] = {}
        with closing(sqlite3.connect(self.file)) as rows:
            for queue, *share in rows.execute("SELECT queue, owner, tag, since FROM share"):
                theirs.setdefault(queue, {})[share[0]] = tuple(share[1:])
            clocks = dict(rows.execute("SELECT name, clock FROM queue"))
        return [
            {q: (lines._clocks.get(q, 0.0), shares) for q, shares in mine.items() if shares},
            {q: (clocks.get(q, 0.0), shares) for q, shares in theirs.items()},
        ]


@pytest.mark.parametrize("seed", range(12))
def test_batches_are_taken_in_the_order_of_asking_everybody_each_time(tmp_path, seed) -> None:
    pair = Pair(tmp_path, random.Random(seed))
    taken = 0
    for _ in range(STEPS):
        taken += pair.turn()
        memory, sqlite = pair.queues()
        assert memory == sqlite
    pair.sqlite.close()
    assert taken > 20


def test_each_owner_is_asked_once_for_a_batch_and_once_for_each_job_of_his(
    tmp_path, monkeypatch
) -> None:
    asked: list[str | None] = []
    select = _Line._select

    def counted(line: _Line, which: Any, owner: str | None = None) -> Any:
        asked.append(owner)
        return select(line, which, owner)

    ledger: SqliteLedger = open_ledger(tmp_path / "weft.sqlite", Settings())
    for number in range(30):
        made, _ = ledger.submit(job(100.0 + number, owner=f"user{number % 15}"), 1000)
        ledger.step(made.id, replace(PRICED, lane="x", tokens=1), 200.0)
    monkeypatch.setattr(_Line, "_select", counted)
    found = ledger.claim_all("queued", ["tiny"], "w", 300.0, 900.0, 20, lane="x", tokens=100)
    ledger.close()
    assert len(found) == 20
    assert asked[0] is None and None not in asked[1:]
    assert len(asked) <= 1 + len(found)
