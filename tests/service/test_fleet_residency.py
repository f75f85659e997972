"""Which models are in memory: decided as a table of cases, and on random walks."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from weft.service.fleet.parts import (
    Added,
    Begin,
    Budget,
    Command,
    Demand,
    Died,
    Drop,
    Event,
    Evicted,
    Finish,
    Kill,
    Known,
    Limited,
    Looked,
    Measured,
    Need,
    Over,
    Part,
    Ready,
    Release,
    Removed,
    Resident,
    Say,
    Start,
    State,
    Tick,
    Unusable,
)
from weft.service.fleet.residency import TURN
from weft.service.fleet.rules import DEATHS, LONGEST_WAIT, decide

HOST = 100


class Story:
    """Models with what they need (a capital letter: pinned), and what is decided about them."""

    def __init__(self, budget: int | None = HOST, **needs: int | None) -> None:
        parts = {}
        for name, need in needs.items():
            known = None if need is None else Need(need)
            model = Resident(pinned=name.isupper(), need=known)
            parts[name] = Part(name, "worker", model=model)
        self.state = State(parts, 30.0, Budget(budget))
        self.now = 100.0
        self.begun = self(Begin())

    def __call__(self, event: Event, after: float = 0.0) -> tuple[Command, ...]:
        self.now += after
        self.state, commands = decide(self.state, event, self.now)
        return commands

    def jobs(self, later: float = 0.0, /, **demand: Demand) -> tuple[Command, ...]:
        return self(Looked(demand), later)

    def ready(self, name: str, took: int | None = None) -> tuple[Command, ...]:
        return self(Ready(name, None if took is None else Need(took)))

    def loaded(self, *names: str) -> None:
        """These models are in memory, and nobody wants any now."""
        for number, name in enumerate(names):
            self.jobs(**{name: Demand(waiting=1)})
            self.ready(name)
            self.jobs(**{name: Demand(running=1, used=float(number))})
            self.jobs()

    def phase(self, name: str) -> str:
        return self.state.parts[name].phase


WAITS, RUNS, BOTH = Demand(waiting=1), Demand(running=1), Demand(waiting=3, running=1)


# -- loading on demand -----------------------------------------------------------------------------


def test_a_model_on_demand_is_cold_until_a_job_is_queued() -> None:
    told = Story(a=40)
    assert told.begun == (Say("a", "cold"),)
    assert told(Tick(), after=100) == ()
    assert told.jobs(a=WAITS) == (Start("a"), Say("a", "loading"))
    assert told.jobs(a=WAITS) == ()
    assert told.ready("a", 45) == (Say("a", "ready"),)
    assert told.state.parts["a"].model.need == Need(45), "the next load's need is the measured one"


def test_pinned_models_come_first_and_on_demand_ones_wait_for_the_size_of_those() -> None:
    told = Story(A=None, b=40)
    assert told.begun == (Start("A"), Say("b", "cold"))
    assert told.jobs(b=WAITS) == (), "how much A leaves is not known yet"
    assert told.ready("A", 50) == (Say("A", "ready"), Start("b"), Say("b", "loading"))


def test_a_model_of_unknown_size_waits_until_it_is_known() -> None:
    told = Story(a=None)
    assert told.jobs(a=WAITS) == ()
    assert told(Known("a", Need(10))) == (Start("a"), Say("a", "loading"))
    assert told(Known("a", Need(99))) == () and told.state.parts["a"].model.need == Need(10)


def test_a_measure_is_better_than_an_estimate() -> None:
    told = Story(a=10)
    told(Known("a", Need(90)))
    assert told.state.parts["a"].model.need == Need(10)


# -- making room -----------------------------------------------------------------------------------


def test_the_least_recently_used_goes_and_the_next_is_loaded_when_it_is_gone() -> None:
    told = Story(a=40, b=40, c=40)
    told.loaded("a", "b")
    assert told.jobs(c=WAITS) == (Finish("a"),)
    assert told.jobs(c=WAITS) == (), "its memory is still there"
    assert told(Died("a")) == (
        Release("a"),
        Say("a", "cold"),
        Start("c"),
        Say("c", "loading"),
    )
    assert [told.phase(name) for name in "abc"] == ["cold", "ready", "starting"]


def test_use_is_when_a_job_began_or_ended_last_whoever_was_loaded_first() -> None:
    told = Story(a=40, b=40, c=40)
    told.loaded("a", "b")
    told.jobs(a=Demand(used=9.0))
    assert told.jobs(c=WAITS) == (Finish("b"),)


def test_as_many_go_as_are_needed_and_no_more() -> None:
    told = Story(a=20, b=20, c=20, d=55)
    told.loaded("a", "b", "c")
    assert told.jobs(d=WAITS) == (Finish("a"),)
    told = Story(a=20, b=20, c=20, d=75)
    told.loaded("a", "b", "c")
    assert told.jobs(d=WAITS) == (Finish("a"), Finish("b"))


def test_nobody_goes_in_vain() -> None:
    told = Story(a=30, b=60, c=80)
    told.loaded("a", "b")
    assert told.jobs(b=RUNS, c=WAITS) == (), "without b there is not enough"


@pytest.mark.parametrize("busy", [WAITS, RUNS, BOTH, Demand(sessions=1)])
def test_a_model_that_is_needed_stays(busy: Demand) -> None:
    told = Story(a=60, b=60)
    told.loaded("a")
    assert told.jobs(a=busy, b=WAITS) == ()
    assert told.jobs(TURN / 2, a=busy, b=WAITS) == ()


@pytest.mark.parametrize("busy", [WAITS, RUNS, BOTH])
def test_models_that_are_wanted_at_once_take_turns(busy: Demand) -> None:
    told = Story(a=60, b=60)
    told.loaded("a")
    told.jobs(a=busy, b=WAITS)
    assert told.jobs(TURN, a=busy, b=WAITS) == (Finish("a"),), "it ends what it has begun"
    assert told(Died("a"))[-2:] == (Start("b"), Say("b", "loading"))
    told.ready("b")
    assert told.jobs(TURN / 2, a=WAITS, b=BOTH) == ()
    assert told.jobs(TURN, a=WAITS, b=BOTH) == (Finish("b"),)


def test_what_loads_slowly_stays_longer() -> None:
    told = Story(a=60, b=60)
    told.jobs(a=WAITS)
    told.now += 50
    told.ready("a")
    told.jobs(a=BOTH, b=WAITS)
    assert told.jobs(90, a=BOTH, b=WAITS) == ()
    assert told.jobs(10, a=BOTH, b=WAITS) == (Finish("a"),)


def test_open_sessions_are_never_cut_off_by_a_turn() -> None:
    told = Story(a=60, b=60)
    told.loaded("a")
    told.jobs(a=Demand(sessions=1), b=WAITS)
    assert told.jobs(10 * TURN, a=Demand(sessions=1), b=WAITS) == ()
    assert told.jobs(b=WAITS) == (Finish("a"),)


def test_who_waits_longest_comes_first_and_small_ones_do_not_pass_it() -> None:
    told = Story(a=60, b=60, c=20)
    told.loaded("a")
    told.jobs(a=RUNS, b=WAITS)
    assert told.jobs(1.0, a=RUNS, b=WAITS, c=WAITS) == ()


def test_a_pinned_model_never_goes() -> None:
    told = Story(A=60, b=30, c=35)
    told.ready("A")
    told.loaded("b")
    assert told.jobs(10 * TURN, c=WAITS) == (Finish("b"),)


# -- what cannot be --------------------------------------------------------------------------------


def test_what_cannot_fit_is_refused_by_name_with_the_figures() -> None:
    told = Story(budget=3 << 30, A=1 << 30, b=2 << 30, c=(2 << 30) + 1, d=4 << 30)
    told.ready("A")
    assert told.jobs(b=WAITS) == (Start("b"), Say("b", "loading"))
    told.ready("b")
    (said,) = told.jobs(c=WAITS)
    assert said == Say(
        "c",
        "failed",
        "it needs 2.0 GiB of memory; the server's models may have 3.0 GiB, of which pinned models "
        "have 1.0 GiB",
    )
    (said,) = told.jobs(d=WAITS)
    assert isinstance(said, Say) and said.model == "d" and "4.0 GiB" in (said.reason or "")
    assert told.phase("b") == "ready", "nobody goes for what cannot be"


def test_what_could_not_fit_can_when_there_is_more_room() -> None:
    told = Story(A=60, b=60)
    told.ready("A")
    told.jobs(b=WAITS)
    assert told.phase("b") == "unfit"
    assert told(Added("A", pinned=False)) == (Say("b", "cold"), Finish("A"))
    told = Story(b=200)
    told.jobs(b=WAITS)
    assert told(Limited(Budget(300)))[-2:] == (Start("b"), Say("b", "loading"))


def test_the_memory_of_a_device_is_counted_by_itself() -> None:
    told = Story(a=None, b=None, c=None)
    told(Limited(Budget(100, 50)))
    for name, need in (("a", Need(10, 40)), ("b", Need(10, 20)), ("c", Need(10, 60))):
        told(Known(name, need))
    told.loaded("a")
    assert told.jobs(b=WAITS) == (Finish("a"),)
    (said,) = told.jobs(b=WAITS, c=WAITS)
    assert isinstance(said, Say) and "60 bytes of device memory" in (said.reason or "")
    assert Start("c") in told(Limited(Budget(100, None)))


def test_pinned_models_that_do_not_fit_together_end_a_server_of_nothing_else_not() -> None:
    told = Story(A=60, B=60)
    told(Tick())
    assert (told.phase("A"), told.phase("B")) == ("starting", "unfit")
    told = Story(A=160)
    *_, over = told.begun
    assert isinstance(over, Over) and "160 bytes" in (over.reason or "")


# -- growth, deaths, failures ----------------------------------------------------------------------


def test_processes_that_outgrow_the_budget_make_idle_ones_leave() -> None:
    told = Story(a=40, b=40)
    told.loaded("a", "b")
    assert told(Measured("b", Need(59))) == ()
    assert told(Measured("b", Need(61))) == (Finish("a"),)
    told = Story(a=40, B=40)
    told.ready("B")
    told.loaded("a")
    told.jobs(a=RUNS)
    assert told(Measured("B", Need(90))) == (), "who has jobs stays"
    assert told.jobs() == (Finish("a"),)


def test_a_worker_on_demand_that_dies_comes_back_only_if_it_is_wanted() -> None:
    told = Story(a=40)
    told.loaded("a")
    assert told(Died("a"), after=10) == (Release("a"), Say("a", "cold"))
    told.loaded("a")
    told.jobs(a=RUNS)
    assert told(Died("a"), after=10) == (Release("a"), Start("a"))


def test_a_crash_while_loading_is_tried_again_and_at_last_fails() -> None:
    told = Story(a=40)
    told.jobs(a=WAITS)
    for _ in range(DEATHS):
        assert told(Died("a")) == (Release("a"),)
        assert told.phase("a") == "waiting"
        assert told(Tick(), after=LONGEST_WAIT) == (Start("a"),)
    _, said = told(Died("a"))
    assert isinstance(said, Say) and (said.model, said.state) == ("a", "failed")


def test_nobody_wants_any_more_what_crashed_while_it_loaded() -> None:
    told = Story(a=40)
    told.jobs(a=WAITS)
    told(Died("a"))
    told.jobs()
    assert told(Tick(), after=LONGEST_WAIT) == (Say("a", "cold"),)


def test_a_load_that_fails_is_said_and_does_not_end_the_server() -> None:
    told = Story(a=40)
    told.jobs(a=WAITS)
    assert told(Unusable("a", "no weights")) == (Say("a", "failed", "no weights"),)
    assert told(Died("a")) == (Release("a"),)
    assert told.jobs(a=WAITS) == ()
    assert told(Added("a", pinned=False)) == (Say("a", "cold"),), "those jobs have failed"
    assert told.jobs(a=WAITS) == (Start("a"), Say("a", "loading"))


# -- deploying and evicting ------------------------------------------------------------------------


def test_a_deployed_model_is_cold_or_loaded_as_it_is_pinned() -> None:
    told = Story(a=40)
    assert told(Added("b", pinned=False, need=Need(5))) == (Say("b", "cold"),)
    assert told(Added("C", pinned=True)) == (Say("C", "cold"),)
    assert told(Known("C", Need(5))) == (Start("C"), Say("C", "loading"))


def test_who_is_evicted_ends_after_its_jobs_and_comes_back_for_the_next() -> None:
    told = Story(a=40)
    told.loaded("a")
    assert told(Evicted("a")) == (Finish("a"),)
    assert told(Evicted("a")) == ()
    assert told.jobs(a=WAITS) == ()
    assert told(Died("a"))[1:] == (Say("a", "cold"),), "that job may have been its last one"
    assert told.jobs(a=WAITS) == (Start("a"), Say("a", "loading"))
    assert told(Evicted("a")) == (Kill("a"),), "who loads has nothing in hand"


def test_a_pinned_model_is_not_evicted() -> None:
    told = Story(A=40)
    told.ready("A")
    assert told(Evicted("A")) == ()


def test_a_removed_model_is_gone_with_its_process() -> None:
    told = Story(A=40, b=40)
    told.ready("A")
    assert told(Removed("b")) == (Drop("b"),)
    assert told(Removed("A")) == (Finish("A"),)
    assert told.jobs(A=WAITS) == ()
    assert told(Died("A")) == (Release("A"), Drop("A"))
    assert told.state.parts == {} and told(Died("A")) == ()


def test_what_is_deployed_again_before_it_is_gone_stays() -> None:
    told = Story(a=40)
    told.loaded("a")
    told(Removed("a"))
    told(Added("a", pinned=False))
    assert told(Died("a"))[1:] == (Say("a", "cold"),)
    assert told.jobs(a=WAITS) == (Start("a"), Say("a", "loading"))


# -- random walks ----------------------------------------------------------------------------------


@dataclass
class World:
    """Processes as they might be: they load, run jobs, grow, die; and what must always hold."""

    dice: random.Random
    state: State
    true: dict[str, int]  # what each model takes
    now: float = 0.0
    jobs: dict[str, int] = field(default_factory=dict)
    run: dict[str, int] = field(default_factory=dict)
    used: dict[str, float] = field(default_factory=dict)
    up: dict[str, str] = field(default_factory=dict)  # loading, ready, ending
    since: dict[str, float] = field(default_factory=dict)
    refused: int = 0

    def tell(self, event: Event) -> None:
        self.state, commands = decide(self.state, event, self.now)
        for command in commands:
            self.obey(command, event)

    def obey(self, command: Command, event: Event) -> None:
        match command:
            case Start(name):
                assert name not in self.up, "two processes of one model"
                self.up[name], self.since[name] = "loading", self.now
                budget = self.state.budget.host or 0
                assert sum(self.true[n] for n in self.up) <= budget, "more than there is"
            case Finish(name):
                model = self.state.parts[name].model
                assert not model.pinned or isinstance(event, Removed)
                if not model.idle and not isinstance(event, Removed | Evicted):
                    assert self.now - self.since[name] >= TURN, "it had no turn"
                self.up[name] = "ending"
            case Kill(name):
                assert self.up[name] == "loading", "it may have jobs in hand"
                del self.up[name]
                self.tell(Died(name))
            case Drop(name):
                assert name not in self.up

    def look(self) -> None:
        demand = {
            name: Demand(self.jobs.get(name, 0), self.run.get(name, 0), 0, self.used.get(name, 0.0))
            for name in self.true
        }
        self.tell(Looked(demand))

    def turn(self, calm: bool = False) -> None:
        """Some time, in which processes do something."""
        self.now += self.dice.uniform(0.1, 2.0)
        for name, phase in list(self.up.items()):
            if not calm and self.dice.random() < 0.03:
                self.die(name)
            elif phase == "loading" and self.dice.random() < 0.3:
                self.up[name], self.since[name] = "ready", self.now
                self.tell(Ready(name, Need(self.true[name])))
            elif phase == "ending" and not self.run.get(name):
                self.die(name)
            elif phase in ("ready", "ending"):
                self.work(name)
        if not calm:
            self.something()
        self.refuse()
        self.tell(Tick())
        self.look()

    def refuse(self) -> None:
        """The checker refuses jobs of models that failed, the fleet those of models gone."""
        for name in self.true:
            part = self.state.parts.get(name)
            if part is None or part.phase in ("failed", "unfit") or part.model.forget:
                self.refused += self.jobs.pop(name, 0)

    def work(self, name: str) -> None:
        if self.run.get(name):
            self.run[name] -= 1
            self.used[name] = self.now
        elif self.jobs.get(name) and self.up[name] == "ready":
            self.jobs[name] -= 1
            self.run[name] = self.run.get(name, 0) + 1
            self.used[name] = self.now

    def die(self, name: str) -> None:
        del self.up[name]
        self.jobs[name] = self.jobs.get(name, 0) + self.run.pop(name, 0)
        self.tell(Died(name))

    def something(self) -> None:
        name = self.dice.choice(sorted(self.true))
        part = self.state.parts.get(name)
        match self.dice.randrange(8):
            case 0 | 1 | 2 | 3 if part is not None and part.phase not in ("failed", "unfit"):
                self.jobs[name] = self.jobs.get(name, 0) + self.dice.randrange(1, 6)
            case 4:
                self.tell(Evicted(name))
            case 5 if self.dice.random() < 0.2:
                self.jobs.pop(name, None)
                self.tell(Removed(name))
            case 6:
                need = Need(self.true[name])
                self.tell(Added(name, self.dice.random() < 0.1, need))
            case 7 if self.up.get(name) == "loading" and self.dice.random() < 0.1:
                self.up[name] = "ending"
                self.tell(Unusable(name, "broken"))

    def owed(self) -> int:
        return sum(self.jobs.values()) + sum(self.run.values())


def world(seed: int) -> World:
    dice = random.Random(seed)
    true = {name: dice.randrange(5, 70) for name in "abcdefg"[: dice.randrange(2, 8)]}
    pinned = {name for name in true if dice.random() < 0.15}
    parts = {
        name: Part(name, "worker", model=Resident(pinned=name in pinned, need=Need(need)))
        for name, need in true.items()
    }
    return World(dice, State(parts, 30.0, Budget(HOST), grows=True), true)


@pytest.mark.parametrize("seed", range(150))
def test_on_a_random_walk_nothing_is_broken_and_no_job_waits_for_ever(seed: int) -> None:
    walk = world(seed)
    walk.tell(Begin())
    for _ in range(120):
        walk.turn()
    for _ in range(900):
        if not walk.owed():
            break
        walk.turn(calm=True)
    assert walk.owed() == 0, walk.state


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_of_jobs_for_one_model_does_not_starve_another(seed: int) -> None:
    walk = world(seed)
    walk.true = {"a": 60, "b": 60}
    parts = {n: Part(n, "worker", model=Resident(False, Need(60))) for n in walk.true}
    walk.state = State(parts, 30.0, Budget(HOST), grows=True)
    walk.tell(Begin())
    walk.jobs["b"] = 0
    for turn in range(300):
        walk.jobs["a"] = 5
        if turn == 40:
            walk.jobs["b"] = 3
        walk.turn(calm=True)
        if turn > 40 and not walk.jobs["b"] and not walk.run.get("b"):
            return
    raise AssertionError("b was never served")
