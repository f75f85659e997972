"""Generations of several invokes that share forwards: each keeps its own rows, step by step.

Who may share is asked of a `Sharer` (`engine.stepping`); in what order forwards come, whose rows
are where, and which tokens follow, a `Loop` says (`families.decodings`). Here its forwards are
called with the hooks of all sites of their steps. As in a forward that invokes share (`rows`), what
is handed out at a site is a private copy of an invoke's rows, and edits are written back to these.

An invoke leaves as soon as it needs no further step; the others go on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol

from torch.nn import Module

from weft.graph.node import (
    Apply,
    Call,
    Const,
    Fill,
    Guard,
    Log,
    Param,
    Read,
    Save,
    Skip,
    Stop,
    Write,
)
from weft.graph.site import RESULT, Leaf, Site

from .hooks import Drive
from .part import ModuleCall, Part
from .rows import Piece, SharedPart, leaves_of
from .steps import Plan
from .turns import levels


class Rows(Protocol):
    """Where the rows of one generation lie in a turn (`families.decodings.Place`)."""

    @property
    def number(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def rows(self) -> tuple[int, int]: ...
    @property
    def length(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def last(self) -> int: ...
    @property
    def kept(self) -> int: ...


class Turn(Protocol):
    """One forward: its call, and whose rows are where."""

    @property
    def call(self) -> ModuleCall: ...
    @property
    def places(self) -> Sequence[Rows]: ...


class Loop(Protocol):
    """The forwards of several generations (`families.decodings.Decodings`)."""

    errors: dict[int, Any]

    def add(self, decoding: Any) -> int: ...
    def turn(self) -> Turn | None: ...
    def took(self, output: Any, leaving: Collection[int] = ()) -> None: ...
    def drop(self) -> None: ...
    def leave(self, number: int) -> None: ...
    def close(self) -> None: ...


class Sharer(Protocol):
    """Says which generations may share forwards, and where their rows lie in a tensor."""

    def may(
        self,
        decoders: Mapping[int, Any],
        leaves: Mapping[Site, Sequence[Leaf]],
        module: Module,
    ) -> set[int]:
        """The invokes that may: at all of their sites it is known where their rows are."""
        ...

    def loop(self, module: Module) -> Loop: ...

    def piece(self, decoder: Any, site: Site, leaf: Leaf, place: Rows, batch: int) -> Piece:
        """The rows of one invoke, of `batch`, in the turn of its step."""
        ...


Lane = tuple[tuple[int, ...], bool]
"""Invokes whose forwards are run together, and whether they share them."""

KINDS = frozenset((Read, Write, Fill, Call, Apply, Param, Const, Guard, Save, Log, Stop))
"""Nodes that mean the same where forwards are shared."""


def lanes(plan: Plan, decoders: Sequence[Any], sharer: Sharer | None, module: Module) -> list[Lane]:
    """The generations of a run in order. Where they do not share, those in one lane take turns.

    Whoever needs values of another's generation comes after it, so those that share need none of
    each other's.
    """
    found: list[Lane] = []
    for level in levels(plan):
        groups = [tuple(group) for group in level]
        single = [group[0] for group in groups if len(group) == 1]
        shared = _sharing(plan, single, decoders, sharer, module)
        found += [(group, False) for group in groups if not shared.issuperset(group)]
        if shared:
            found.append((tuple(sorted(shared)), True))
    return found


def _sharing(
    plan: Plan, invokes: list[int], decoders: Sequence[Any], sharer: Sharer | None, module: Module
) -> set[int]:
    own = set(invokes) - _alone(plan)
    if sharer is None or len(own) < 2:
        return set()
    sites = [site for site in plan.sites if site.invoke in own and site.port != RESULT]
    leaves = {site: leaves_of(plan, site) for site in sites}
    found = sharer.may({one: decoders[one] for one in sorted(own)}, leaves, module)
    return found if len(found) > 1 else set()


def _alone(plan: Plan) -> set[int]:
    """Invokes with nodes that mean something else in a forward that is shared."""
    found: set[int] = set()
    for step in plan.steps:
        if step is None or step.kind in KINDS:
            continue
        if step.kind is not Skip:
            return {site.invoke for site in plan.sites}
        found.add(step.node.site.invoke)
    return found


class Joined(SharedPart):
    """The forwards of generations that share them."""

    def __init__(
        self, whole: Drive, invokes: Sequence[int], decoders: Sequence[Any], sharer: Sharer
    ) -> None:
        Part.__init__(self, whole, invokes, (), {})
        self._linked, self._rows, self._head = False, None, None
        self._sharer = sharer
        self._decoders = decoders
        self._pieces: dict[tuple[Site, Leaf], Piece] = {}
        self._there: dict[tuple[str, str, int], list[Site]] = {}
        self._steps: dict[tuple[int, int], list[Site]] = {}  # by invoke and step
        self._last: dict[int, int] = {}  # by invoke; a result has no step
        self._results: dict[int, Site] = {}
        for site in self._left:
            if site.port == RESULT:
                self._results[site.invoke] = site
            else:
                self._steps.setdefault((site.invoke, site.step), []).append(site)
                self._last[site.invoke] = max(self._last.get(site.invoke, -1), site.step)
        self._turn: dict[int, Rows] = {}  # the invokes of this turn
        self._stopped = 0

    def call(self) -> None:
        """All forwards, until nothing is left to do in any of the generations."""
        with closing(self._sharer.loop(self.module)) as loop:
            needed = [one for one in sorted(self._invokes) if self._needs(one, 0)]
            numbers = {loop.add(self._decoders[one]): one for one in needed}
            while (turn := loop.turn()) is not None:
                self._begin(turn, numbers)
                output = self._forward(turn.call)
                ended = [place.number for one, place in self._turn.items() if self._ends(one)]
                if output is None:
                    loop.drop()
                else:
                    loop.took(output, ended)
                del output
                for error in loop.errors.values():
                    raise error
                for one in self._turn:
                    if self._decoders[one].over:
                        self._end(one)

    def _needs(self, invoke: int, step: int) -> bool:
        """Whether an invoke wants a step, or what comes of it."""
        return invoke in self._results or step <= self._last.get(invoke, -1)

    def _ends(self, invoke: int) -> bool:
        """Whether this turn is the last that an invoke needs."""
        if {invoke, None} & self.interpreter.stopped:
            return True
        return not self._needs(invoke, self._turn[invoke].step + 1)

    def _begin(self, turn: Turn, numbers: Mapping[int, int]) -> None:
        """The sites of a turn, and where the rows of each invoke are in them."""
        self._turn = {numbers[place.number]: place for place in turn.places}
        self._there, self._pieces = {}, {}
        batch = max(place.rows[1] for place in turn.places)
        plan, shared = self.interpreter.plan, len(self._turn) > 1
        for one, place in self._turn.items():
            for site in self._steps.pop((one, place.step), ()):
                if site not in self.interpreter.sites:
                    continue  # left out by a stop
                self._there.setdefault((site.path, site.port, site.call), []).append(site)
                for leaf in leaves_of(plan, site) if shared else ():
                    self._pieces[site, leaf] = self._piece(one, site, leaf, place, batch)
        self._set_stop()

    def _piece(self, invoke: int, site: Site, leaf: Leaf, place: Rows, batch: int) -> Piece:
        return self._sharer.piece(self._decoders[invoke], site, leaf, place, batch)

    def _set_stop(self) -> None:
        self._stopped = len(self.interpreter.stopped)
        self.can_stop = all(map(self._ends, self._turn))
        self.want_result = not self.can_stop

    def _forward(self, call: ModuleCall) -> Any:
        args, kwargs = call
        if not self._there:
            return None if self.can_stop else self.module(*args, **kwargs)
        return self.forward(*self.guarded(args, dict(kwargs)), None)

    def _end(self, invoke: int) -> None:
        """A generation is over: what it brings, and what it has left out."""
        mine = [key for key in self._steps if key[0] == invoke]
        self.interpreter.leave_out([site for key in mine for site in self._steps.pop(key)])
        result = self._results.get(invoke)
        if result is not None and result in self.interpreter.sites:
            Part.become(self, result, self._decoders[invoke].result)

    # -- as a part -----------------------------------------------------------------------------

    def sites(self) -> list[Site]:
        return [sites[0] for sites in self._there.values()]

    def become(self, site: Site, structure: Any) -> Any:
        if len(self._turn) == 1:  # its own rows and no others: as it is alone
            self._there.pop((site.path, site.port, site.call), None)
            structure = Part.become(self, site, structure)
        else:
            structure = super().become(site, structure)
        if len(self.interpreter.stopped) != self._stopped:
            self._set_stop()
            self._keep_open()
        return structure

    def _keep_open(self) -> None:
        """After a stop: sites that it has left out are not waited for."""
        sites = self.interpreter.sites
        left = {key: [one for one in ones if one in sites] for key, ones in self._there.items()}
        self._there = {key: ones for key, ones in left.items() if ones}

    def is_over(self) -> bool:
        return self.can_stop and not self._there
