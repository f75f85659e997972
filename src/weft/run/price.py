"""What a graph costs, before it runs: from its shapes alone, without weights or numbers.

    price(graph, order)        # order(site): when a site fires, from a signature
    print(price(graph, order))

The steps are played through in firing order. Memory is what the graph itself keeps alive: its
constants and results, the model's tensors that it holds on to, and saves. Not counted: the model's
own memory, memory inside an operation, and copies of values that wait while they are edited.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from heapq import heappop, heappush
from typing import Any, NamedTuple

import torch

from weft.errors import GraphError
from weft.graph.frame import frame_bytes
from weft.graph.node import Apply, Call, Const, Graph, Guard, Param, Save
from weft.graph.site import Site
from weft.kernels.abstract import DataDependentError, evaluate
from weft.kernels.aval import Aval, contiguous
from weft.kernels.cost import cost

from .lower import lower
from .plan import plan
from .steps import Plan, Step, line_of

Order = Callable[[Site], int] | Mapping[tuple[str, str, int], int]
ShapeOf = Callable[[int, int], Aval | None]

_INDICES = ("nonzero", "argwhere", "where", "bincount")  # they give integers, whatever they get


class Price(NamedTuple):
    """`ends` is the last site that the run needs: there the forward may stop."""

    sites: int
    operations: int
    flops: int
    constant_bytes: int
    saved_bytes: int
    peak_bytes: int
    ends: Site | None

    def __str__(self) -> str:
        rows = [
            ("sites", f"{self.sites}"),
            ("operations", f"{self.operations}"),
            ("flops", _short(self.flops, 1000, "")),
            ("constants", _short(self.constant_bytes, 1024, "B")),
            ("saved", _short(self.saved_bytes, 1024, "B")),
            ("peak memory", _short(self.peak_bytes, 1024, "B")),
            ("ends at", "no site is needed" if self.ends is None else str(self.ends)),
        ]
        return "\n".join(f"{name:<12} {text}" for name, text in rows)


def price(graph: Graph, order: Order, shape_of: ShapeOf | None = None) -> Price:
    """The price of a checked graph.

    `order` gives the firing index of a site, as a function or by `(path, port, call)`.
    `shape_of(node, out)` gives the shape of an applied module's result where the node does not.
    """
    play = _Play(graph, shape_of)
    sites = sorted(play.plan.sites, key=lambda site: (site.step, _when(order, site)))
    play.begin()
    for site in sites:
        play.fire(site)
    return Price(
        sites=len(sites),
        operations=play.operations,
        flops=play.flops,
        constant_bytes=play.constants,
        saved_bytes=play.saved,
        peak_bytes=play.memory.peak,
        ends=sites[-1] if sites else None,
    )


def _when(order: Order, site: Site) -> int:
    return order(site) if callable(order) else order[site.path, site.port, site.call]


class _Memory:
    """Bytes alive: a storage lives while one of its family's slots or saves does."""

    def __init__(self, family: list[int]) -> None:
        self.family = family
        self.peak = 0
        self._now = 0
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
            self._now -= self._sizes[family]

    def kept(self, slot: int, size: int, copied: bool) -> None:
        """A save. It shares the storage of a value that is all of it, once."""
        family = self.family[slot]
        if copied or slot != family or family in self._kept:
            self._add(size)
        else:
            self._kept.add(family)

    def _add(self, size: int) -> None:
        self._now += size
        self.peak = max(self.peak, self._now)


