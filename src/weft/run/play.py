"""A run on shapes alone: the same order, and the same moments at which values are dropped.

`Play` counts what a graph costs. It needs no weights and no numbers; what it is not told it takes
from the graph (`read`, `param`, `applied`), and who believes no graph overrides these.

    play = Play(graph)
    play.run(order)            # order(site): when a site fires
    play.flops, play.memory.peak
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from heapq import heappop, heappush
from typing import Any

import torch

from weft.errors import GraphError
from weft.graph.frame import frame_bytes
from weft.graph.loops import unrolled
from weft.graph.node import (
    Apply,
    Backward,
    Call,
    Const,
    Grad,
    Graph,
    Guard,
    Param,
    Read,
    Save,
)
from weft.graph.site import Site, Where
from weft.kernels.abstract import DataDependentError, Outcome
from weft.kernels.aval import Aval, contiguous
from weft.kernels.cost import cost
from weft.kernels.forms import INDEXED, pinned
from weft.kernels.quick import outcome as abstract_outcome

from .cuts import families
from .gradplay import Backwards
from .late import late_edit
from .lower import lower
from .plan import plan
from .steps import Plan, Step, line_of
from .turns import next_turn, queues_of

Order = Callable[[Site], int] | Mapping[tuple[str, str, int], int]

_COUNTS = frozenset(("nonzero", "argwhere", "where", "bincount", "nn.functional.one_hot"))
"""Operations that give integers, whatever they get."""


class Play:
    """See the module's text. `sites` are those of the graph in firing order, once it has run."""

    def __init__(self, graph: Graph, strict: bool = True) -> None:
        self.graph = graph = unrolled(graph)
        self.plan = plan(graph, strict)
        self.operations = self.flops = self.constants = self.saved = 0
        self.memory = Memory(families(self.plan))
        self.sites: list[Site] = []
        self.env: dict[int, Aval] = {}
        self._looks = dict(_looks(self.plan))
        self._left = self.plan.left.copy()
        self._waits = self.plan.waits.copy()
        self._ready: list[int] = []
        self.fired: dict[int, Site] = {}  # of each invoke the last site that has fired
        self.backwards = Backwards(self)

    def run(self, order: Order) -> None:
        """Plays all steps. Raises `LateEditError` for an edit that would come too late."""
        self._ready = [s.index for s in self.plan.steps if s is not None and not s.waits]
        self._drain()
        queues = queues_of(self.plan.sites, partial(_when, order))
        if len(queues) == 1:
            (queue,) = queues.values()
            self.sites = queue[::-1]
            for site in self.sites:
                self._fire(site)
            return
        while queues:
            site = next_turn(self.graph, self.plan, self._waits, queues)
            self.sites.append(site)
            self._fire(site)

    def _fire(self, site: Site) -> None:
        there = self.plan.sites[site]
        self.fired[site.invoke] = site
        self._wake(there.steps)
        self._drain()
        for index in there.effects:
            if self._waits[index]:
                raise late_edit(self.graph, self.plan, self._waits, index)

    def _wake(self, indices: list[int]) -> None:
        for index in indices:
            self._waits[index] -= 1
            if not self._waits[index]:
                heappush(self._ready, index)

    def _drain(self) -> None:
        while self._ready:
            step: Any = self.plan.steps[heappop(self._ready)]
            self.step(step)
            self._release(step)
            self._wake([*step.kids, *step.arrivals])

    def step(self, step: Step) -> None:
        """One step: its results become known."""
        if step.kind is Save:
            self.save(step)
        owned = step.kind is not Param
        for slot, aval in enumerate(self._results(step), step.slot):
            if self._left[slot]:
                self.env[slot] = aval
                self.memory.born(slot, aval.nbytes if owned else 0)

    def save(self, step: Step) -> None:
        for slot in step.uses:
            size = self.env[slot].nbytes
            self.saved += size
            self.memory.kept(slot, size, slot in step.clones)

    def _release(self, step: Step) -> None:
        for slot in step.uses:
            self._left[slot] -= 1
            if not self._left[slot]:
                del self.env[slot]
                self.backwards.drop(slot)
        if step.kind is Backward:
            self.backwards.over()

    def line(self, step: Step) -> Where | None:
        return line_of(self.graph, step.node)

    # Shapes

    def _results(self, step: Step) -> list[Aval]:
        kind = step.kind
        if kind is Call:
            self.operations += 1
            return self.called(step)
        if kind is Apply:
            self.operations += 1
            return self.applied(step)
        if kind is Read:
            return [self.read(step)]
        if kind is Param:
            return [self.param(step)]
        if kind is Backward:
            self.backward(step)
        elif kind is Grad:
            return [self.backwards.gradient(step)]
        return [self.const(step)] if kind is Const else []

    def backward(self, step: Step) -> None:
        self.flops += self.backwards.cost(step)

    def read(self, step: Step) -> Aval:
        return _declared(step.node)

    def param(self, step: Step) -> Aval:
        return _declared(step.node)

    def const(self, step: Step) -> Aval:
        self.constants += frame_bytes(step.node.dtype, step.node.shape)
        return _declared(step.node)

    def arguments(self, step: Step) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call or apply, with `Aval`s as tensors."""
        args, kwargs = step.args.build(self.env)  # type: ignore[union-attr, arg-type]
        return tuple(args), kwargs

    def called(self, step: Step) -> list[Aval]:
        args, kwargs = self.arguments(step)
        name = step.node.op
        if name in INDEXED:
            args = (args[0], pinned(args[1]), *args[2:])
        try:
            found = self.outcome(step, args, kwargs)
        except DataDependentError:
            return [self.looked_at(step, slot) for slot in range(step.slot, step.slot + step.outs)]
        self.flops += cost(name, args, kwargs, found).flops
        return [leaf.aval for leaf in found.leaves]

    def outcome(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
        return abstract_outcome(step.node.op, args, kwargs)

    def looked_at(self, step: Step, slot: int) -> Aval:
        """A result whose shape depends on numbers: a guard says the shape that it had."""
        if slot not in self._looks:
            raise GraphError(
                f"the shape of torch.{step.node.op} depends on numbers, and no guard tells it",
                line=self.line(step),
                fix="record the experiment with model.trace, which looks at it",
            )
        counts = step.node.op in _COUNTS or (slot != step.slot and "unique" in step.node.op)
        dtype = torch.int64 if counts else self.env[step.uses[0]].dtype
        return contiguous(self._looks[slot], dtype)

    def applied(self, step: Step) -> list[Aval]:
        node = step.node
        if node.outs > len(node.types):
            raise GraphError(
                f"the shape of what the module {node.path!r} gives is not known",
                line=self.line(step),
                fix="record the experiment again",
            )
        return [contiguous(shape, dtype_of(dtype)) for dtype, shape in node.types]


class Memory:
    """Bytes alive: a storage lives while one of its family's slots or saves does."""

    def __init__(self, family: list[int]) -> None:
        self.family = family
        self.peak = 0
        self.now = 0
        self._sizes: dict[int, int] = {}  # family -> bytes
        self._alive: dict[int, set[int]] = {}  # family -> slots alive
        self._kept: set[int] = set()  # families that a save shares

    def born(self, slot: int, size: int) -> None:
        family = self.family[slot]
        alive = self._alive.setdefault(family, set())
        if not alive and family not in self._kept:
            self._sizes.setdefault(family, size)
            self._add(self._sizes[family])
        alive.add(slot)

    def died(self, slot: int) -> None:
        family = self.family[slot]
        self._alive[family].discard(slot)
        if not self._alive[family] and family not in self._kept:
            self.now -= self._sizes[family]

    def kept(self, slot: int, size: int, copied: bool) -> None:
        """A save. It shares the storage of a value that is all of it, once."""
        family = self.family[slot]
        if copied or slot != family or family in self._kept:
            self._add(size)
        else:
            self._kept.add(family)

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def _when(order: Order, site: Site) -> int:
    return order(site) if callable(order) else order[site.path, site.port, site.call]


def _looks(plan: Plan) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Slots and shapes that guards tell."""
    for step in plan.steps:
        if step is not None and step.kind is Guard and step.node.look == "shape":
            yield step.uses[0], tuple(lower(step.node.expected, (), [])[0])


def _declared(node: Read | Param | Const) -> Aval:
    return contiguous(node.shape, dtype_of(node.dtype))


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)
