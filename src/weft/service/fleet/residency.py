"""Which models are in memory: pure decisions about loading and leaving, a part of `rules`.

    state, commands = settle(state, now)      # after each event that may have changed anything

A model is loaded when it is pinned, or when a job of it is queued and there is room. Room is made
by models that nobody needs, the least recently used first. Where there are none, models take turns:
one that has had its turn finishes the jobs that it has begun and leaves. Memory is what was
measured; what is being loaded counts with what it took the last time, and a model that is leaving
counts until its process is gone. Never more than the budget is promised.
"""

from __future__ import annotations

from msgspec.structs import replace

from .parts import Command, Finish, Need, Part, Say, Start, State, Step

TURN, LONGEST_TURN = 10.0, 600.0
"""Seconds that a model stays at least, while jobs of another one wait for its memory; twice what it
takes to load it, where that is more."""


def settle(state: State, now: float) -> Step:
    """What to load and whom to let go. Does nothing while the fleet ends."""
    if state.mode != "serving":
        return state, ()
    state = _asked(state, now)
    state, said = _refused(state)
    state, begun = _loaded(state, now)
    state, left = _shrunk(state)
    return state, (*said, *begun, *left)


def _asked(state: State, now: float) -> State:
    """Notes since when jobs wait for a model that is not there."""
    for part in state.workers():
        longs = part.phase != "ready" and part.model.wanted
        asked = (now if part.model.asked is None else part.model.asked) if longs else None
        if asked != part.model.asked:
            state = state.with_part(replace(part, model=replace(part.model, asked=asked)))
    return state


# -- what can never be -----------------------------------------------------------------------------


def _refused(state: State) -> Step:
    """Models that cannot fit, whoever leaves; and those that can by now."""
    commands: list[Command] = []
    for part in _queue(state, "cold", "unfit"):
        why = _too_large(state, part)
        if why is not None and part.phase == "cold":
            state = state.with_part(replace(part, phase="unfit"))
            commands.append(Say(part.name, "failed", why))
    for part in state.workers("unfit"):
        if _too_large(state, part) is None:
            state = state.with_part(replace(part, phase="cold"))
            commands.append(Say(part.name, "cold"))
    return state, tuple(commands)


def _too_large(state: State, part: Part) -> str | None:
    """Why it fits in no case: the figures."""
    need = part.model.need or Need()
    stays = Need()
    for other in state.workers("starting", "waiting", "ready"):
        if other.model.pinned and other.name != part.name:
            stays += other.claim
    if (stays + need).within(state.budget):
        return None
    for what, its, theirs, most in (
        ("memory", need.host, stays.host, state.budget.host),
        ("device memory", need.device, stays.device, state.budget.device),
    ):
        if most is not None and its + theirs > most:
            pinned = f", of which pinned models have {_size(theirs)}" if theirs else ""
            most_of_all = f"the server's models may have {_size(most)}{pinned}"
            return f"it needs {_size(its)} of {what}; {most_of_all}"
    raise AssertionError("one of them is too much")


def _size(count: int) -> str:
    """Bytes for people."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


# -- loading ---------------------------------------------------------------------------------------


def _loaded(state: State, now: float) -> Step:
    """Loads what there is room for, in the order in which it was asked for; the first that has
    none gets it before all others."""
    commands: list[Command] = []
    for part in _queue(state, "cold"):
        if any(one.model.need is None for one in state.workers("starting", "waiting")):
            break  # how much is left will be seen when that one is there
        need = part.model.need
        if need is None:
            continue  # the checker is looking at it
        if (_taken(state) + need).within(state.budget):
            state = state.with_part(replace(part, phase="starting", begun=now, there=True))
            commands += [Start(part.name), Say(part.name, "loading")]
            continue
        state, left = _make_room(state, part, need, now)
        commands += left
        break
    return state, tuple(commands)


def _queue(state: State, *phases: str) -> list[Part]:
    """Those that are wanted, pinned ones first, then who was asked for first."""
    parts = [part for part in state.workers() if part.phase in phases and part.model.wanted]
    return sorted(parts, key=lambda p: (not p.model.pinned, p.model.asked or 0.0, p.name))


def _taken(state: State, *, leaving: bool = True) -> Need:
    taken = Need()
    for part in state.workers():
        if leaving or part.phase != "leaving":
            taken += part.claim
    return taken


def _make_room(state: State, part: Part, need: Need, now: float) -> Step:
    """Lets models go until `part` will fit, if that can be done now."""
    going: list[Part] = []
    left = state
    for other in [None, *_victims(state, part, now)]:
        if other is not None:
            left = left.with_part(replace(other, phase="leaving"))
            going.append(other)
        if (_taken(left, leaving=False) + need).within(state.budget):
            return left, tuple(Finish(one.name) for one in going)
    return state, ()


def _victims(state: State, part: Part, now: float) -> list[Part]:
    """Who could go for it: whom nobody needs, by last use; then who has had a turn, by its length,
    once `part` has waited for one."""
    there = [one for one in state.workers("ready") if not one.model.pinned]
    idle = sorted((one for one in there if one.model.idle), key=_by_use)
    asked = now if part.model.asked is None else part.model.asked
    if not part.model.pinned and now - asked < TURN:
        return idle
    had = [o for o in there if not o.model.idle and not o.model.sessions and _had_turn(o, now)]
    return [*idle, *sorted(had, key=lambda one: (one.ready_at, one.name))]


def _by_use(part: Part) -> tuple[float, float, str]:
    return part.model.used, part.ready_at, part.name


def _had_turn(part: Part, now: float) -> bool:
    turn = max(TURN, 2 * (part.ready_at - part.begun))
    return now - part.ready_at >= min(turn, LONGEST_TURN)


# -- too much --------------------------------------------------------------------------------------


def _shrunk(state: State) -> Step:
    """Processes grow. Where they have outgrown the budget, whom nobody needs goes."""
    commands: list[Command] = []
    idle = [p for p in state.workers("ready") if p.model.idle and not p.model.pinned]
    for part in sorted(idle, key=_by_use):
        if _taken(state, leaving=False).within(state.budget):
            break
        state = state.with_part(replace(part, phase="leaving"))
        commands.append(Finish(part.name))
    return state, tuple(commands)
