"""The life of a job: each step by hand, the table whole, and any order of events."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from msgspec.structs import replace

from tests.service.jobs import CANCEL, FAILED, FINISHED, PRICED, REFUSED, STOPPED, error, job
from weft.service.jobs.life import (
    BEGIN,
    FINAL,
    HISTORY,
    STATES,
    TABLE,
    DropSubmit,
    Event,
    IllegalStepError,
    Job,
    Leased,
    Lost,
    Note,
    Ring,
    step,
)

LEASED = Leased("w1", "token-1", 999.0)
LOST = Lost(3, error("worker-lost"))

OVER = (Note("end"), DropSubmit(), Ring("gateway"))


def after(*events: Event, job_: Job | None = None) -> Job:
    """The job after these events, one second apart, the first at 101."""
    found = job_ or job(created=100.0)
    for now, event in enumerate(events, start=101):
        found = step(found, event, float(now)).job
    return found


# -- the straight way ----------------------------------------------------------------------------


def test_a_job_that_goes_well():
    found = after(LEASED, PRICED, replace(LEASED, token="token-2"), FINISHED)
    assert found.state == "done"
    assert (found.pricings, found.attempts) == (1, 1)
    assert (found.cost, found.price) == (PRICED.cost, PRICED.price)
    assert (found.result_bytes, found.result_sha256) == (7, "ab" * 32)
    assert found.names == FINISHED.names
    assert found.error is None
    assert found.ended == 104.0
    assert (found.holder, found.token, found.until) == (None, None, None)


def test_each_stage_gets_its_seconds():
    found = job(created=100.0)
    for now, event in ((101, LEASED), (103, PRICED), (107, LEASED), (115, FINISHED)):
        found = step(found, event, float(now)).job
    assert found.stages == {"price": 3.0, "queue": 4.0, "run": 8.0}


def test_stages_of_several_attempts_add_up():
    found = after(LEASED, PRICED, LEASED, LOST, LEASED, FINISHED)
    assert found.stages == {"price": 2.0, "queue": 2.0, "run": 2.0}


def test_a_clock_that_goes_back_gives_no_negative_seconds():
    found = step(step(job(created=100.0), PRICED, 50.0).job, LEASED, 40.0).job
    assert found.stages == {"price": 0.0, "queue": 0.0}


def test_what_is_to_be_done_about_each_step():
    queued = after(LEASED, PRICED)
    running = after(LEASED, PRICED, LEASED)
    cancelling = step(running, CANCEL, 200.0).job
    assert (Note("state"), Ring("checker")) == BEGIN
    expected = [
        (job(), LEASED, ()),
        (job(), PRICED, (Note("state"), Ring("worker"))),
        (job(), REFUSED, OVER),
        (after(LEASED), LOST, (Ring("checker"),)),
        (job(), CANCEL, OVER),
        (queued, LEASED, (Note("state"),)),
        (queued, CANCEL, OVER),
        (running, FINISHED, OVER),
        (running, FAILED, OVER),
        (running, LOST, (Note("state"), Ring("worker"))),
        (running, replace(LOST, attempts=1), OVER),
        (running, CANCEL, (Ring("worker"),)),
        (cancelling, STOPPED, OVER),
    ]
    for before, event, commands in expected:
        assert step(before, event, 300.0).commands == commands, (before.state, event)


# -- refusals, losses, ends ----------------------------------------------------------------------


def test_a_refused_job_has_failed_with_the_checkers_reason():
    found = after(LEASED, REFUSED)
    assert (found.state, found.error) == ("failed", REFUSED.error)
    assert found.token is None


def test_a_failed_job_keeps_its_reason():
    found = after(LEASED, PRICED, LEASED, FAILED)
    assert (found.state, found.error) == ("failed", FAILED.error)


def test_a_lost_run_waits_again_until_the_attempts_are_used_up():
    found = after(LEASED, PRICED)
    for attempt in (1, 2):
        found = after(LEASED, LOST, job_=found)
        assert (found.state, found.attempts, found.token) == ("queued", attempt, None)
    found = after(LEASED, LOST, job_=found)
    assert (found.state, found.attempts, found.error) == ("failed", 3, LOST.error)


def test_a_lost_pricing_waits_again_until_the_attempts_are_used_up():
    found = after(LEASED, LOST, LEASED, LOST)
    assert (found.state, found.pricings, found.token) == ("received", 2, None)
    found = after(LEASED, LOST, job_=found)
    assert (found.state, found.pricings, found.error) == ("failed", 3, LOST.error)


@pytest.mark.parametrize("events", [(), (LEASED,), (LEASED, PRICED)])
def test_a_job_that_waits_is_cancelled_at_once(events):
    found = after(*events, CANCEL)
    assert (found.state, found.error, found.token) == ("cancelled", CANCEL.error, None)


def test_a_running_job_is_cancelled_when_its_worker_has_stopped():
    found = after(LEASED, PRICED, LEASED, CANCEL)
    assert (found.state, found.cancelling, found.token) == ("running", True, "token-1")
    found = step(found, STOPPED, 200.0).job
    assert (found.state, found.cancelling, found.error) == ("cancelled", False, STOPPED.error)


def test_to_cancel_twice_is_to_cancel_once():
    once = after(LEASED, PRICED, LEASED, CANCEL)
    twice = step(once, replace(CANCEL, error=b"other"), 300.0).job
    assert replace(twice, history=()) == replace(once, history=())


def test_a_job_that_finished_before_it_could_be_stopped_is_done():
    found = after(LEASED, PRICED, LEASED, CANCEL, FINISHED)
    assert (found.state, found.error, found.cancelling) == ("done", None, False)


def test_a_job_that_failed_before_it_could_be_stopped_has_failed():
    assert after(LEASED, PRICED, LEASED, CANCEL, FAILED).error == FAILED.error


def test_a_job_that_is_lost_while_it_is_to_be_cancelled_is_cancelled():
    found = after(LEASED, PRICED, LEASED, CANCEL, LOST)
    assert (found.state, found.error) == ("cancelled", CANCEL.error)


# -- the table -----------------------------------------------------------------------------------

LEGAL = {
    "received": {"Leased", "Priced", "Refused", "Lost", "Cancel"},
    "queued": {"Leased", "Refused", "Cancel"},
    "running": {"Finished", "Failed", "Lost", "Cancel", "Stopped"},
    "done": set(),
    "failed": set(),
    "cancelled": set(),
}
"""Which events can happen in which state, as the drawing at the head of the module has it."""

BEFORE: dict[str, tuple[Event, ...]] = {
    "received": (LEASED,),
    "queued": (LEASED, PRICED),
    "running": (LEASED, PRICED, LEASED, CANCEL),
    "done": (LEASED, PRICED, LEASED, FINISHED),
    "failed": (LEASED, REFUSED),
    "cancelled": (CANCEL,),
}
EVENTS = {
    type(event).__name__: event
    for event in (PRICED, REFUSED, LEASED, LOST, FINISHED, FAILED, CANCEL, STOPPED)
}


def test_every_event_and_every_state_is_tried():
    assert {kind.__name__ for kind in get_args(Event)} == set(EVENTS)
    assert tuple(LEGAL) == tuple(BEFORE) == STATES
    assert {(state, kind.__name__) for state, kind in TABLE} == {
        (state, name) for state, names in LEGAL.items() for name in names
    }


@pytest.mark.parametrize(("state", "name"), [*itertools.product(STATES, EVENTS)])
def test_each_event_in_each_state_is_in_the_table_or_raises(state, name):
    before = after(*BEFORE[state])
    assert before.state == state
    if name == "Leased" and state == "received":
        before = job()  # the one above is somebody's already
    if name in LEGAL[state]:
        assert step(before, EVENTS[name], 500.0).job.state in STATES
    else:
        with pytest.raises(IllegalStepError, match=f"is {state}: {name} cannot happen"):
            step(before, EVENTS[name], 500.0)


@pytest.mark.parametrize(
    ("events", "event"),
    [
        ((LEASED,), LEASED),  # somebody prices it
        ((), LOST),  # nobody has it
        ((LEASED, PRICED, LEASED), STOPPED),  # nobody asked for that
    ],
)
def test_what_the_state_alone_does_not_forbid(events, event):
    with pytest.raises(IllegalStepError):
        after(*events, event)


def test_an_illegal_step_tells_the_past():
    found = after(LEASED, PRICED)
    with pytest.raises(IllegalStepError) as caught:
        step(found, FINISHED, 200.0)
    assert str(caught.value) == (
        f"job {found.id} is queued: Finished cannot happen to it "
        "(past: 101.000 Leased when received; 102.000 Priced when received)"
    )


def test_the_past_is_bounded():
    found = job()
    for _ in range(HISTORY):
        found = after(LEASED, replace(LOST, attempts=10**6), job_=found)
    assert len(found.history) == HISTORY


# -- any order of events -------------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """Whatever happens, in whatever order: what does not fit is refused and changes nothing."""

    attempts = 3

    def __init__(self) -> None:
        super().__init__()
        self.job = job()
        self.now = 100.0
        self.tokens: list[str] = []
        self.ends = 0
        self.final: Job | None = None

    def take(self, event: Event) -> bool:
        self.now += 1.0
        before = self.job
        try:
            change = step(before, event, self.now)
        except IllegalStepError:
            return False
        assert before.state not in FINAL, "a final state was left"
        self.job = change.job
        self.ends += change.commands.count(Note("end"))
        told = any(isinstance(command, Note) for command in change.commands)
        assert told == (self.job.state != before.state)
        if self.job.state in FINAL:
            assert DropSubmit() in change.commands
            self.final = self.job
        return True

    @rule()
    def lease(self) -> None:
        token = f"token-{len(self.tokens)}"
        if self.take(Leased("somebody", token, self.now + 10.0)):
            assert self.job.token == token
            self.tokens.append(token)

    @rule(event=st.sampled_from([PRICED, REFUSED, FINISHED, FAILED, CANCEL, STOPPED]))
    def happen(self, event: Event) -> None:
        self.take(event)

    @rule()
    def lose(self) -> None:
        if self.take(Lost(self.attempts, LOST.error)):
            assert self.job.token is None

    @invariant()
    def one_end_at_most(self) -> None:
        assert self.ends == (self.job.state in FINAL)
        assert self.final is None or self.job == self.final

    @invariant()
    def attempts_are_bounded(self) -> None:
        assert self.job.attempts <= self.attempts
        assert self.job.pricings <= self.attempts

    @invariant()
    def a_claim_is_whole_and_held_only_while_something_is_done(self) -> None:
        claim = {self.job.holder is None, self.job.token is None, self.job.until is None}
        assert len(claim) == 1
        if self.job.state == "running":
            assert self.job.token == self.tokens[-1]
        if self.job.state not in ("received", "running"):
            assert self.job.token is None

    @invariant()
    def an_end_has_a_time_and_its_reason(self) -> None:
        state = self.job.state
        assert (self.job.ended is not None) == (state in FINAL)
        assert (self.job.error is not None) == (
            state in ("failed", "cancelled") or self.job.cancelling
        )
        assert (self.job.result_sha256 is not None) == (state == "done")

    @invariant()
    def time_is_accounted_for(self) -> None:
        if self.job.ended is not None:
            assert sum(self.job.stages.values()) == self.job.ended - self.job.created


Life.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestAnyOrder = Life.TestCase
