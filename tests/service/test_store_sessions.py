"""What every ledger promises of sessions, tried on the one in SQLite and on the fake alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.jobs import FINISHED, PRICED, job
from weft.service.store.interface import Ledger
from weft.service.store.memory import MemoryLedger
from weft.service.store.sessions import Session, SessionsFullError
from weft.service.store.sqlite import open_ledger
from weft.service.store.sweep import sweep
from weft.settings import Settings

SETTINGS = Settings(keep_seconds=1000.0)


@pytest.fixture(params=["memory", "sqlite"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    if request.param == "memory":
        made: Ledger = MemoryLedger(SETTINGS)
    else:
        made = open_ledger(tmp_path / "weft.sqlite", SETTINGS)
    yield made
    made.close()


def session(name: str = "a", owner: str = "ann", **fields: object) -> Session:
    given: dict = {"created": 100.0, "until": 200.0, "model": "tiny", **fields}
    return Session(id=f"{owner}{name}", owner=owner, request_id=name, **given)


def test_the_same_request_is_the_same_session(ledger: Ledger) -> None:
    first = ledger.open_session(session(), 1)
    again = ledger.open_session(session(created=150.0), 1)
    assert again == first == ledger.session(first.id)
    assert ledger.session("other") is None


def test_only_so_many_are_open_at_once(ledger: Ledger) -> None:
    ledger.open_session(session("a"), 2)
    ledger.open_session(session("b", until=120.0), 2)
    ledger.open_session(session("a", owner="bob"), 2)
    with pytest.raises(SessionsFullError, match="2 sessions"):
        ledger.open_session(session("c"), 2)
    ledger.open_session(session("c", created=130.0), 2)  # b has expired
    ledger.end_session("anna", 140.0)
    ledger.end_session("anna", 150.0)
    found = ledger.session("anna")
    assert found is not None and found.ended == 140.0
    ledger.open_session(session("d", created=141.0), 2)


def test_requests_and_signs_of_life_lengthen_the_lease(ledger: Ledger) -> None:
    ledger.open_session(session(), 1)
    ledger.seat("anna", 1, "job1", 210.0)
    ledger.seat("anna", 0, "", 220.0)
    ledger.seat("anna", 1, "job1", 205.0)  # came twice
    found = ledger.session("anna")
    assert found is not None
    assert (found.last, found.job, found.until) == (1, "job1", 220.0)
    assert not found.over(220.0) and found.over(220.5)
    ledger.seat("nobody", 1, "x", 1.0)


def test_what_was_over_long_ago_is_forgotten(ledger: Ledger) -> None:
    for name, until in (("a", 150.0), ("b", 900.0), ("c", 900.0)):
        ledger.open_session(session(name, until=until), 9)
    ledger.end_session("annc", 160.0)
    ledger.forget_sessions(200.0)
    assert [ledger.session(f"ann{name}") is not None for name in "abc"] == [False, True, False]


def test_a_job_of_a_session_waits_for_the_one_before_it(ledger: Ledger) -> None:
    first, second = job(created=1.0), job(created=2.0)
    after = [job(created=0.5, session="s", after=first.id), job(created=0.6, after="nobody")]
    for one in (first, second, *after):
        ledger.submit(one, 10)
        ledger.step(one.id, PRICED, 3.0)

    def claimed() -> str | None:
        found = ledger.claim("queued", ["tiny"], "w", 4.0, 9.0)
        return None if found is None else found.id

    assert claimed() == after[1].id
    assert claimed() == first.id
    assert claimed() == second.id
    assert claimed() is None
    ledger.step(first.id, FINISHED, 5.0)
    assert claimed() == after[0].id


def test_an_open_session_keeps_its_requests(ledger: Ledger) -> None:
    """Until it is over; a job that is over alone does not need its own any more."""
    from weft.service.store.memory import MemoryObjects

    objects = MemoryObjects()
    ledger.open_session(session(), 1)
    mine, other = job(created=1.0, session="anna"), job(created=2.0)
    for one in (mine, other):
        ledger.submit(one, 10)
        ledger.step(one.id, PRICED, 3.0)
        ledger.claim("queued", ["tiny"], "w", 4.0, 9.0)
        ledger.step(one.id, FINISHED, 5.0)
        objects.put(f"submits/{one.id}", b"x")
    objects._times = dict.fromkeys(objects._times, 0.0)
    sweep(ledger, objects, 199.0, SETTINGS)
    assert objects.names("submits/") == [f"submits/{mine.id}"]
    sweep(ledger, objects, 201.0, SETTINGS)
    assert objects.names("submits/") == []
