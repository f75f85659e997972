"""What the fleet decides: no process, no clock."""

from __future__ import annotations

import pytest

from weft.service.fleet.parts import (
    Begin,
    Command,
    Died,
    Drain,
    Event,
    Finish,
    Kill,
    Over,
    Ready,
    Release,
    Say,
    Start,
    State,
    Stop,
    Tick,
    Unusable,
)
from weft.service.fleet.rules import DEATHS, LAST_WORDS, LONGEST_WAIT, STEADY, decide, wake

DRAIN = 30.0


class Story:
    """Events in turn, and what was decided."""

    def __init__(self, *workers: str) -> None:
        roles = {"gateway": "gateway", "checker": "checker", **dict.fromkeys(workers, "worker")}
        self.state = State.of(roles, DRAIN)  # type: ignore[arg-type]
        self.now = 100.0

    def __call__(self, event: Event, after: float = 0.0) -> tuple[Command, ...]:
        self.now += after
        self.state, commands = decide(self.state, event, self.now)
        return commands

    def phase(self, name: str) -> str:
        return self.state.parts[name].phase


@pytest.fixture
def story() -> Story:
    """A fleet with two models, all parts ready for a while."""
    told = Story("a", "b")
    told(Begin())
    for name in told.state.parts:
        told(Ready(name))
    told(Tick(), after=STEADY)
    return told


def test_at_the_beginning_all_parts_are_started() -> None:
    told = Story("a")
    assert told(Begin()) == (Start("gateway"), Start("checker"), Start("a"))
    assert told.state.mode == "serving"


def test_a_worker_that_is_ready_is_said_to_be_and_others_are_nobodys_business() -> None:
    told = Story("a")
    told(Begin())
    assert told(Ready("a")) == (Say("a", "ready"),)
    assert told(Ready("gateway")) == ()


@pytest.mark.parametrize("name", ["gateway", "checker", "a"])
def test_who_dies_in_steady_service_is_started_again_at_once(story: Story, name: str) -> None:
    assert story(Died(name)) == (Release(name), Start(name))
    assert story.phase(name) == "starting"


def test_who_dies_before_it_is_ready_waits_longer_each_time_up_to_a_bound(story: Story) -> None:
    waits = []
    story(Died("a"))
    for _ in range(DEATHS):
        assert story(Died("a")) == (Release("a"),)
        waits.append(wake(story.state) - story.now)  # type: ignore[operator]
        assert story(Tick(), after=waits[-1] / 2) == ()
        assert story(Tick(), after=waits[-1]) == (Start("a"),)
    assert waits == sorted(waits)
    assert waits[0] < 0.1 < 5 < waits[-1] <= LONGEST_WAIT


def test_who_dies_right_after_it_was_ready_waits_a_little_and_no_longer(story: Story) -> None:
    """A job that kills its worker each time slows its model down, and does not end it."""
    story(Died("a"))
    for _ in range(5 * DEATHS):
        story(Ready("a"))
        assert story(Died("a"), after=STEADY / 2) == (Release("a"),)
        assert story.phase("a") == "waiting"
        assert story(Tick(), after=STEADY / 4) == ()
        assert story(Tick(), after=STEADY) == (Start("a"),)


def test_being_ready_clears_the_record(story: Story) -> None:
    story(Died("a"))
    for _ in range(3):
        for _ in range(DEATHS):
            story(Died("a"))
            assert story(Tick(), after=LONGEST_WAIT) == (Start("a"),)
        story(Ready("a"))
        assert story(Died("a"), after=STEADY) == (Release("a"), Start("a"))


def die_too_often(story: Story, name: str) -> tuple[Command, ...]:
    story(Died(name))
    for _ in range(DEATHS):
        story(Died(name))
        story(Tick(), after=LONGEST_WAIT)
    return story(Died(name))


