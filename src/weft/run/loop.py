"""The loop: runs a plan while something else calls it with the values at the sites.

It knows no hooks and no modules. Whoever drives it says `begin`, then `fire(site, structure)` for
each site that it meets ("here is the value, what should it become?"), then `end`:

    run = Interpreter(graph, constants, host)
    run.begin()
    for site, value in firings:
        value = run.fire(site, value)
        if run.finished:
            break
    saved = run.end()

A step runs as soon as what it needs exists; steps that are ready run in program order. What each
kind of step does is `interpreter`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from heapq import heappop, heappush
from typing import Any

import torch

from weft.errors import NotReachedError, WeftError
from weft.graph.node import Graph
from weft.graph.site import Leaf, Site, Where

from .firing import SiteSteps
from .frame import Frame
from .host import Host
from .late import late_edit, what
from .logs import Lines, OnValue, unreached
from .lower import Env
from .memory import Memory
from .plan import plan
from .steps import Step, line_of
from .stops import reached
from .structure import tensors
from .taken import Take, Takes, take
from .turns import blocker
from .watch import Watch


class Loop:
    """One run of a graph, without what the steps do. See the module's text."""

    table: Mapping[type, Callable[[Any, Step], None]]
    """What runs each kind of node."""
    takes = True  # whether what is only read and saved may be copied at once

    def __init__(
        self,
        graph: Graph,
        constants: Mapping[str, torch.Tensor],
        host: Host,
        *,
        strict: bool = True,
        on_log: Callable[[str], None] = print,
        on_value: OnValue | None = None,
        overwritten: Callable[[Site, Leaf], bool] | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.graph = graph
        self.plan = plan(graph, strict)
        self._constants = constants
        self._host = host
        self._lines = Lines(self.plan.logs, on_log)
        self._on_value = on_value
        self._watch = watch
        self._memory = Memory(graph, self.plan, host)
        self._memory.taken = self.plan.taken if self.takes else frozenset()
        self._at = SiteSteps(graph, self.plan, self._memory, host, overwritten)
        self._pending = dict(self.plan.sites)
        self._waits = self.plan.waits.copy()
        self._ready: list[int] = []
        self._undone = self.plan.count
        self._frame: Frame | None = None
        self._saves: list[tuple[Step, Env]] = []
        self._told: Any = overwritten if hasattr(overwritten, "site") else None
        self.left_out: dict[Site, Any] = {}
        """Sites that a stop, or the end of a generation, has kept from firing."""
        self.stopped: set[int | None] = set()
        """The invokes that a stop has ended; None: all."""
        self.given: dict[Site, Any] = {}
        """What modules give that are to be skipped, by their output, until they begin."""

    # The interface

    @property
    def sites(self) -> Mapping[Site, Any]:
        """The sites that have not fired yet."""
        return self._pending

    @property
    def finished(self) -> bool:
        """Whether nothing is left to run."""
        return not self._undone or (bool(self.left_out) and not self._pending)

    def mode(self, module: torch.nn.Module) -> AbstractContextManager[Any]:
        """What must be around the run."""
        return torch.no_grad()

    def begin(self) -> None:
        """Runs what needs no site."""
        steps = self.plan.steps
        self._ready = [s.index for s in steps if s is not None and not s.waits]
        self._drain()

    def fire(self, site: Site, structure: Any) -> Any:
        """What the value at a site becomes."""
        there = self._pending.pop(site, None)
        if there is None:
            return structure
        if self._watch is not None:
            self._watch.look()
        if there.taken is not None and self.takes:
            self._take(there.taken, site, structure)
            return structure
        frame = self._frame = Frame(site, structure)
        try:
            self._wake(there.steps)
            self._drain()
            if there.effects:
                self._refuse_late(there.effects)
                structure = self._at.close(frame)
                if frame.skip is not None:
                    self.given[frame.skip.node.site] = self._at.skipped(frame, self._told)
        finally:
            self._frame = None
        self._memory.end_firing()
        if self._watch is not None:
            self._watch.fired(len(self._pending))
        return structure

    def _take(self, takes: Takes, site: Site, structure: Any) -> None:
        """What `fire` does at a site that is only read and saved."""
        for save in take(takes, site, structure, self._waits, self._memory, self._at):
            heappush(self._ready, save)
        self._undone -= len(takes)
        if self._ready:
            self._drain()
        if self._watch is not None:
            self._watch.fired(len(self._pending))

    def quick(self) -> Mapping[Site, Take]:
        """Sites that whoever drives may see to: he puts a copy of what is taken into `env`, and
        says so (`took`) before anything else fires."""
        return self.plan.quick if self.takes and self._watch is None else {}

    @property
    def env(self) -> Env:
        """The values that are there, by slot."""
        return self._memory.env

    def took(self, fired: list[tuple[Site, Take]]) -> None:
        """These sites have fired."""
        waits, pending = self._waits, self._pending
        for site, one in fired:
            if pending.pop(site, None) is None:  # a stop came first
                del self._memory.env[one.slot]
                continue
            self._undone -= 1
            waits[one.read] = 0
            waits[one.save] -= 1
            if not waits[one.save]:
                heappush(self._ready, one.save)
        fired.clear()
        if self._ready:
            self._drain()

    def leave_out(self, sites: Iterable[Site]) -> None:
        """These sites will not fire in this run: what needs them is not reached."""
        for site in [*sites]:
            if self._pending.pop(site, None) is not None:
                self.left_out[site] = None
        if self.plan.logs:
            self._lines.skip(unreached(self.plan, self.left_out))

    def is_blocked(self, site: Site) -> bool:
        """Whether an edit of this site waits for a site of another invoke."""
        there = self._pending.get(site)
        return there is not None and blocker(self.plan, self._waits, there) is not None

    def end(self, result: Any = None) -> dict[str, Any]:
        """What was saved, by name. `result` is what the caller gets besides."""
        if self._undone:
            if self._pending or not self.left_out:
                raise self._not_reached()
            self._saves += reached(self.plan, self._waits, self._memory)
        self._lines.close()
        self._memory.check_saves()
        if result is not None:
            self._memory.unshare(tensors(result))
        self._saves.sort(key=lambda save: save[0].index)
        return {step.node.name: _filled(step, kept) for step, kept in self._saves}

    def close(self) -> None:
        """Prints what still waits for its turn: to be called in any case, also after an error."""
        self._lines.close()

    # The loop

    def _drain(self) -> None:
        ready, steps, memory, watch = self._ready, self.plan.steps, self._memory, self._watch
        table = self.table
        while ready:
            step: Any = steps[heappop(ready)]
            if watch is not None:
                watch.look()
            try:
                table[step.kind](self, step)
            except Exception as error:
                if not isinstance(error, WeftError):
                    self._mark(error, step)
                raise
            self._undone -= 1
            if step.uses:
                memory.release(step)
            if step.kids:
                self._wake(step.kids)

    def _wake(self, indices: list[int]) -> None:
        waits = self._waits
        for index in indices:
            waits[index] -= 1
            if not waits[index]:
                heappush(self._ready, index)

    def _line(self, step: Step) -> Where | None:
        return line_of(self.graph, step.node)

    def _mark(self, error: Exception, step: Step) -> None:
        """Tells an error of torch's whose line it happened at: for people, and for `line_of`."""
        line = self._line(step)
        error.add_note(f"in {what(step.node)} of the experiment, at {line}")
        error.weft_line = line  # type: ignore[attr-defined]

    # What can go wrong

    def _refuse_late(self, effects: list[int]) -> None:
        for index in effects:
            if self._waits[index]:
                raise late_edit(self.graph, self.plan, self._waits, index, self.left_out)

    def _not_reached(self) -> NotReachedError:
        steps: list[Any] = [
            self.plan.steps[index] for there in self._pending.values() for index in there.steps
        ]
        lines = [f"  {s.node.site}, at {self._line(s)}" for s in steps]
        return NotReachedError(
            "\n".join(["these sites did not fire in this run:", *dict.fromkeys(lines)]),
            fix="the model did not call these modules (so often); see their paths and calls",
        )


def _filled(step: Step, kept: Env) -> Any:
    value, hole = step.value
    if hole is None:
        return value
    return kept[hole] if isinstance(hole, int) else hole(kept)
