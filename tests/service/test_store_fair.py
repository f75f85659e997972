"""Fair order as every ledger promises it: on the one in SQLite and on the fake alike."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from tests.service.jobs import CANCEL, FINISHED, PRICED, job
from weft.service.jobs.fair import OVERHEAD
from weft.service.jobs.life import Job
from weft.service.jobs.usage import Usage
from weft.service.store.database import Database
from weft.service.store.interface import Ledger, LostClaimError, Question
from weft.service.store.memory import MemoryLedger
from weft.service.store.sqlite import open_ledger
from weft.service.store.tables import MIGRATIONS
from weft.service.store.usage import Space
from weft.settings import Settings

SETTINGS = Settings(attempts=2)
UNIT = 100 * OVERHEAD

Make = Callable[..., Ledger]


@pytest.fixture(params=["memory", "sqlite"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    made: list[Ledger] = []

    def new(settings: Settings = SETTINGS) -> Ledger:
        file = tmp_path / "weft.sqlite"
        sqlite = request.param == "sqlite"
        made.append(open_ledger(file, settings) if sqlite else MemoryLedger(settings))
        return made[-1]

    yield new
    for ledger in made:
        ledger.close()


@pytest.fixture
def ledger(make: Make) -> Ledger:
    return make()


def queued(
    ledger: Ledger,
    owner: str,
    created: float,
    cost: float = UNIT,
    *,
    lane: str = "",
    tokens: int = 0,
    peak: int = 0,
    **fields,
) -> Job:
    made, _ = ledger.submit(job(created, owner=owner, **fields), 10_000)
    priced = replace(PRICED, cost=cost, lane=lane, tokens=tokens, peak=peak)
    return ledger.step(made.id, priced, created + 0.5)


def next_one(ledger: Ledger, now: float, models: tuple[str, ...] = ("tiny",), **fits) -> Job | None:
    return ledger.claim("queued", models, "w", now, now + 1e6, **fits)


def owners(ledger: Ledger, count: int, now: float = 1e6) -> list[str]:
    """Of the next jobs, each done at once; each takes what it was priced at."""
    found = []
    for number in range(count):
        one = next_one(ledger, now + number)
        if one is None:
            break
        took = replace(FINISHED, seconds=(OVERHEAD + one.cost) / UNIT)
        ledger.step(one.id, took, now + number + 0.5, one.token)
        found.append(one.owner)
    return found


# -- whose turn it is ------------------------------------------------------------------------------


def test_a_thousand_jobs_of_one_do_not_starve_the_next(ledger) -> None:
    for number in range(40):
        queued(ledger, "ann", 100.0 + number)
    assert owners(ledger, 5) == ["ann"] * 5
    queued(ledger, "bob", 200.0)
    assert owners(ledger, 2, 2e6) in (["bob", "ann"], ["ann", "bob"])


def test_cost_by_weight_is_what_counts(ledger) -> None:
    for number in range(12):
        queued(ledger, "ann", 100.0 + number, 2 * UNIT, weight=4.0)
        queued(ledger, "bob", 100.5 + number, UNIT)
    first = owners(ledger, 9)
    assert (first.count("ann"), first.count("bob")) == (6, 3)


def test_a_queue_that_was_empty_owes_nobody_anything(ledger) -> None:
    queued(ledger, "ann", 100.0, 1000 * UNIT)
    assert owners(ledger, 1) == ["ann"]
    for number in range(4):
        queued(ledger, "ann", 200.0 + number)
        queued(ledger, "bob", 200.5 + number)
    assert sorted(owners(ledger, 2, 2e6)) == ["ann", "bob"]


def test_what_was_begun_is_owed_while_others_wait(ledger) -> None:
    for number in range(5):
        queued(ledger, "bob", 100.0 + number)
    queued(ledger, "ann", 99.0, 3 * UNIT)
    assert sorted(owners(ledger, 2)) == ["ann", "bob"]
    queued(ledger, "ann", 200.0)
    assert owners(ledger, 3, 2e6)[:2] == ["bob", "bob"]


def test_a_queue_of_each_model_is_for_itself(ledger) -> None:
    for number in range(6):
        queued(ledger, "ann", 100.0 + number)
        queued(ledger, "ann", 100.5 + number, model="other")
        queued(ledger, "bob", 101.0 + number, model="other")
    assert owners(ledger, 3) == ["ann"] * 3
    taken = [next_one(ledger, 2e6 + n, ("other",)) for n in range(4)]
    assert sorted(one.owner for one in taken if one) == ["ann", "ann", "bob", "bob"]


def test_the_checker_takes_turns_by_the_size_of_graphs(ledger) -> None:
    for number in range(8):
        ledger.submit(job(100.0 + number, owner="ann", nodes=900), 100)
    for number in range(30):
        ledger.submit(job(200.0 + number, owner="bob"), 100)
    taken = [ledger.claim("received", ["tiny"], "c", 300.0 + n, 1e6) for n in range(22)]
    names = [one.owner for one in taken if one]
    assert (names.count("ann"), names.count("bob")) == (2, 20)


def test_owners_who_ask_take_turns(ledger) -> None:
    for number, owner in enumerate(["ann"] * 5 + ["bob"] * 2 + ["eve"]):
        ledger.ask(Question(f"q{number}", "TokensQuery", owner, b"", created=float(number)))
    taken = [one.id for _ in range(8) if (one := ledger.next_question()) is not None]
    assert taken == ["q0", "q5", "q7", "q1", "q6", "q2", "q3", "q4"]
    assert ledger.next_question() is None


def test_jobs_of_models_that_are_not_there_hold_up_nobody_and_are_not_lost(ledger) -> None:
    ledger.submit(job(100.0, owner="ann", model="loading"), 100)
    for number in range(6):
        ledger.submit(job(101.0 + number, owner="bob"), 100)
    for number in range(5):
        found = ledger.claim("received", ["tiny"], "c", 200.0 + number, 1e6)
        assert found is not None and found.owner == "bob"
    found = ledger.claim("received", ["tiny", "loading"], "c", 300.0, 1e6)
    assert found is not None and found.owner in ("ann", "bob")
    last = ledger.claim("received", ["tiny", "loading"], "c", 301.0, 1e6)
    assert last is not None and {found.owner, last.owner} == {"ann", "bob"}


def test_a_job_taken_back_waits_again_as_the_first_of_its_owner(ledger) -> None:
    first = queued(ledger, "ann", 100.0)
    queued(ledger, "ann", 101.0)
    queued(ledger, "bob", 102.0)
    begun = next_one(ledger, 200.0)
    assert begun is not None and begun.id == first.id
    ledger.release("w", 201.0)
    assert owners(ledger, 1) == ["bob"]
    again = next_one(ledger, 2e6)
    assert again is not None and (again.id, again.attempts) == (first.id, 2)


def test_who_has_cancelled_all_his_jobs_is_forgotten(ledger) -> None:
    mine = [queued(ledger, "ann", 100.0 + n).id for n in range(3)]
    for number in range(4):
        queued(ledger, "bob", 101.0 + number)
    for id in mine:
        ledger.step(id, CANCEL, 110.0)
    assert owners(ledger, 4) == ["bob"] * 4
    assert next_one(ledger, 2e6) is None


# -- how many at once ------------------------------------------------------------------------------


def test_only_so_many_jobs_of_a_key_run_at_once(make) -> None:
    ledger = make(Settings(running_jobs=2))
    for number in range(4):
        queued(ledger, "ann", 100.0 + number)
    many = [queued(ledger, "bob", 110.0 + n, limits={"running_jobs": 3}).id for n in range(4)]
    taken = [one for n in range(8) if (one := next_one(ledger, 200.0 + n)) is not None]
    assert sorted(one.owner for one in taken) == ["ann"] * 2 + ["bob"] * 3
    done = next(one for one in taken if one.owner == "bob")
    ledger.step(done.id, FINISHED, 300.0, done.token)
    freed = next_one(ledger, 301.0)
    assert freed is not None and freed.id == many[-1]
    assert next_one(ledger, 302.0) is None


# -- a batch ---------------------------------------------------------------------------------------


def test_a_claim_takes_only_what_fits(ledger) -> None:
    queued(ledger, "ann", 100.0, lane="a", tokens=50, peak=500)
    queued(ledger, "ann", 101.0, lane="b", tokens=5, peak=5)
    queued(ledger, "ann", 102.0, lane="a", tokens=10, peak=900)
    queued(ledger, "bob", 103.0, lane="a", tokens=10, peak=100)
    assert next_one(ledger, 200.0, lane="c") is None
    assert next_one(ledger, 200.0, lane="a", tokens=9) is None
    assert next_one(ledger, 200.0, lane="a", peak=99) is None
    small = next_one(ledger, 200.0, lane="a", tokens=10, peak=100)
    assert small is not None and small.owner == "bob"
    assert next_one(ledger, 200.0, beyond=900) is None
    wide = next_one(ledger, 201.0, lane="a", tokens=10)
    assert wide is not None and (wide.tokens, wide.peak, wide.lane) == (10, 900, "a")
    rest = [next_one(ledger, 202.0 + n) for n in range(3)]
    assert [one and one.tokens for one in rest] == [50, 5, None]


def test_a_batch_takes_jobs_in_fair_order(ledger) -> None:
    for number in range(20):
        queued(ledger, "heavy", 100.0 + number, lane="a")
    for number, owner in enumerate(("u1", "u2", "u3")):
        queued(ledger, owner, 150.0 + number, lane="a")
        queued(ledger, owner, 160.0 + number, lane="b")
    batch = [next_one(ledger, 200.0 + n, lane="a") for n in range(6)]
    names = [one.owner for one in batch if one]
    assert sorted(names[:4]) == ["heavy", "u1", "u2", "u3"]
    assert names[4:] == ["heavy", "heavy"]
    after = [next_one(ledger, 300.0 + n) for n in range(3)]  # those of lane b were not forgotten
    assert [one and one.lane for one in after] == ["b", "b", "b"]


def test_a_batch_claimed_at_once_is_what_it_is_one_by_one(tmp_path) -> None:
    """The same jobs in the same order, and what they take together fits."""
    drawn = random.Random(7)
    ledgers: list[Ledger] = [MemoryLedger(SETTINGS), open_ledger(tmp_path / "w.sqlite", SETTINGS)]
    one_by_one = MemoryLedger(SETTINGS)
    for number in range(60):
        made = job(100.0 + number, owner=drawn.choice("abcde"), weight=drawn.choice([1.0, 2.0]))
        tokens, peak = drawn.randrange(1, 40), drawn.randrange(1, 900)
        priced = replace(PRICED, cost=UNIT, lane=drawn.choice("xy"), tokens=tokens, peak=peak)
        for ledger in (*ledgers, one_by_one):
            ledger.submit(made, 1000)
            ledger.step(made.id, priced, 200.0)
    for lane in ("x", "y", "x"):
        room = {"tokens": 100, "peak": 4000}
        expected: list[str] = []
        while len(expected) < 7 and min(room.values()) > 0:
            one = next_one(one_by_one, 300.0, lane=lane, **room)
            if one is None:
                break
            expected.append(one.id)
            room = {"tokens": room["tokens"] - one.tokens, "peak": room["peak"] - one.peak}
        for ledger in ledgers:
            found = ledger.claim_all(
                "queued", ["tiny"], "w", 300.0, 900.0, 7, lane=lane, tokens=100, peak=4000
            )
            assert [one.id for one in found] == expected
            assert sum(one.tokens for one in found) <= 100
            assert {one.state for one in found} <= {"running"}
    ledgers[1].close()


@pytest.mark.parametrize("stage", ["received", "queued"])
def test_who_was_lost_before_is_the_last_of_a_batch(ledger, stage) -> None:
    """What ended one checker or worker is not claimed before others: they would be lost with it
    again. Here it would be the first of four."""
    for number in range(4):
        ledger.submit(job(100.0 + number), 10)
    for one in ledger.unfinished() if stage == "queued" else []:
        ledger.step(one.id, PRICED, 120.0)
    (first,) = ledger.claim_all(stage, ["tiny"], "c", 150.0, 900.0, 1)
    ledger.release("c", 160.0)
    rest = [one.id for one in ledger.unfinished() if one.id != first.id]
    batches = [
        [one.id for one in ledger.claim_all(stage, ["tiny"], "c", 200.0, 900.0, 8)]
        for _ in range(3)
    ]
    assert batches == [[first.id], rest, []]


def test_what_is_beyond_a_size_can_be_asked_for(ledger) -> None:
    queued(ledger, "ann", 100.0, peak=5)
    queued(ledger, "bob", 101.0, peak=50)
    found = next_one(ledger, 200.0, beyond=5)
    assert found is not None and found.owner == "bob"


def test_space_of_a_worker_is_what_it_measured_last(ledger) -> None:
    assert ledger.space("tiny") is None
    for free in (5, 7):
        ledger.put_space(Space("tiny", free, 9, 1.5))
    assert ledger.space("tiny") == Space("tiny", 7, 9, 1.5)


# -- what is told of it ----------------------------------------------------------------------------


def test_ahead_follows_the_fair_order(ledger) -> None:
    for number in range(30):
        queued(ledger, "ann", 100.0 + number)
    begun = next_one(ledger, 150.0)
    assert begun is not None
    late = queued(ledger, "bob", 200.0)
    last = ledger.jobs("ann", 1)[0]
    assert ledger.ahead(late.id) <= 2
    assert ledger.ahead(last.id) == 30
    assert ledger.ahead(begun.id) == 0 == ledger.ahead("nobody")


def test_both_ledgers_say_the_same_whatever_happens(tmp_path) -> None:
    ledgers: list[Ledger] = [MemoryLedger(SETTINGS), open_ledger(tmp_path / "w.sqlite", SETTINGS)]
    drawn = random.Random(5)
    waiting: list[Job] = []
    for step in range(250):
        now = 1000.0 + step
        if drawn.random() < 0.6:
            owner = drawn.choice("abcde")
            made = job(now, owner=owner, weight=drawn.choice([1.0, 2.0, 4.0]))
            priced = replace(PRICED, cost=drawn.randrange(20) * UNIT, lane=drawn.choice("xy"))
            for ledger in ledgers:
                ledger.submit(made, 1000)
                ledger.step(made.id, priced, now + 0.1)
            waiting.append(made)
        else:
            lane = drawn.choice([None, "x", "y"])
            taken = [next_one(ledger, now, lane=lane) for ledger in ledgers]
            ids = [one and one.id for one in taken]
            seconds = drawn.random()
            assert ids[0] == ids[1]
            for ledger, one in zip(ledgers, taken, strict=True):
                if one is not None:
                    took = replace(FINISHED, seconds=seconds)
                    ledger.step(one.id, took, now + 0.2, one.token)
            waiting = [one for one in waiting if one.id != ids[0]]
        if waiting and step % 10 == 0:
            id = drawn.choice(waiting).id
            assert ledgers[0].ahead(id) == ledgers[1].ahead(id)
    ledgers[1].close()


# -- what is counted -------------------------------------------------------------------------------


def test_what_was_used_is_added_up_and_outlives_the_process(make, request) -> None:
    ledger = make()
    ann = Usage(owner="ann", day="2026-01-02", model="tiny", jobs=1, cost=2.5, seconds=0.5, up=3)
    bob = Usage(owner="bob", day="2026-01-01", down=4, requests=5, refusals=6, weights=7)
    ledger.add_usage([ann, bob])
    ledger.add_usage([replace(ann, cost=1.0, up=2**40)])
    both = replace(ann, jobs=2, cost=3.5, seconds=1.0, up=3 + 2**40)
    assert ledger.usage() == [bob, both]
    assert ledger.usage("ann") == [both] == ledger.usage(since="2026-01-02")
    assert ledger.usage(until="2026-01-01") == [bob]
    if "sqlite" in request.node.name:
        assert make().usage() == [bob, both]


def test_a_step_that_fails_counts_nothing(ledger) -> None:
    queued(ledger, "ann", 100.0)
    begun = next_one(ledger, 200.0)
    assert begun is not None
    with pytest.raises(LostClaimError):
        ledger.step(begun.id, FINISHED, 201.0, "not the token")
    assert ledger.usage() == []
    ledger.step(begun.id, replace(FINISHED, seconds=0.25), 202.0, begun.token)
    with pytest.raises(LostClaimError):
        ledger.step(begun.id, FINISHED, 203.0, begun.token)
    (row,) = ledger.usage("ann")
    assert (row.jobs, row.cost, row.seconds, row.day) == (1, UNIT, 0.25, "1970-01-01")


# -- a heavy user and a light one ------------------------------------------------------------------


def test_a_light_user_beside_hundreds_of_jobs_waits_two_passes(make) -> None:
    """A worker that takes 0.4 seconds for each job, on a clock of numbers, over a real store."""
    ledger, now, seconds = make(), 1000.0, 0.4
    for number in range(200):  # more than the worker can do in the time
        queued(ledger, "heavy", now - 500 + number)
    came: dict[str, float] = {}
    waited: list[float] = []
    coming = [now + 1 + second for second in range(40)]
    while len(waited) < 40:
        while coming and coming[0] <= now:
            at = coming.pop(0)
            came[queued(ledger, "light", at).id] = at
        taken = next_one(ledger, now)
        assert taken is not None
        if taken.owner == "light":
            waited.append(now - came[taken.id])
        now += seconds
        ledger.step(taken.id, FINISHED, now, taken.token)
    assert sorted(waited)[int(0.95 * 40)] <= 2 * seconds


# -- prices that are wrong -------------------------------------------------------------------------

WRONG = {"cheap": 5.0, "right": 1.0}
"""Seconds that a job of each owner takes, by what it was priced at."""


def shares(ledger: Ledger, hands: int, keep: dict[str, int], weight: float) -> float:
    """The part of the measured time that `cheap` got of workers with so many hands, on a clock of
    numbers, beside `right` with a weight. Each owner keeps so many jobs there, waiting or running.
    Of the second half: the first is for the pace to be learnt."""
    total = 400.0 / hands**0.5
    weights = {"cheap": 1.0, "right": weight}
    drawn, now = random.Random(3), 1000.0
    got = dict.fromkeys(WRONG, 0.0)
    there = dict.fromkeys(WRONG, 0)
    busy: list[tuple[float, float, Job]] = []
    while now < 1000.0 + total:
        for owner, most in keep.items():
            while there[owner] < most:
                cost = drawn.uniform(0.5, 1.5) * UNIT
                queued(ledger, owner, now - 0.5, cost, weight=weights[owner])
                there[owner] += 1
        while len(busy) < hands and (one := next_one(ledger, now)) is not None:
            seconds = WRONG[one.owner] * one.cost / UNIT
            busy.append((now + seconds, seconds, one))
        now, seconds, one = min(busy, key=lambda each: each[0])
        busy.remove((now, seconds, one))
        ledger.step(one.id, replace(FINISHED, seconds=seconds), now, one.token)
        there[one.owner] -= 1
        if now > 1000.0 + total / 2:
            got[one.owner] += seconds
    return got["cheap"] / sum(got.values())


@pytest.mark.parametrize(
    ("hands", "keep", "weight"),
    [
        (1, {"cheap": 20, "right": 20}, 1.0),
        (6, {"cheap": 20, "right": 20}, 1.0),  # prices are made good when others were begun
        (3, {"cheap": 1, "right": 20}, 4.0),  # nothing of its own waits while its job runs
    ],
)
def test_jobs_that_are_priced_too_cheap_get_no_more_than_their_share(
    make, hands, keep, weight
) -> None:
    fair = 1.0 / (1.0 + weight)
    assert shares(make(), hands, keep, weight) == pytest.approx(fair, rel=0.1)


def test_the_pace_is_learnt_for_each_model_and_outlives_the_process(make, request) -> None:
    ledger = make()
    for number, (owner, seconds) in enumerate([("ann", 1.0), ("bob", 1.0)] * 4):
        queued(ledger, owner, 100.0 + number)
        one = next_one(ledger, 100.7 + number)
        assert one is not None
        ledger.step(one.id, replace(FINISHED, seconds=seconds), 100.9 + number, one.token)
    ledger = make() if "sqlite" in request.node.name else ledger
    for number in range(12):
        queued(ledger, "ann", 200.0 + number)
        queued(ledger, "bob", 200.5 + number)
    slow = next_one(ledger, 300.0)
    assert slow is not None
    ledger.step(slow.id, replace(FINISHED, seconds=5.0), 305.0, slow.token)
    other = "bob" if slow.owner == "ann" else "ann"
    assert owners(ledger, 3, 400.0) == [other] * 3


# -- a folder from before --------------------------------------------------------------------------


def test_jobs_that_waited_before_there_was_an_order_are_taken(tmp_path) -> None:
    before = next(n for n, step in enumerate(MIGRATIONS) if any("TABLE share" in s for s in step))
    Database(tmp_path / "old.sqlite", MIGRATIONS[:before]).close()
    with sqlite3.connect(tmp_path / "old.sqlite") as rows:
        for number, (owner, state) in enumerate(
            [("ann", "queued"), ("ann", "queued"), ("bob", "queued"), ("eve", "received")]
        ):
            old = job(100.0 + number, owner=owner, state=state)
            body = msgspec.msgpack.encode(old)
            rows.execute(
                """INSERT INTO job (id, owner, request_id, model, state, created, body)
                    VALUES (?, ?, ?, ?, ?, ?, ?)""",
                (old.id, owner, old.request_id, old.model, state, old.created, body),
            )
    rows.close()
    ledger = open_ledger(tmp_path / "old.sqlite", SETTINGS)
    assert sorted(owners(ledger, 2)) == ["ann", "bob"]
    assert owners(ledger, 2, 2e6) == ["ann"]
    found = ledger.claim("received", ["tiny"], "c", 3e6, 4e6)
    assert found is not None and found.owner == "eve"
    ledger.close()