def test_a_worker_that_dies_too_often_has_failed_and_the_others_go_on(story: Story) -> None:
    released, said = die_too_often(story, "a")
    assert released == Release("a")
    assert isinstance(said, Say) and (said.model, said.state) == ("a", "failed")
    assert "died" in (said.reason or "")
    assert story(Tick(), after=1000) == ()
    assert story.state.mode == "serving"


@pytest.mark.parametrize("name", ["gateway", "checker"])
def test_without_gateway_or_checker_there_is_no_server(story: Story, name: str) -> None:
    *_, over = die_too_often(story, name)
    assert isinstance(over, Over) and name in (over.reason or "")
    assert story.state.mode == "over"


def test_a_model_that_cannot_be_loaded_is_not_tried_again(story: Story) -> None:
    story(Died("a"))
    assert story(Unusable("a", "no such folder")) == (Say("a", "failed", "no such folder"),)
    assert story(Died("a")) == (Release("a"),)
    assert story(Tick(), after=1000) == ()
    assert story.phase("a") == "failed"


def test_when_no_model_is_left_the_fleet_ends_with_the_reason() -> None:
    told = Story("a")
    told(Begin())
    said, over = told(Unusable("a", "no such folder"))
    assert said == Say("a", "failed", "no such folder")
    assert isinstance(over, Over) and "no such folder" in (over.reason or "")
    assert told.state.mode == "over"


def test_told_to_stop_what_runs_may_finish_and_the_gateway_ends_last(story: Story) -> None:
    asked = story(Stop())
    assert asked == (Drain("gateway"), Finish("checker"), Finish("a"), Finish("b"))
    assert wake(story.state) == story.now + DRAIN
    assert story(Died("checker")) == (Release("checker"),)
    assert story(Died("a")) == (Release("a"),)
    assert story(Died("b")) == (Release("b"), Finish("gateway"))
    assert story(Died("gateway")) == (Release("gateway"), Over())
    assert story.state.mode == "over"


def test_who_is_still_loading_has_nothing_in_hand(story: Story) -> None:
    story(Died("a"))
    story(Died("gateway"))
    asked = story(Stop())
    assert asked == (Drain("gateway"), Finish("checker"), Kill("a"), Finish("b"))


def test_nobody_is_started_again_while_the_fleet_ends(story: Story) -> None:
    story(Died("a"))
    story(Died("a"))  # waits to be started again
    assert Finish("a") not in story(Stop())
    assert story(Tick(), after=1.0) == ()
    assert story.phase("a") == "gone"


def test_what_does_not_finish_in_time_is_ended(story: Story) -> None:
    story(Stop())
    story(Died("checker"))
    assert story(Tick(), after=DRAIN) == (Kill("a"), Kill("b"), Finish("gateway"))
    story(Died("a"))
    story(Died("b"))
    assert story(Tick(), after=LAST_WORDS) == (Kill("gateway"),)
    assert Over() in story(Died("gateway"))


def test_the_second_time_means_now(story: Story) -> None:
    story(Stop())
    killed = story(Stop(), after=1.0)
    assert set(killed) >= {Kill("checker"), Kill("a"), Kill("b")}
    assert set(story(Stop(), after=0.1)) >= {Kill("gateway")}


def test_a_fleet_with_nothing_alive_ends_at_once() -> None:
    told = Story("a")
    assert told(Stop()) == (Over(),)


def test_every_event_is_decided_in_every_phase(story: Story) -> None:
    """No event raises, whenever it comes: processes die at any moment."""
    events: list[Event] = [Begin(), Tick(), Stop()]
    for name in story.state.parts:
        events += [Ready(name), Died(name), Unusable(name, "why")]
    seen, todo = set(), [(story.state, 0)]
    while todo:
        state, depth = todo.pop()
        key = repr(state)
        if key in seen or depth > 3:
            continue
        seen.add(key)
        for event in events:
            todo.append((decide(state, event, story.now + 10 * depth)[0], depth + 1))
    assert len(seen) > 300
