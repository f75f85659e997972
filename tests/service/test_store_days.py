"""Seconds of a day are looked at when the turn of a job comes: on both ledgers alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.service.gate import House
from tests.service.jobs import PRICED, error, job
from tests.service.shop import Shop, reads
from tests.service.test_store_claims import STEPS, Pair
from weft.errors import LimitError
from weft.service.gateway.errors import Refused
from weft.service.gateway.openai.following import answer_of
from weft.service.jobs.life import Job
from weft.service.jobs.tally import Count
from weft.service.jobs.usage import DAY, Usage, day_of, total
from weft.service.store import sqlite_claims
from weft.service.store.interface import Ledger
from weft.service.store.memory import MemoryLedger
from weft.service.store.sqlite import open_ledger
from weft.settings import Settings
from weft.wire.messages import ErrorReport, decode
from weft.wire.reports import error_of

NOON = 12 * 3600.0 + 20_000 * DAY
MINUTE = {"run_seconds_per_day": 60.0}

Make = Callable[..., Any]


@pytest.fixture(params=["memory", "sqlite"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    made: list[Ledger] = []

    def new(**settings: Any) -> Ledger:
        given = Settings(**settings)
        sqlite = request.param == "sqlite"
        made.append(open_ledger(tmp_path / "l.sqlite", given) if sqlite else MemoryLedger(given))
        return made[-1]

    yield new
    for ledger in made:
        ledger.close()


@pytest.fixture
def ledger(make: Make) -> Ledger:
    return make()


def queued(ledger: Ledger, owner: str = "ann", at: float = 0.0, **fields: Any) -> Job:
    """A job that waits to be run."""
    made, _ = ledger.submit(job(NOON + at, owner=owner, **fields), 10_000)
    return ledger.step(made.id, PRICED, NOON + at)


def ran(ledger: Ledger, seconds: float, owner: str = "ann", now: float = NOON) -> None:
    """Jobs of an owner ran so long, on some model."""
    ledger.add_usage([Usage(owner=owner, day=day_of(now), model="other", jobs=1, seconds=seconds)])


def claim(ledger: Ledger, now: float = NOON + 100, **more: Any) -> Job | None:
    return ledger.claim("queued", ["tiny"], "w", now, now + 1e6, **more)


def state(ledger: Ledger, made: Job) -> str:
    found = ledger.job(made.id)
    assert found is not None
    return found.state


def test_who_has_used_up_the_day_is_refused_by_name_when_it_is_his_turn(ledger: Ledger) -> None:
    mine, others = queued(ledger, limits=MINUTE), queued(ledger, "bob", 1.0)
    ran(ledger, 61.5)
    assert state(ledger, mine) == "queued", "nobody looks before"
    begun = claim(ledger)
    assert begun is not None and begun.id == others.id
    found = ledger.job(mine.id)
    assert found is not None and found.error is not None
    assert (found.state, found.attempts, found.stages.get("run")) == ("failed", 0, None)
    told = error_of(decode(found.error, ErrorReport, "json"))
    assert isinstance(told, LimitError)
    assert "61.5 seconds" in told.message and "the limit run_seconds_per_day is 60" in told.message
    assert told.fix == "wait for the next day (UTC); in 12 hours there is room"
    assert [note.kind for note in ledger.notes(mine.id)][-1] == "end"


def test_it_costs_its_owner_nothing_and_is_counted_as_refused(ledger: Ledger) -> None:
    queued(ledger, limits=MINUTE)
    ran(ledger, 60.0)
    assert claim(ledger) is None
    used = total(ledger.usage("ann"))
    assert (used.jobs, used.seconds, used.refusals, used.cost) == (1, 60.0, 1, 0.0)
    counted = {(one.name, one.labels): one.value for one in ledger.tallies()}
    assert counted["weft_refusals_total", (("limit", "run_seconds_per_day"),)] == 1
    assert Count("weft_batch_jobs_count", (("model", "tiny"),)) not in ledger.tallies()


def test_the_limit_of_the_server_is_that_of_keys_without_their_own(make: Make) -> None:
    ledger = make(run_seconds_per_day=60.0)
    mine, more = queued(ledger), queued(ledger, at=1.0, limits={"run_seconds_per_day": 0.0})
    ran(ledger, 60.0)
    begun = claim(ledger)
    assert begun is not None and begun.id == more.id, "another key of the same owner has no limit"
    assert state(ledger, mine) == "failed"


def test_seconds_that_are_left_let_a_job_in(ledger: Ledger) -> None:
    mine = queued(ledger, limits=MINUTE)
    ran(ledger, 59.9)
    begun = claim(ledger)
    assert begun is not None and begun.id == mine.id


def test_seconds_are_those_of_the_day_on_which_it_is_its_turn(ledger: Ledger) -> None:
    mine = queued(ledger, limits=MINUTE)
    ran(ledger, 1000.0)
    ran(ledger, 1000.0, "bob", NOON + DAY)
    begun = claim(ledger, NOON + DAY)
    assert begun is not None and begun.id == mine.id


def test_a_long_queue_is_refused_a_few_at_a_time_and_nobody_waits_for_that(ledger: Ledger) -> None:
    many = [queued(ledger, at=n / 100, limits=MINUTE) for n in range(100)]
    others = [queued(ledger, "bob", 10.0 + n) for n in range(2)]
    ran(ledger, 60.0)
    for number, other in enumerate(others, 1):
        begun = claim(ledger)
        assert begun is not None and begun.id == other.id
        failed = [state(ledger, one) for one in many].count("failed")
        assert number <= failed <= number * 20
    assert claim(ledger) is None, "there is nothing else to do: the rest is refused at once"
    assert {state(ledger, one) for one in many} == {"failed"}


def test_what_was_begun_before_was_let_in(ledger: Ledger) -> None:
    mine = queued(ledger, limits=MINUTE)
    begun = claim(ledger)
    assert begun is not None
    ran(ledger, 60.0)
    ledger.release("w", NOON + 101)
    assert state(ledger, mine) == "queued"
    again = claim(ledger)
    assert again is not None and again.id == mine.id


def test_a_batch_takes_those_that_have_seconds_left(ledger: Ledger) -> None:
    for number in range(4):
        made, _ = ledger.submit(job(NOON + number, owner="ann", limits=MINUTE), 100)
        ledger.step(made.id, replace(PRICED, lane="x", tokens=1), NOON + number)
        made, _ = ledger.submit(job(NOON + number, owner="bob"), 100)
        ledger.step(made.id, replace(PRICED, lane="x", tokens=1), NOON + number)
    ran(ledger, 60.0)
    found = ledger.claim_all("queued", ["tiny"], "w", NOON, NOON + 9e9, 8, lane="x", tokens=100)
    assert [one.owner for one in found] == ["bob"] * 4
    assert ledger.unfinished() == sorted(
        (j for j in ledger.jobs("bob")), key=lambda one: one.created
    )


def test_pricing_goes_on(ledger: Ledger) -> None:
    made, _ = ledger.submit(job(NOON, limits=MINUTE), 100)
    ran(ledger, 60.0)
    found = ledger.claim("received", ["tiny"], "checker", NOON, NOON + 9e9)
    assert found is not None and found.id == made.id


def test_of_keys_without_the_limit_nothing_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of others once in a claim."""
    asked: list[str] = []
    seconds = sqlite_claims.seconds

    def counted(rows: Any, owner: str, day: str) -> float:
        asked.append(owner)
        return seconds(rows, owner, day)

    monkeypatch.setattr(sqlite_claims, "seconds", counted)
    ledger = open_ledger(tmp_path / "l.sqlite")
    for number in range(6):
        queued(ledger, at=number)
        queued(ledger, "bob", number, limits=MINUTE)
    for _ in range(3):
        assert claim(ledger, lane="") is not None
    before = len(asked)
    ledger.claim_all("queued", ["tiny"], "w", NOON, NOON + 9e9, 8, lane="", tokens=100)
    ledger.close()
    assert set(asked) == {"bob"}
    assert len(asked) == before + 1


