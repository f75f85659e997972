"""What a fleet of processes does when. Pure: events in, commands out, the clock an argument.

    state = State.of({"gateway": "gateway", "checker": "checker", "tiny": "worker"}, drain=30.0)
    state, commands = decide(state, Begin(), now)         # (Start("gateway"), ...)
    state, commands = decide(state, Died("tiny"), now)    # (Release("tiny"), Start("tiny"))

A part goes through these phases; `gone` is where it stays, and `failed`, until its model is
deployed anew.

    new -> starting -> ready --(died)--> waiting -> starting -> ...
              |          |-> gone (the fleet ends)
              '-> failed (its model cannot be loaded, or it died too often before it was ready)

The worker of a model that is loaded on demand has two more: `cold` (no process, and none is
wanted) and `leaving` (told to end, after what it has in hand), and `unfit` where the memory budget
is too small for it. `residency` says when it goes from one to the other.

A part that was ready and dies is started again at once, if it was ready for a while: whoever kills
it again and again cannot make the fleet do nothing else. One that dies before it is ready waits
longer each time, and has failed after some.

When the fleet is told to stop, gateways take no new jobs, the others end after what they have in
hand, or at once where they only load; the gateway, through which results are fetched, ends last.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from .parts import (
    Added,
    Begin,
    Command,
    Demand,
    Died,
    Drain,
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
    Step,
    Stop,
    Tick,
    Unusable,
)
from .residency import settle

STEADY = 0.25
"""Seconds that lie at least between being ready and being started again."""
DEATHS = 12
"""So many deaths in a row, all of them before being ready, are a failure."""
FIRST_WAIT, LONGEST_WAIT = 0.05, 10.0
LAST_WORDS = 5.0
"""Seconds that the gateway has to end by itself when all else is gone."""

# -- decisions -------------------------------------------------------------------------------------


def decide(state: State, event: Event, now: float) -> Step:
    """What to do about an event, and what is so afterwards."""
    state, commands = _decide(state, event, now)
    state, more = settle(state, now)
    commands = (*commands, *more)
    state, last = _hopeless(state, commands)
    return state, (*commands, *last)


def _decide(state: State, event: Event, now: float) -> Step:
    match event:
        case Begin():
            return _begin(state, now)
        case Tick():
            return _tick(state, now)
        case Stop():
            return _stop(state, now)
        case Looked(demand):
            return _looked(state, demand), ()
        case Limited(budget):
            return replace(state, budget=budget), ()
        case Added():
            return _added(state, event, now)
    part = state.parts.get(event.name)
    if part is None:
        return state, ()  # a model that is gone by now
    match event:
        case Ready(_, took):
            return _ready(state, part, took, now)
        case Unusable(_, reason):
            return _fail(state, part, reason)
        case Died():
            return _died(state, part, now)
        case Known(_, need):
            return (_with_model(state, part, need=need) if part.model.need is None else state), ()
        case Measured(_, holds):
            return (_with_model(state, part, holds=holds) if part.alive else state), ()
        case Removed():
            return _removed(state, part)
        case Evicted():
            return _evicted(state, part)


def wake(state: State) -> float | None:
    """When the next `Tick` is wanted at the latest."""
    times = [part.again for part in state.parts.values() if part.phase == "waiting"]
    return min([*times, *([] if state.until is None else [state.until])], default=None)


def _with_model(state: State, part: Part, **changes: Any) -> State:
    return state.with_part(replace(part, model=replace(part.model, **changes)))


# -- processes -------------------------------------------------------------------------------------


def _begin(state: State, now: float) -> Step:
    """Pinned models of which nobody knows what they take are loaded at once, as the rest of the
    server is; others when it is known that there is room."""
    cold = [p for p in state.workers() if not p.model.pinned or p.model.need is not None]
    for part in cold:
        state = state.with_part(replace(part, phase="cold"))
    names = [name for name, part in state.parts.items() if part.phase == "new"]
    state, started = _start(state, now, *names)
    return state, (*started, *[Say(part.name, "cold") for part in cold if not part.model.pinned])


def _start(state: State, now: float, *names: str) -> Step:
    for name in names:
        part = replace(state.parts[name], phase="starting", begun=now, there=True)
        state = _with_model(state, part, holds=Need())
    return state, tuple(Start(name) for name in names)


def _ready(state: State, part: Part, took: Need | None, now: float) -> Step:
    if part.phase != "starting":
        return state, ()
    part = replace(part, phase="ready", ready_at=now, deaths=0)
    if part.role != "worker":
        return state.with_part(part), ()
    need = took or part.model.need
    state = _with_model(state, part, need=need, holds=need or Need())
    return state, (Say(part.name, "ready"),)


def _fail(state: State, part: Part, reason: str) -> Step:
    if part.phase == "leaving":
        return state, ()
    state = state.with_part(replace(part, phase="failed"))
    if part.role != "worker":
        return replace(state, mode="over"), (Over(f"the {part.role} {reason}"),)
    return state, (Say(part.name, "failed", reason),)


def _hopeless(state: State, commands: tuple[Command, ...]) -> Step:
    """A model without a worker is no reason to end, unless there is no other, and none can come."""
    workers = state.workers()
    lost = all(part.model.pinned and part.phase in ("failed", "unfit") for part in workers)
    if state.mode != "serving" or state.grows or not workers or not lost:
        return state, ()
    reasons = [said.reason for said in commands if isinstance(said, Say) and said.reason]
    return replace(state, mode="over"), (Over("; ".join(["no model is left", *reasons])),)


def _died(state: State, part: Part, now: float) -> Step:
    freed = Release(part.name)
    part = replace(part, there=False, model=replace(part.model, holds=Need()))
    if part.phase == "failed":
        return state.with_part(part), (freed,)
    if state.mode != "serving":
        state = state.with_part(replace(part, phase="gone"))
        state, more = _leave(state, now)
        return state, (freed, *more)
    if part.phase == "leaving":
        state, more = _left(state, part)
        return state, (freed, *more)
    served = part.phase == "ready"
    part = replace(part, deaths=0 if served else part.deaths + 1)
    if part.role == "worker" and not part.model.wanted:
        state, more = _left(state, part)
        return state, (freed, *more)
    if part.deaths > DEATHS:
        state, more = _fail(state, part, f"died {part.deaths} times before it was ready")
        return state, (freed, *more)
    again = part.ready_at + STEADY if served else now + _pause(part.deaths)
    if again <= now:
        state, more = _start(state.with_part(part), now, part.name)
        return state, (freed, *more)
    return state.with_part(replace(part, phase="waiting", again=again)), (freed,)


def _left(state: State, part: Part) -> Step:
    """The process of a model that nobody wants in memory is gone."""
    if part.model.forget:
        return state.without(part.name), (Drop(part.name),)
    part = replace(part, phase="cold")  # who still wants it is seen at the next look
    return _with_model(state, part, waiting=0, running=0), (Say(part.name, "cold"),)


# -- models ----------------------------------------------------------------------------------------


def _looked(state: State, demand: dict[str, Demand]) -> State:
    for part in state.workers():
        its = demand.get(part.name, Demand(used=part.model.used))
        state = _with_model(
            state,
            part,
            waiting=its.waiting,
            running=its.running,
            sessions=its.sessions,
            used=max(its.used, part.model.used),
        )
    return state


def _added(state: State, event: Added, now: float) -> Step:
    part = state.parts.get(event.name)
    if part is None:
        model = Resident(pinned=event.pinned, need=event.need)
        part = Part(event.name, "worker", phase="cold", model=model)
        return state.with_part(part), (Say(event.name, "cold"),)
    again = part.phase in ("failed", "unfit")
    if again:
        part = replace(part, phase="leaving" if part.there else "cold", deaths=0)
        part = replace(part, model=replace(part.model, waiting=0, running=0))  # they failed
    state = _with_model(state, part, pinned=event.pinned, forget=False)
    return state, (Say(event.name, "cold"),) if again else ()


def _removed(state: State, part: Part) -> Step:
    if not part.there:
        return state.without(part.name), (Drop(part.name),)
    part, asked = _told_to_leave(part)
    return _with_model(state, part, forget=True, pinned=False), asked


def _evicted(state: State, part: Part) -> Step:
    if part.model.pinned or part.phase not in ("starting", "ready", "waiting"):
        return state, ()
    if part.phase == "waiting":
        return _left(state, part)
    part, asked = _told_to_leave(part)
    return state.with_part(part), asked


def _told_to_leave(part: Part) -> tuple[Part, tuple[Command, ...]]:
    """One that loads has nothing in hand."""
    asked: dict[str, Command] = {"starting": Kill(part.name), "ready": Finish(part.name)}
    return replace(part, phase="leaving"), (asked[part.phase],) if part.phase in asked else ()


# -- time ------------------------------------------------------------------------------------------


def _pause(deaths: int) -> float:
    return min(FIRST_WAIT * 2 ** (deaths - 1), LONGEST_WAIT)


def _tick(state: State, now: float) -> Step:
    if state.until is not None and now >= state.until:
        return _out_of_time(state, now)
    said: list[Command] = []
    late = [p for p in state.parts.values() if p.phase == "waiting" and p.again <= now]
    for part in late:
        if part.role == "worker" and not part.model.wanted:
            state, left = _left(state, part)
            said += left
    names = [part.name for part in late if part.name in state.parts]
    names = [name for name in names if state.parts[name].phase == "waiting"]
    state, started = _start(state, now, *names)
    return state, (*said, *started)


def _stop(state: State, now: float) -> Step:
    if state.mode != "serving":
        return _out_of_time(state, now)
    for part in state.parts.values():
        if not part.there and part.phase != "failed":
            state = state.with_part(replace(part, phase="gone"))
    state = replace(state, mode="draining", until=now + state.drain)
    asked: list[Command] = [Drain(part.name) for part in state.alive("gateway")]
    for part in state.alive("checker", "worker"):
        asked.append(Kill(part.name) if part.phase == "starting" else Finish(part.name))
    state, more = _leave(state, now)
    return state, (*asked, *more)


def _leave(state: State, now: float) -> Step:
    """The next step of the way out, when those in front have gone."""
    if state.mode == "draining" and not state.alive("checker", "worker"):
        state = replace(state, mode="ending", until=now + LAST_WORDS)
        if gateways := state.alive("gateway"):
            return state, tuple(Finish(part.name) for part in gateways)
    if state.mode == "ending" and not state.alive("gateway", "checker", "worker"):
        return replace(state, mode="over", until=None), (Over(),)
    return state, ()


def _out_of_time(state: State, now: float) -> Step:
    """Whatever should have ended by itself is ended."""
    if state.mode == "over":
        return state, ()
    killed = [Kill(part.name) for part in state.alive("checker", "worker")]
    if killed and state.mode == "draining":
        state = replace(state, mode="ending", until=now + LAST_WORDS)
        return state, (*killed, *[Finish(part.name) for part in state.alive("gateway")])
    state = replace(state, mode="ending", until=now + LAST_WORDS)
    return state, (*killed, *[Kill(part.name) for part in state.alive("gateway")])
