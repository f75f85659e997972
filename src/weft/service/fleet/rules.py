"""What a fleet of processes does when. Pure: events in, commands out, the clock an argument.

    state = State.of({"gateway": "gateway", "checker": "checker", "tiny": "worker"}, drain=30.0)
    state, commands = decide(state, Begin(), now)         # (Start("gateway"), ...)
    state, commands = decide(state, Died("tiny"), now)    # (Release("tiny"), Start("tiny"))

A part goes through these phases; `gone` and `failed` are where it stays.

    new -> starting -> ready --(died)--> waiting -> starting -> ...
              |          |-> gone (the fleet ends)
              '-> failed (its model cannot be loaded, or it died too often before it was ready)

A part that was ready and dies is started again at once, if it was ready for a while: whoever kills
it again and again cannot make the fleet do nothing else. One that dies before it is ready waits
longer each time, and has failed after some.

When the fleet is told to stop, gateways take no new jobs, the others end after what they have in
hand, or at once where they only load; the gateway, through which results are fetched, ends last.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

Role = Literal["gateway", "checker", "worker"]
Phase = Literal["new", "starting", "ready", "waiting", "failed", "gone"]
Mode = Literal["serving", "draining", "ending", "over"]

STEADY = 0.25
"""Seconds that lie at least between being ready and being started again."""
DEATHS = 12
"""So many deaths in a row, all of them before being ready, are a failure."""
FIRST_WAIT, LONGEST_WAIT = 0.05, 10.0
LAST_WORDS = 5.0
"""Seconds that the gateway has to end by itself when all else is gone."""


class Part(Struct, frozen=True):
    """A process that should be there. `deaths` are those in a row before it was ready."""

    name: str
    role: Role
    phase: Phase = "new"
    deaths: int = 0
    ready_at: float = 0.0
    again: float = 0.0  # when a waiting one is started

    @property
    def alive(self) -> bool:
        return self.phase in ("starting", "ready")


class State(Struct, frozen=True):
    """All parts, and how far the fleet is with its own life."""

    parts: dict[str, Part]
    drain: float
    mode: Mode = "serving"
    until: float | None = None

    @classmethod
    def of(cls, roles: dict[str, Role], drain: float) -> State:
        return cls({name: Part(name, role) for name, role in roles.items()}, drain)

    def with_part(self, part: Part) -> State:
        return replace(self, parts={**self.parts, part.name: part})

    def alive(self, *roles: Role) -> list[Part]:
        return [part for part in self.parts.values() if part.alive and part.role in roles]


# -- events ----------------------------------------------------------------------------------------


class Begin(Struct, frozen=True):
    """The fleet begins."""


class Ready(Struct, frozen=True):
    """A part says that it can do its work."""

    name: str


class Unusable(Struct, frozen=True):
    """A worker says that it will never be: its model cannot be loaded."""

    name: str
    reason: str


class Died(Struct, frozen=True):
    """A process ended, whatever the reason."""

    name: str


class Tick(Struct, frozen=True):
    """Time has passed."""


class Stop(Struct, frozen=True):
    """Somebody wants the fleet to end. The second time, now."""


Event = Begin | Ready | Unusable | Died | Tick | Stop

# -- commands --------------------------------------------------------------------------------------


class Start(Struct, frozen=True):
    """Make the process."""

    name: str


class Drain(Struct, frozen=True):
    """Tell a gateway to take no new jobs."""

    name: str


class Finish(Struct, frozen=True):
    """Tell it to end after what it has in hand."""

    name: str


class Kill(Struct, frozen=True):
    """End it now."""

    name: str


class Release(Struct, frozen=True):
    """Take back what the dead process had claimed."""

    name: str


class Say(Struct, frozen=True):
    """A model's state has changed: `ready` or `failed`."""

    model: str
    state: str
    reason: str | None = None


class Over(Struct, frozen=True):
    """The fleet ends; with a reason, in failure."""

    reason: str | None = None


Command = Start | Drain | Finish | Kill | Release | Say | Over
Step = tuple[State, tuple[Command, ...]]

# -- decisions -------------------------------------------------------------------------------------


def decide(state: State, event: Event, now: float) -> Step:
    """What to do about an event, and what is so afterwards."""
    match event:
        case Begin():
            return _start(state, *state.parts)
        case Ready(name):
            return _ready(state, state.parts[name], now)
        case Unusable(name, reason):
            return _fail(state, state.parts[name], reason)
        case Died(name):
            return _died(state, state.parts[name], now)
        case Tick():
            return _tick(state, now)
        case Stop():
            return _stop(state, now)


def wake(state: State) -> float | None:
    """When the next `Tick` is wanted at the latest."""
    times = [part.again for part in state.parts.values() if part.phase == "waiting"]
    return min([*times, *([] if state.until is None else [state.until])], default=None)


def _start(state: State, *names: str) -> Step:
    for name in names:
        state = state.with_part(replace(state.parts[name], phase="starting"))
    return state, tuple(Start(name) for name in names)


def _ready(state: State, part: Part, now: float) -> Step:
    if part.phase != "starting":
        return state, ()
    state = state.with_part(replace(part, phase="ready", ready_at=now, deaths=0))
    return state, (Say(part.name, "ready"),) if part.role == "worker" else ()


def _fail(state: State, part: Part, reason: str) -> Step:
    """A model without a worker is no reason to end, unless there is no other."""
    state = state.with_part(replace(part, phase="failed"))
    if part.role != "worker":
        return replace(state, mode="over"), (Over(f"the {part.role} {reason}"),)
    workers = [one for one in state.parts.values() if one.role == "worker"]
    said = Say(part.name, "failed", reason)
    if all(one.phase == "failed" for one in workers):
        return replace(state, mode="over"), (said, Over(f"no model is left: {reason}"))
    return state, (said,)


def _died(state: State, part: Part, now: float) -> Step:
    freed = Release(part.name)
    if part.phase == "failed":
        return state, (freed,)
    if state.mode != "serving":
        state = state.with_part(replace(part, phase="gone"))
        state, more = _leave(state, now)
        return state, (freed, *more)
    served = part.phase == "ready"
    part = replace(part, deaths=0 if served else part.deaths + 1)
    if part.deaths > DEATHS:
        state, more = _fail(state, part, f"died {part.deaths} times before it was ready")
        return state, (freed, *more)
    again = part.ready_at + STEADY if served else now + _pause(part.deaths)
    if again <= now:
        state, more = _start(state.with_part(part), part.name)
        return state, (freed, *more)
    return state.with_part(replace(part, phase="waiting", again=again)), (freed,)


def _pause(deaths: int) -> float:
    return min(FIRST_WAIT * 2 ** (deaths - 1), LONGEST_WAIT)


def _tick(state: State, now: float) -> Step:
    if state.until is not None and now >= state.until:
        return _out_of_time(state, now)
    late = [p.name for p in state.parts.values() if p.phase == "waiting" and p.again <= now]
    return _start(state, *late)


def _stop(state: State, now: float) -> Step:
    if state.mode != "serving":
        return _out_of_time(state, now)
    for part in state.parts.values():
        if part.phase in ("new", "waiting"):
            state = state.with_part(replace(part, phase="gone"))
    state = replace(state, mode="draining", until=now + state.drain)
    asked: list[Command] = [Drain(part.name) for part in state.alive("gateway")]
    for part in state.alive("checker", "worker"):
        asked.append(Finish(part.name) if part.phase == "ready" else Kill(part.name))
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