class _Play:
    """A run on shapes: the same order, and the same moments at which values are dropped."""

    def __init__(self, graph: Graph, shape_of: ShapeOf | None) -> None:
        self.graph = graph
        self.plan = plan(graph)
        self.operations = self.flops = self.constants = self.saved = 0
        self.memory = _Memory(self.plan.family)
        self._shape_of = shape_of
        self._looks = dict(_looks(self.plan))
        self._env: dict[int, Aval] = {}
        self._left = self.plan.left.copy()
        self._waits = self.plan.waits.copy()
        self._ready: list[int] = []

    def begin(self) -> None:
        self._ready = [s.index for s in self.plan.steps if s is not None and not s.waits]
        self._drain()

    def fire(self, site: Site) -> None:
        self._wake(self.plan.sites[site].steps)
        self._drain()

    def _wake(self, indices: list[int]) -> None:
        for index in indices:
            self._waits[index] -= 1
            if not self._waits[index]:
                heappush(self._ready, index)

    def _drain(self) -> None:
        while self._ready:
            step: Any = self.plan.steps[heappop(self._ready)]
            self._run(step)
            self._release(step)
            self._wake(step.kids)

    def _run(self, step: Step) -> None:
        if type(step.node) is Save:
            self._save(step)
        owned = type(step.node) is not Param
        for slot, aval in enumerate(self._results(step), step.slot):
            if self._left[slot]:
                self._env[slot] = aval
                self.memory.born(slot, aval.nbytes if owned else 0)

    def _save(self, step: Step) -> None:
        for slot in step.uses:
            size = self._env[slot].nbytes
            self.saved += size
            self.memory.kept(slot, size, slot in step.clones)

    def _release(self, step: Step) -> None:
        for slot in step.uses:
            self._left[slot] -= 1
            if not self._left[slot]:
                del self._env[slot]
                self.memory.died(slot)

    # Shapes

    def _results(self, step: Step) -> list[Aval]:
        node = step.node
        if type(node) is Call:
            self.operations += 1
            return self._called(step)
        if type(node) is Apply:
            self.operations += 1
            return [self._applied(step, out) for out in range(node.outs)]
        if type(node) is Const:
            self.constants += frame_bytes(node.dtype, node.shape)
        return [contiguous(node.shape, _dtype(node.dtype))] if step.outs else []

    def _called(self, step: Step) -> list[Aval]:
        node: Any = step.node
        args, kwargs = step.args.build(self._env)  # type: ignore[union-attr, arg-type]
        try:
            outcome = evaluate(node.op, tuple(args), kwargs)
        except DataDependentError:
            return [self._looked_at(step, slot) for slot in range(step.slot, step.slot + step.outs)]
        self.flops += cost(node.op, tuple(args), kwargs, outcome).flops
        return [leaf.aval for leaf in outcome.leaves]

    def _looked_at(self, step: Step, slot: int) -> Aval:
        """A result whose shape depends on numbers: a guard says the shape that it had."""
        if slot not in self._looks:
            raise GraphError(
                f"the shape of torch.{step.node.op} depends on numbers, and no guard tells it",
                line=line_of(self.graph, step.node),
            )
        counts = step.node.op in _INDICES or slot != step.slot
        dtype = torch.int64 if counts else self._env[step.uses[0]].dtype
        return contiguous(self._looks[slot], dtype)

    def _applied(self, step: Step, out: int) -> Aval:
        node: Any = step.node
        found = self._shape_of(step.index, out) if self._shape_of else None
        if found is not None:
            return found
        if out >= len(node.types):
            raise GraphError(
                f"the shape of what the module {node.path!r} gives is not known",
                line=line_of(self.graph, node),
            )
        dtype, shape = node.types[out]
        return contiguous(shape, _dtype(dtype))


def _looks(plan: Plan) -> list[tuple[int, tuple[int, ...]]]:
    """Slots and shapes that guards tell."""
    steps = [step for step in plan.steps if step is not None and type(step.node) is Guard]
    return [
        (step.uses[0], tuple(lower(step.node.expected, (), [])[0]))
        for step in steps
        if step.node.look == "shape"
    ]


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _short(number: float, base: int, unit: str) -> str:
    """`1536` as `1.5 KB`."""
    for prefix in ("", "K", "M", "G", "T"):
        if number < base or prefix == "T":
            break
        number /= base
    digits = f"{number:.0f}" if not prefix else f"{number:.1f}"
    return f"{digits} {prefix}{unit}".strip()
