"""Whose turn it is: weighted fair queueing alone, without a store, a clock or a worker.

The oracles are theorems about start-time fair queueing, and a worker that is simulated on a clock
of numbers; nothing here asks the code under test what is fair.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.service.jobs import job
from weft.service.jobs.fair import (
    NODES,
    OVERHEAD,
    Head,
    Pace,
    Share,
    Turn,
    arrived,
    before,
    charge_of,
    choose,
    in_order,
    learnt,
    queue_of,
    settled,
    starts,
)
from weft.service.jobs.life import Job

UNIT = 100 * OVERHEAD
"""A cost beside which the overhead is little."""


@dataclass
class Line:
    """One queue, kept as a store keeps it, but in two dicts."""

    shares: dict[str, Share] = field(default_factory=dict)
    waiting: dict[str, list[Job]] = field(default_factory=dict)
    clock: float = 0.0
    held: set[str] = field(default_factory=set)
    time: float = 0.0

    def put(self, one: Job, now: float = 0.0) -> None:
        if not self.waiting.get(one.owner):
            self.shares[one.owner] = arrived(self.shares.get(one.owner), self.clock, now)
        self.waiting.setdefault(one.owner, []).append(one)

    def head(self, owner: str) -> Head:
        mine = self.waiting.get(owner)
        return "idle" if not mine else "held" if owner in self.held else mine[0]

    def take(self, now: float = 0.0) -> Turn | None:
        turn = choose(in_order(self.shares), self.clock, self.head, now)
        if turn is not None:
            assert turn.clock >= self.clock
            self.clock = turn.clock
            for owner, share in turn.shares.items():
                if share is None:
                    del self.shares[owner]
                else:
                    self.shares[owner] = share
            self.waiting[turn.job.owner].remove(turn.job)
        return turn

    def owners(self, count: int) -> list[str]:
        """Of the next jobs."""
        self.time += 1000.0
        turns = [self.take(self.time + number) for number in range(count)]
        return [turn.job.owner for turn in turns if turn is not None]


_created = itertools.count(1)


def queued(owner: str, cost: float = UNIT, weight: float = 1.0, **fields) -> Job:
    """Each a second after the one before."""
    created = float(next(_created))
    return job(created, owner=owner, state="queued", cost=cost, weight=weight, **fields)


def filled(*jobs: Job) -> Line:
    line = Line()
    for one in jobs:
        line.put(one)
    return line


# -- a few cases by hand -------------------------------------------------------------------------


def test_owners_of_equal_jobs_take_turns() -> None:
    line = filled(*[queued("ann") for _ in range(4)], queued("bob"), queued("bob"))
    assert line.owners(6) == ["ann", "bob", "ann", "bob", "ann", "ann"]


def test_cost_counts_and_not_the_number_of_jobs() -> None:
    small = [queued("bob", UNIT) for _ in range(8)]
    line = filled(*[queued("ann", 4 * UNIT) for _ in range(8)], *small)
    first = line.owners(10)
    assert (first.count("ann"), first.count("bob")) == (2, 8)


def test_an_owner_with_twice_the_weight_gets_twice_as_much() -> None:
    line = filled(
        *[queued("ann", weight=2.0) for _ in range(20)], *[queued("bob") for _ in range(20)]
    )
    first = line.owners(15)
    assert (first.count("ann"), first.count("bob")) == (10, 5)


def test_an_owners_own_jobs_stay_in_order() -> None:
    jobs = [queued("ann", UNIT * (9 - n)) for n in range(8)]
    line = filled(*jobs)
    assert [line.take().job for _ in jobs] == jobs  # type: ignore[union-attr]


def test_jobs_that_cost_nothing_count_too() -> None:
    line = filled(*[queued("ann", 0.0) for _ in range(9)], *[queued("bob", 0.0) for _ in range(9)])
    first = line.owners(8)
    assert (first.count("ann"), first.count("bob")) == (4, 4)


def test_what_was_not_used_is_not_saved_up() -> None:
    line = filled(*[queued("ann") for _ in range(120)], queued("bob"))
    assert line.owners(102).count("ann") == 101  # bob comes once, and is away for 100 turns
    for _ in range(50):
        line.put(queued("bob"))
    assert line.owners(10).count("bob") == 5


def test_a_newcomer_waits_for_one_job_of_each_other_at_most() -> None:
    others = [f"u{n}" for n in range(5)]
    line = filled(*[queued(owner) for owner in others for _ in range(50)])
    line.owners(23)
    line.put(queued("new"))
    assert "new" in line.owners(6)


def test_who_may_run_no_more_is_passed_over_and_saves_up_nothing() -> None:
    line = filled(*[queued(owner) for owner in ("ann", "bob") for _ in range(30)])
    line.held = {"ann"}
    assert set(line.owners(10)) == {"bob"}
    line.held = set()
    assert line.owners(10).count("ann") <= 6


def test_nobody_is_next_where_nobody_may() -> None:
    line = filled(queued("ann"))
    line.held = {"ann"}
    assert line.take() is None
    assert Line().take() is None


def test_jobs_that_do_not_fit_are_passed_over_and_keep_their_place() -> None:
    shares = {"ann": Share(10.0, 1.0), "bob": Share(20.0, 2.0)}
    turn = choose(in_order(shares), 10.0, {"ann": "unfit", "bob": queued("bob")}.__getitem__, 5.0)  # type: ignore[arg-type]
    assert turn is not None
    assert (turn.job.owner, turn.clock) == ("bob", 10.0)
    assert set(turn.shares) == {"bob"}


def test_a_graph_counts_in_the_checkers_queue_by_its_nodes() -> None:
    line = filled(
        *[job(owner="ann", nodes=9 * NODES) for _ in range(9)],
        *[job(owner="bob", nodes=0) for _ in range(30)],
    )
    first = line.owners(22)
    assert (first.count("ann"), first.count("bob")) == (2, 20)


@pytest.mark.parametrize(
    ("fields", "queue"),
    [
        ({"state": "received"}, "price"),
        ({"state": "received", "token": "t"}, None),
        ({"state": "queued", "model": "a/b"}, "run/a/b"),
        ({"state": "running", "token": "t"}, None),
        ({"state": "done", "ended": 1.0}, None),
    ],
)
def test_where_a_job_waits(fields: dict, queue: str | None) -> None:
    assert queue_of(job(**fields)) == queue


# -- what jobs took ------------------------------------------------------------------------------


def test_a_job_that_took_what_it_was_priced_at_changes_nothing() -> None:
    one = queued("ann", 3 * UNIT, weight=2.0)
    pace = Pace(10 * charge_of(queued("ann"), "queued"), 10.0)
    seconds = 2.0 * charge_of(one, "queued") / charge_of(queued("ann"), "queued")
    place = settled(Share(7.0, 1.0), pace, one, seconds)
    assert place == Share(pytest.approx(7.0, abs=1e-3), 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [0.0, 0.5, 5.0])
def test_what_a_job_took_is_what_its_owner_was_charged_in_the_end(seconds: float) -> None:
    one, pace = queued("ann", weight=4.0), Pace(UNIT, 1.0)
    begun = settled(Share(charge_of(one, "queued")), pace, one, seconds)
    assert begun.tag == pytest.approx(seconds * UNIT / 4.0)


def test_nothing_is_made_good_where_no_job_took_any_time() -> None:
    one = queued("ann")
    assert learnt(Pace(), one, 0.0).seconds == 0.0
    assert settled(Share(7.0), learnt(Pace(), one, 0.0), one, 0.0) == Share(7.0)
    assert settled(Share(7.0), learnt(Pace(), one, 2.5), one, 2.5) == Share(7.0)  # the first


def test_the_pace_follows_what_jobs_take_now() -> None:
    pace, one = Pace(), queued("ann")
    for seconds in [1.0] * 300 + [0.1] * 500:
        pace = learnt(pace, one, seconds)
    now = charge_of(one, "queued") / 0.1
    assert pace.charged / pace.seconds == pytest.approx(now, rel=0.1)


def test_who_has_jobs_that_run_and_none_that_wait_keeps_his_place() -> None:
    shares = {"ann": Share(1.0, 1.0), "bob": Share(20.0, 2.0)}
    turn = choose(in_order(shares), 10.0, {"ann": "busy", "bob": queued("bob")}.__getitem__, 5.0)  # type: ignore[arg-type]
    assert turn is not None
    assert (turn.job.owner, turn.clock, set(turn.shares)) == ("bob", 20.0, {"bob"})


# -- properties ----------------------------------------------------------------------------------

OWNERS: tuple[str, ...] = ("ann", "bob", "eve", "dan")
WEIGHTS: dict[str, float] = {"ann": 1.0, "bob": 2.0, "eve": 0.5, "dan": 1.0}
costs = st.integers(0, 50).map(lambda n: n * UNIT / 10)
arrivals = st.lists(st.tuples(st.sampled_from(OWNERS), costs), max_size=6)
"""What arrives before each turn."""


def played(rounds: Iterable[list[tuple[str, float]]]) -> list[tuple[Job, frozenset[str]]]:
    """Each turn's job, and who had a job waiting at that moment."""
    line, found = Line(), []
    for number, new in enumerate(rounds):
        for owner, cost in new:
            line.put(queued(owner, cost, WEIGHTS[owner]), float(number))
        waiting = frozenset(owner for owner, jobs in line.waiting.items() if jobs)
        turn = line.take(float(number))
        assert (turn is None) == (not waiting)  # whoever can work does
        if turn is not None:
            found.append((turn.job, waiting))
    return found