class Short(Pair):
    """Some keys have few seconds a day, which are used up on the way."""

    LIMITS = ({}, {"run_seconds_per_day": 3.0}, {"running_jobs": 2, "run_seconds_per_day": 1.0})


@pytest.mark.parametrize("seed", range(8))
def test_both_ledgers_refuse_the_same(tmp_path: Path, seed: int) -> None:
    pair = Short(tmp_path, random.Random(seed))
    for _ in range(2 * STEPS):
        pair.turn()
        memory, sqlite = pair.queues()
        assert memory == sqlite
        told = [{one.id: one.state for one in ledger.unfinished()} for ledger in pair.ledgers]
        assert told[0] == told[1]
    refused = [total(ledger.usage()).refusals for ledger in pair.ledgers]
    pair.sqlite.close()
    assert refused[0] == refused[1] > 0


def test_a_worker_runs_what_has_seconds_left_and_nothing_more() -> None:
    shop = Shop(run_seconds_per_day=1e-9)
    jobs = [shop.queued(reads("last")) for _ in range(3)]
    shop.one()
    assert shop.worker().claim() is None
    assert [shop.job(one).state for one in jobs] == ["done", "failed", "failed"]
    assert isinstance(shop.error(jobs[1]), LimitError)
    assert shop.end(jobs[1]).error is not None
    assert shop.objects.names("submits/") == []
    shop.close()


def test_a_request_in_openais_form_is_told_when_to_come_back() -> None:
    house = House()
    house.app.gateway.clock = lambda: NOON
    failed = job(NOON, state="failed", price=PRICED.price, error=error("limit", "used up"))
    sent: Any = None
    with pytest.raises(Refused) as said:
        answer_of(house.app.gateway, sent, failed, None)
    assert (said.value.status, said.value.headers) == (429, {"Retry-After": str(12 * 3600)})
    with pytest.raises(Refused) as said:  # one that the checker refused is too much by itself
        answer_of(house.app.gateway, sent, replace(failed, price=None), None)
    assert said.value.status == 413
    with pytest.raises(Refused) as said:
        answer_of(house.app.gateway, sent, replace(failed, attempts=1), None)
    assert said.value.status == 413
