"""Memory of workers, deployed models, jobs kept and gone: what every ledger promises."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.service.jobs import CANCEL, FINISHED, PRICED, job
from weft.errors import NoSuchError
from weft.service.jobs.life import Job
from weft.service.store.interface import Ledger
from weft.service.store.kept import Gone
from weft.service.store.memory import MemoryLedger
from weft.service.store.models import Deployed, WorkerMemory
from weft.service.store.sessions import Session
from weft.service.store.sqlite import MIGRATIONS, open_ledger
from weft.settings import Settings

SETTINGS = Settings(attempts=2, keep_seconds=1000.0)
TINY = WorkerMemory(model="tiny", of="a", host=30, need=20, weights=10, measured=5.0)


@pytest.fixture(params=["memory", "sqlite"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Ledger]]:
    """Gives the ledger as another process sees it."""
    made: list[Ledger] = []

    def new() -> Ledger:
        if request.param == "sqlite":
            made.append(open_ledger(tmp_path / "weft.sqlite", SETTINGS))
        elif not made:
            made.append(MemoryLedger(SETTINGS))
        return made[-1]

    yield new
    for ledger in made:
        ledger.close()


@pytest.fixture
def ledger(reopen: Callable[[], Ledger]) -> Ledger:
    return reopen()


def done(ledger: Ledger, begun: float, ended: float, **fields: object) -> Job:
    """A job that ran from one time to another."""
    made, _ = ledger.submit(job(begun - 2, **fields), 100)
    ledger.step(made.id, PRICED, begun - 1)
    claimed = ledger.claim("queued", [made.model], "w", begun, begun + 100)
    assert claimed is not None
    return ledger.step(claimed.id, FINISHED, ended, claimed.token)


def test_what_was_measured_is_there_for_the_next_process(ledger, reopen) -> None:
    assert ledger.memory("tiny") is None and ledger.memories() == []
    ledger.put_memory(TINY)
    ledger.put_memory(WorkerMemory(model="big", need=7))
    assert reopen().memory("tiny") == TINY
    assert [one.model for one in reopen().memories()] == ["big", "tiny"]


def test_a_jobs_beginning_and_end_are_its_models_last_use(ledger, reopen) -> None:
    ledger.put_memory(TINY)
    made, _ = ledger.submit(job(100.0), 100)
    ledger.step(made.id, PRICED, 101.0)
    assert ledger.memory("tiny").used == 0.0
    claimed = ledger.claim("queued", ["tiny"], "w", 102.0, 200.0)
    assert ledger.memory("tiny").used == 102.0
    ledger.step(claimed.id, FINISHED, 103.5, claimed.token)
    assert reopen().memory("tiny").used == 103.5
    done(ledger, 205.0, 206.0, model="other")
    assert ledger.memory("tiny").used == 103.5 and ledger.memory("other") is None


def test_who_measures_does_not_turn_back_the_last_use(ledger) -> None:
    ledger.put_memory(TINY)
    done(ledger, 110.0, 111.0)
    ledger.put_memory(replace(TINY, host=99))
    assert ledger.memory("tiny") == replace(TINY, host=99, used=111.0)


def test_deployed_models(ledger, reopen) -> None:
    first, second = Deployed("b", b"{}", "ann", 1.0), Deployed("a", b"[]", "bob", 2.0, 1)
    ledger.put_deployed(first)
    ledger.put_deployed(second)
    ledger.put_deployed(replace(first, tries=2))
    assert reopen().deployed() == [second, replace(first, tries=2)]
    assert ledger.remove_deployed("b") is True and ledger.remove_deployed("b") is False
    assert reopen().deployed() == [second]


def test_each_job_is_kept_as_long_as_it_asked(ledger, reopen) -> None:
    short = done(ledger, 100.0, 101.0, keep=10.0)
    usual = done(ledger, 200.0, 201.0)
    long = done(ledger, 300.0, 301.0, keep=5000.0)
    assert ledger.forget(111.0, 1000.0) == []
    assert [one.id for one in ledger.forget(111.5, 1000.0)] == [short.id]
    assert [one.id for one in ledger.forget(1201.5, 1000.0)] == [usual.id]
    assert reopen().job(long.id) == long
    assert reopen().gone(short.id) == Gone(short.id, "ann", 101.0, 111.5)
    assert ledger.gone(long.id) is None
    ledger.drop_gone(1000.0)
    assert ledger.gone(short.id) is None and ledger.gone(usual.id) is not None


def test_a_job_can_be_kept_longer_while_it_is_there(ledger, reopen) -> None:
    made = done(ledger, 100.0, 101.0, keep=10.0)
    assert ledger.keep(made.id, 500.0) == replace(made, keep=500.0)
    assert ledger.forget(600.0, 1.0) == []
    assert reopen().job(made.id).keep == 500.0
    assert len(ledger.forget(601.5, 1.0)) == 1
    with pytest.raises(NoSuchError):
        ledger.keep(made.id, 500.0)


def test_what_is_asked_while_a_job_runs_is_there_when_it_is_over(ledger) -> None:
    made, _ = ledger.submit(job(100.0), 100)
    ledger.step(made.id, PRICED, 101.0)
    claimed = ledger.claim("queued", ["tiny"], "w", 102.0, 200.0)
    ledger.keep(made.id, 7.0)
    assert ledger.step(made.id, FINISHED, 103.0, claimed.token).keep == 7.0
    assert ledger.forget(109.0, 1000.0) == [] and len(ledger.forget(111.0, 1000.0)) == 1


def test_the_last_jobs_that_were_done(ledger) -> None:
    jobs = [done(ledger, 100.0 + n, 200.0 - n) for n in range(4)]
    done(ledger, 300.0, 301.0, model="other")
    left, _ = ledger.submit(job(400.0), 100)
    ledger.step(left.id, CANCEL, 401.0)
    assert [one.id for one in ledger.recent("tiny", 3)] == [one.id for one in jobs[:3]]


def test_a_store_from_before_there_was_any_of_this_goes_on(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "weft.sqlite"
    with monkeypatch.context() as patch:
        patch.setattr("weft.service.store.sqlite.MIGRATIONS", MIGRATIONS[:1])
        open_ledger(path, SETTINGS).close()
    old = job(50.0)
    body = replace(old, state="done", ended=60.0)
    from weft.service.store.sqlite import _encode

    with sqlite3.connect(path) as rows:
        rows.execute(
            """INSERT INTO job (id, owner, request_id, model, state, created, ended, body)
                VALUES (?, ?, ?, ?, 'done', 50.0, 60.0, ?)""",
            (old.id, old.owner, old.request_id, old.model, _encode(body)),
        )
    rows.close()
    ledger = open_ledger(path, SETTINGS)
    assert ledger.job(old.id) == body
    assert ledger.recent("tiny") == [body]
    assert ledger.forget(1060.5, 1000.0) == [body]
    ledger.close()


def test_open_sessions_are_counted_by_model(ledger, reopen) -> None:
    assert ledger.open_sessions(0.0) == {}
    for number, (model, until) in enumerate((("a", 10.0), ("a", 20.0), ("b", 20.0))):
        id = f"s{number}"
        session = Session(id=id, owner="ann", request_id=id, model=model, created=1.0, until=until)
        ledger.open_session(session, 10)
    assert reopen().open_sessions(5.0) == {"a": 2, "b": 1}
    assert ledger.open_sessions(15.0) == {"a": 1, "b": 1}
    ledger.end_session("s1", 16.0)
    assert reopen().open_sessions(17.0) == {"b": 1}
