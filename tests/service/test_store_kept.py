"""How many bytes jobs of a key take in the store, and what is refused where they are too many."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from tests.service.gate import BOB, House, submit_of
from tests.service.jobs import CANCEL, FAILED, FINISHED, PRICED, job
from tests.service.test_gateway_limits import NOON, at, refused, with_key
from weft.service.jobs.life import Job
from weft.service.store.database import Database
from weft.service.store.interface import Ledger
from weft.service.store.kept import bytes_of
from weft.service.store.memory import MemoryLedger
from weft.service.store.sqlite import open_ledger
from weft.service.store.tables import MIGRATIONS
from weft.settings import Settings
from weft.wire.messages import encode


@pytest.fixture(params=["memory", "sqlite"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    found: Any = MemoryLedger() if request.param == "memory" else open_ledger(tmp_path / "l.sqlite")
    yield found
    found.close()


def sent(ledger: Ledger, size: int, **fields: Any) -> Job:
    return ledger.submit(job(request_bytes=size, **fields), 1000)[0]


def begun(ledger: Ledger, made: Job) -> Job:
    ledger.step(made.id, PRICED, 101.0)
    found = ledger.claim("queued", ["tiny"], "w", 102.0, 1e9)
    assert found is not None and found.id == made.id
    return found


def told(ledger: Ledger, made: Job) -> int:
    """Bytes of its notes."""
    return sum(len(note.data) for note in ledger.notes(made.id))


def test_a_request_counts_until_its_job_is_over_and_a_result_from_then_on(ledger: Ledger) -> None:
    assert ledger.kept_bytes("ann") == 0
    made = sent(ledger, 500)
    assert ledger.kept_bytes("ann") == 500
    mine = begun(ledger, made)
    ledger.note(made.id, mine.token or "", "log", b"x" * 1000)
    assert ledger.kept_bytes("ann") == 500
    ledger.step(made.id, replace(FINISHED, result_bytes=7000), 103.0, mine.token)
    assert ledger.kept_bytes("ann") == 7000 + told(ledger, made) > 8000
    assert ledger.kept_bytes("bob") == 0
    ledger.remove(made.id)
    assert ledger.kept_bytes("ann") == 0


@pytest.mark.parametrize("event", [FAILED, CANCEL])
def test_what_brings_nothing_leaves_its_events(ledger: Ledger, event: Any) -> None:
    made = sent(ledger, 500)
    if event is FAILED:
        ledger.step(made.id, FAILED, 103.0, begun(ledger, made).token)
    else:
        ledger.step(made.id, CANCEL, 103.0)
    assert ledger.kept_bytes("ann") == told(ledger, made) > 0


def test_the_request_of_a_session_is_kept_with_its_job(ledger: Ledger) -> None:
    made = sent(ledger, 500, session="s")
    ledger.step(made.id, CANCEL, 103.0)
    assert ledger.kept_bytes("ann") == 500 + told(ledger, made)


def test_what_expires_counts_no_more(ledger: Ledger) -> None:
    for number in range(3):
        made = sent(ledger, 10)
        ledger.step(made.id, CANCEL, 200.0 + number)
    first = ledger.first_ended("ann")
    assert first is not None and first.ended == 200.0
    assert ledger.first_ended("bob") is None
    ledger.forget(211.5, 10.0)
    last = ledger.first_ended("ann")
    assert last is not None and last.ended == 202.0
    assert ledger.kept_bytes("ann") == told(ledger, last)


@pytest.mark.parametrize("seed", range(4))
def test_the_account_is_what_the_rows_come_to(tmp_path: Path, seed: int) -> None:
    drawn = random.Random(seed)
    ledger = open_ledger(tmp_path / "l.sqlite", Settings(attempts=2))
    now = 1000.0
    for _ in range(150):
        now += 1.0
        act = drawn.randrange(8)
        alive = ledger.unfinished()
        if act < 3:
            session = drawn.choice(["", "s"])
            owner = drawn.choice(["ann", "bob"])
            sent(ledger, drawn.randrange(900), created=now, owner=owner, session=session)
        elif act == 3 and (new := [one for one in alive if one.state == "received"]):
            ledger.step(drawn.choice(new).id, PRICED, now)
        elif act == 4 and (mine := ledger.claim("queued", ["tiny"], "w", now, now + 1e6)):
            ledger.note(mine.id, mine.token or "", "log", b"x" * drawn.randrange(300))
            done = replace(FINISHED, result_bytes=drawn.randrange(9000))
            ledger.step(mine.id, drawn.choice([done, FAILED]), now, mine.token)
        elif act == 5 and alive:
            ledger.step(drawn.choice(alive).id, CANCEL, now)
        elif act == 6:
            ledger.forget(now, 40.0)
        elif over := [one for one in ledger.jobs("ann") if one.ended is not None]:
            ledger.remove(drawn.choice(over).id)
        for owner in ("ann", "bob"):
            rows = ledger.jobs(owner, limit=1000)
            assert ledger.kept_bytes(owner) == sum(bytes_of(j, told(ledger, j)) for j in rows)
    ledger.close()


def test_jobs_of_an_older_folder_count_from_their_end(tmp_path: Path) -> None:
    before = next(n for n, step in enumerate(MIGRATIONS) if any("TABLE kept" in s for s in step))
    old = Database(tmp_path / "l.sqlite", MIGRATIONS[:before])
    jobs = [job(), job(state="done", ended=150.0, result_bytes=9)]
    with old.write() as rows:
        for one in jobs:
            rows.execute(
                """INSERT INTO job (id, owner, request_id, model, state, created, ended, body)
                    VALUES (?, ?, ?, ?, ?, ?, ?, ?)""",
                (one.id, one.owner, one.request_id, one.model, one.state, 100.0, one.ended)
                + (msgspec.msgpack.encode(one),),
            )
    old.close()
    ledger = open_ledger(tmp_path / "l.sqlite")
    assert ledger.kept_bytes("ann") == 0
    ledger.step(jobs[0].id, CANCEL, 160.0)
    assert ledger.kept_bytes("ann") == told(ledger, jobs[0]) > 0
    for one in jobs:
        ledger.remove(one.id)
    assert ledger.kept_bytes("ann") == 0
    ledger.close()


# -- the gateway -----------------------------------------------------------------------------------


def test_who_has_too_much_there_is_refused_until_he_deletes_or_it_expires() -> None:
    house = House(Settings(kept_bytes=1, keep_seconds=5000.0))
    at(house, NOON)
    id = house.job()
    stored = house.objects.size(f"submits/{id}")
    assert house.ledger.kept_bytes("ann") == stored
    said = house.submit(submit_of(request_id="r2"))
    assert refused(said, "kept_bytes", 1) == 60, "nothing is over yet"
    assert f"{stored} bytes" in said.json()["message"]
    assert house.submit(submit_of()).json()["id"] == id, "it was acknowledged"
    assert house.submit(submit_of(), BOB).status_code == 201, "others' bytes are others'"
    house.do()  # ends at 4.0
    at(house, 4.0)
    said = house.submit(submit_of(request_id="r2"))
    assert refused(said, "kept_bytes", 1) == 5000
    assert "delete their jobs" in said.json()["fix"] and "there may be room" in said.json()["fix"]
    assert house.stored().count(f"job {id}") == 1 and len(house.objects.names("submits/")) == 1
    assert house.ask("DELETE", f"/api/jobs/{id}").status_code == 204
    assert house.submit(submit_of(request_id="r2")).status_code == 201


def test_a_key_has_its_own_limit_or_none() -> None:
    house = House(Settings(kept_bytes=1))
    some = with_key(house, "some", limits={"kept_bytes": len(encode(submit_of())) * 1.5})
    free = with_key(house, "free", owner="zoe", limits={"kept_bytes": 0})
    taken = [house.submit(submit_of(request_id=f"r{n}"), some).status_code for n in range(4)]
    assert taken[0] == 201 and taken[-1] == 429
    taken = [house.submit(submit_of(request_id=f"r{n}"), free).status_code for n in range(4)]
    assert taken == [201] * 4