@settings(max_examples=200, deadline=None)
@given(st.lists(arrivals, min_size=1, max_size=60))
def test_between_two_who_always_wait_the_shares_differ_by_one_job_each(rounds) -> None:
    """The fairness theorem: |W_f/w_f - W_m/w_m| <= l_f/w_f + l_m/w_m while both wait."""
    turns = played(rounds)
    most = dict.fromkeys(OWNERS, 0.0)
    for one, _ in turns:
        most[one.owner] = max(most[one.owner], charge_of(one, "queued"))
    for start in range(len(turns)):
        got = dict.fromkeys(OWNERS, 0.0)
        waiting = set(OWNERS)
        for one, there in turns[start:]:
            waiting &= there
            if len(waiting) < 2:
                break
            got[one.owner] += charge_of(one, "queued")
            least = min(waiting, key=got.__getitem__)
            for owner in waiting:
                assert got[owner] - got[least] <= (most[owner] + most[least]) * (1 + 1e-9)


@settings(max_examples=200, deadline=None)
@given(st.lists(arrivals, min_size=1, max_size=40), st.sampled_from(OWNERS))
def test_who_comes_back_is_served_before_others_are_twice(rounds, owner) -> None:
    line = Line()
    for new in rounds:
        for who, cost in new:
            if who != owner:
                line.put(queued(who, cost, WEIGHTS[who]))
        line.take()
    line.put(queued(owner, UNIT, WEIGHTS[owner]))
    seen: list[str] = []
    while owner not in seen:
        seen += line.owners(1)
    assert all(seen.count(who) <= 1 for who in OWNERS)


