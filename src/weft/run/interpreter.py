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

A step runs as soon as what it needs exists; steps that are ready run in program order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from heapq import heappop, heappush
from typing import Any

import torch

from weft.errors import (
    GraphError,
    NotReachedError,
    OverwrittenError,
    ReadOnlyError,
    WeftError,
)
from weft.graph.node import (
    DRAWS,
    Apply,
    Bound,
    Call,
    Const,
    Fill,
    Graph,
    Guard,
    Log,
    Param,
    Read,
    Save,
    Skip,
    Stop,
    Write,
)
from weft.graph.site import Leaf, Site, Where
from weft.kernels.execute import call, seed_of
from weft.kernels.own import COUNTED
from weft.kernels.results import flatten

from .compare import agree, check_bound, check_look, guard_error, value_of
from .cuts import cut
from .firing import SiteSteps, type_text
from .frame import Frame
from .host import Host
from .late import late_edit, what
from .logs import Lines, OnValue, handed, unreached
from .lower import Env, lower
from .memory import Memory, storage, version
from .plan import plan
from .steps import Step, line_of
from .stops import left_out, reached, stops
from .structure import tensors
from .taken import Take, Takes, take
from .turns import blocker
from .watch import Watch


class Interpreter:
    """One run of a graph. See the module's text. `backward` has the one for gradients."""

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

    # Steps without a site

    def _call(self, step: Step) -> None:
        if step.changes:
            self._before_write(step)
        env = self._memory.inputs(step)
        args, kwargs = step.args.build(env)  # type: ignore[union-attr]
        if self._watch is not None and step.node.op in COUNTED:
            self._watch.counted(COUNTED[step.node.op](*args, **kwargs), self._line(step))
        function = step.function
        result = function(*args, **kwargs) if function else self._made(step, args, kwargs)
        if isinstance(result, torch.Tensor) and step.outs == 1 and not step.bounds:
            self._memory.put(step, step.slot, self._verified(step, 0, result, env))
        else:
            results = enumerate(flatten(result))
            self._give(step, [self._verified(step, out, result, env) for out, result in results])

    def _made(self, step: Step, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The result of an operation that draws numbers, or makes a tensor from plain values."""
        node, key = step.node, None
        if node.draw is not None:
            key = seed_of(self.graph.seed or 0, node.draw % DRAWS, 0, 0)
        return call(node.op, tuple(args), kwargs, seed_key=key, device=self._host.device)

    def _before_write(self, step: Step) -> None:
        for slot in step.changes:
            if self._host.is_weight(storage(self._memory.env[slot])):
                raise ReadOnlyError(
                    f"torch.{step.node.op} would write into a weight of the model",
                    line=self._line(step),
                    fix="edit a copy: take .clone() first",
                )
        if step.older:
            self._memory.freeze([use for use in step.older if self._waits[use[0]]])
        if self._at.direct:
            self._at.protect(step.targets)

    def _verified(self, step: Step, out: int, result: torch.Tensor, env: Env) -> torch.Tensor:
        """A result that shares storage with arguments exactly as recorded."""
        if not step.verify:
            return result
        source = step.sources[out] if out < len(step.sources) else None
        if source is not None:
            if result is not env[source] and storage(result) != storage(env[source]):
                self._refuse_copy(step, out)
            if step.slot + out in step.cuts:
                return cut(result)
        elif storage(result) in [storage(env[slot]) for slot in step.uses]:
            return result.clone()
        return result

    def _refuse_copy(self, step: Step, out: int) -> None:
        if self.plan.family[step.slot + out] in self.plan.written:
            raise GraphError(
                f"torch.{step.node.op} gave a copy where the recording had a view",
                line=self._line(step),
                fix="record the experiment on an input like this one",
            )

    def _apply(self, step: Step) -> None:
        memory = self._memory
        env = memory.inputs(step)
        given = {slot: env[slot] for slot in step.uses}
        for slot, tensor in given.items():
            if memory.is_foreign(storage(tensor)):
                given[slot] = tensor.clone()
        before = {slot: version(env[slot]) for slot in step.uses}
        args, kwargs = step.args.build(given)  # type: ignore[union-attr]
        results = [*tensors(self._host.apply(step.node.path, args, kwargs))]
        for slot in step.uses:
            if version(env[slot]) != before[slot] and not memory.is_last_use(slot):
                raise OverwrittenError(
                    f"the module {step.node.path!r} changed its argument in place",
                    line=self._line(step),
                    fix="give it a copy: x.clone()",
                )
        taken = {storage(tensor) for tensor in given.values()}
        self._give(step, [self._own(result, taken) for result in results])

    def _own(self, tensor: torch.Tensor, taken: set[int]) -> torch.Tensor:
        where = storage(tensor)
        return tensor.clone() if where in taken or self._host.is_weight(where) else tensor

    def _param(self, step: Step) -> None:
        tensor = self._host.parameter(step.node.path).detach()
        self._refuse_other(step, tensor, f"the weight {step.node.path!r}")
        self._give(step, [tensor])

    def _const(self, step: Step) -> None:
        node = step.node
        tensor = self._constants.get(node.key)
        if tensor is None:
            raise GraphError(
                f"the constant {node.key!r} is missing",
                line=self._line(step),
                fix="load the experiment with its constants",
            )
        self._refuse_other(step, tensor, f"the constant {node.key!r}")
        device = self._host.device
        if device is not None and tensor.device != device:
            tensor = tensor.to(device)
        if step.slot in self.plan.written:
            tensor = tensor.clone()
        self._memory.clients.add(storage(tensor))
        self._give(step, [tensor])

    def _refuse_other(self, step: Step, tensor: torch.Tensor, name: str) -> None:
        node = step.node
        if tensor.shape != node.shape or tensor.dtype != step.dtype:
            recorded = f"{node.dtype}{list(node.shape)}"
            raise GraphError(
                f"{name} should be {recorded}, but is {type_text(tensor)}",
                line=self._line(step),
                fix="run the experiment with the constants and the model it was recorded with",
            )

    def _guard(self, step: Step) -> None:
        node = step.node
        tensor = self._memory.inputs(step)[step.uses[0]]
        expected, _ = lower(node.expected, (), [])
        check_look(node.look, expected, tensor.shape, self._line(step))
        got = value_of(tensor, node.look)  # as many numbers as the graph itself has
        if not agree(expected, got, tensor.dtype):
            raise guard_error(node.look, expected, got, self._line(step))

    def _save(self, step: Step) -> None:
        memory = self._memory
        kept = memory.keep(step, memory.inputs(step))
        self._saves.append((step, kept))
        if self._watch is not None:
            self._watch.saved(sum([tensor.nbytes for tensor in kept.values()]), self._line(step))

    def _log(self, step: Step) -> None:
        parts, _ = step.args.build(self._memory.inputs(step))  # type: ignore[union-attr]
        if step.node.stream is None:
            self._lines.say(step.index, parts)
        elif self._on_value is not None:
            self._on_value(step.node, tuple(map(handed, parts)))

    def _give(self, step: Step, results: list[torch.Tensor]) -> None:
        if len(results) != step.outs:
            raise GraphError(
                f"{what(step.node)} gave {len(results)} tensors where {step.outs} were recorded",
                line=self._line(step),
                fix="record the experiment on an input like this one",
            )
        for slot, result in enumerate(results, step.slot):
            self._memory.put(step, slot, result)
        for bound in step.bounds:
            self._check_bound(bound, results[bound.value.out])

    def _check_bound(self, bound: Bound, tensor: torch.Tensor) -> None:
        check_bound(bound, tensor.shape, line_of(self.graph, bound))

    # Steps at a site

    def _read(self, step: Step) -> None:
        self._give(step, [self._at.read(step, self._here())])

    def _write(self, step: Step) -> None:
        self._at.write(step, self._here())

    def _fill(self, step: Step) -> None:
        self._at.fill(step, self._here())

    def _skip(self, step: Step) -> None:
        self._at.skip(step, self._here())

    def _stop(self, step: Step) -> None:
        if stops(step, self._memory, self._line(step)):
            self.stopped.add(step.node.invoke)
            self.leave_out(left_out(step.node, self._pending))

    def _here(self) -> Frame:
        assert self._frame is not None  # what stands at a site waits for it
        return self._frame

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


Interpreter.table = {
    Read: Interpreter._read,
    Write: Interpreter._write,
    Fill: Interpreter._fill,
    Call: Interpreter._call,
    Apply: Interpreter._apply,
    Param: Interpreter._param,
    Const: Interpreter._const,
    Guard: Interpreter._guard,
    Save: Interpreter._save,
    Log: Interpreter._log,
    Skip: Interpreter._skip,
    Stop: Interpreter._stop,
}


def _filled(step: Step, kept: Env) -> Any:
    value, hole = step.value
    if hole is None:
        return value
    return kept[hole] if isinstance(hole, int) else hole(kept)