@settings(max_examples=100, deadline=None)
@given(st.lists(arrivals, min_size=1, max_size=12))
def test_what_comes_before_is_what_is_taken_before(rounds) -> None:
    line = Line()
    for number, new in enumerate(rounds):
        for owner, cost in new:
            line.put(queued(owner, cost, WEIGHTS[owner]), float(number))
        if number % 3 == 2:
            line.take(float(number))
    left = [one for jobs in line.waiting.values() for one in jobs]
    told = {one.id: before(one, left, line.shares, line.clock) for one in left}
    begin = starts(left, line.shares, line.clock)
    taken = [line.take(1e6 + n).job.id for n in range(len(left))]  # type: ignore[union-attr]
    order = sorted(told, key=told.__getitem__)
    assert sorted(told.values()) == list(range(len(left)))
    # Where two stand at the same tag, which comes first depends on who was served meanwhile.
    assert [begin[id][0] for id in order] == [begin[id][0] for id in taken]


# -- a heavy user and a light one ----------------------------------------------------------------


def waits(heavy: int, seconds: float, light_cost: float, count: int = 300) -> list[float]:
    """How long a light user's jobs wait, one every second, on a worker that does one job after
    another; a heavy one's `heavy` jobs, `seconds` each, were there before."""
    line, now = Line(), 0.0
    for _ in range(heavy):
        line.put(queued("heavy", seconds * UNIT))
    coming = [(float(second), queued("light", light_cost * UNIT)) for second in range(1, count + 1)]
    heapq.heapify(coming)
    came: dict[str, float] = {}
    waited: list[float] = []
    while len(waited) < count:
        while coming and coming[0][0] <= now:
            at, one = heapq.heappop(coming)
            came[one.id] = at
            line.put(one, at)
        turn = line.take(now)
        if turn is None:
            now = coming[0][0]
            continue
        if turn.job.owner == "light":
            waited.append(now - came[turn.job.id])
        now += turn.job.cost / UNIT
    return sorted(waited)


@pytest.mark.parametrize(("seconds", "light_cost"), [(0.4, 0.4), (0.9, 0.05), (0.25, 0.5)])
def test_a_light_user_waits_two_passes_at_most(seconds: float, light_cost: float) -> None:
    waited = waits(1000, seconds, light_cost)
    p95 = waited[int(0.95 * len(waited))]
    assert p95 <= 2 * max(seconds, light_cost)
    in_line = 1000 * seconds  # what it would be, first come first served
    assert p95 < in_line / 100


def test_without_fairness_the_light_user_would_wait_for_the_thousand() -> None:
    """The measure above can tell: with all jobs under one name it is not fair any more."""
    line = Line()
    for _ in range(1000):
        line.put(queued("one"))
    late = replace(queued("one"), id="late")
    line.put(late)
    turns = [line.take() for _ in range(1001)]
    assert [turn.job.id for turn in turns if turn is not None].index("late") == 1000
