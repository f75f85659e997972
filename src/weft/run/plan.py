"""Graph -> Plan: what each node waits for, which storage it touches, and how long it is needed.

Results of nodes live in *slots*, numbered in program order. Slots whose tensors share one storage,
as recorded, form a *family*, named by its first slot (a read, constant, weight, applied module or
fresh result). A write into a family starts a new version of it; program order decides which
version a use means:

- a use after a write waits for the write; a view made before it is waited for by the write;
- a use before a write that has not run when the write is about to run gets a copy (`Step.older`):
  the write does not wait, or a legal edit would become late.

Steps of one site keep program order: whatever follows a write or fill of the site waits for it.
Only steps that an effect needs are kept. The plan holds no tensor and can be run many times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from weft.errors import GraphError, ReadOnlyError
from weft.graph.node import (
    EFFECTS,
    AnyNode,
    Apply,
    Bound,
    Call,
    Const,
    Fill,
    Graph,
    Log,
    Param,
    Read,
    Save,
    Write,
)
from weft.graph.ops import OPS, RANDOM
from weft.graph.site import Site, Where
from weft.kernels.execute import MAKERS
from weft.kernels.table import FUNCTIONS

from .lower import Args, Hole, lower

_NOTHING: tuple[Any, ...] = ()


class Step:
    """One node, lowered."""

    __slots__ = (
        "args",
        "bounds",
        "clones",
        "deps",
        "direct",
        "dtype",
        "function",
        "index",
        "kids",
        "node",
        "older",
        "outs",
        "slot",
        "targets",
        "uses",
        "value",
        "verify",
        "waits",
        "watch",
    )

    def __init__(self, index: int, node: AnyNode, slot: int) -> None:
        self.index = index
        self.node: Any = node
        self.slot = slot  # of the first result
        self.outs = 0
        self.uses: list[int] = []  # slots that it needs, each once
        self.deps: set[int] = set()  # steps that run before it
        self.kids: list[int] = []  # steps that wait for it
        self.waits = 0  # what it waits for: its deps, and its site
        self.args: Args | None = None
        self.function: Callable[..., Any] | None = None
        self.value: tuple[Any, Hole] = (None, None)  # of a save; for a write or fill, its slot
        self.dtype: torch.dtype | None = None
        self.targets: tuple[int, ...] = _NOTHING  # slots that it writes into
        self.bounds: tuple[Bound, ...] = _NOTHING
        self.older: tuple[tuple[int, int], ...] | list[tuple[int, int]] = _NOTHING
        self.clones: frozenset[int] | set[int] = frozenset()  # slots that a save must copy
        self.direct = False  # a read whose edits may act on the model's own tensor
        self.watch = False  # its results may be the model's own tensors
        self.verify = False  # shared storage must be as recorded


class SitePlan:
    """The steps of one site in program order, and those among them that change it."""

    __slots__ = ("effects", "last", "steps")

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.effects: list[int] = []


class Plan:
    """What `Interpreter` runs. See the module's text."""

    __slots__ = (
        "count",
        "family",
        "fills",
        "graph",
        "left",
        "maker",
        "members",
        "sites",
        "steps",
        "strict",
        "waits",
        "written",
    )

    def __init__(self, graph: Graph, strict: bool) -> None:
        self.graph = graph
        self.strict = strict
        self.steps: list[Step | None] = []  # by node; None where nothing needs it
        self.family: list[int] = []  # by slot
        self.maker: list[int] = []  # by slot: the node
        self.left: list[int] = []  # by slot: how many steps use it
        self.waits: list[int] = []  # by node
        self.written: dict[int, int] = {}  # family -> the last node that writes into it
        self.members: dict[int, list[int]] = {}  # families handed to the model -> their slots
        self.sites: dict[Site, SitePlan] = {}
        self.count = 0
        self.fills = False  # whether anything is copied into the model's own tensors

    def line(self, node: AnyNode | Bound) -> Where | None:
        """The user's line of a node."""
        where = self.graph.where
        return where[node.at] if node.at < len(where) else None

    def source(self, slot: int) -> AnyNode:
        """The node whose result owns the storage of a slot."""
        return self.graph.nodes[self.maker[self.family[slot]]]

    def is_written_after(self, slot: int, index: int) -> bool:
        """Whether a later node than `index` writes into the storage of a slot."""
        return self.written.get(self.family[slot], -1) > index


def plan(graph: Graph, strict: bool = True) -> Plan:
    """The plan of a checked graph. Raises `ReadOnlyError` where it writes into a weight."""
    return _Planner(graph, strict).plan()


class _Planner:
    def __init__(self, graph: Graph, strict: bool) -> None:
        self.graph = graph
        self.result = Plan(graph, strict)
        self.base: list[int] = []  # first slot of each node
        self.steps: list[Step] = []
        self.writers: dict[int, list[int]] = {}  # family -> nodes that write into it
        self.bounds: dict[int, list[Bound]] = {}  # node -> sizes to check

    def plan(self) -> Plan:
        for index, node in enumerate(self.graph.nodes):
            self.lower(index, node)
        if not self.result.strict:
            for bound in self.graph.bounds:
                self.bounds.setdefault(bound.value.node, []).append(bound)
        live = self.live()
        _Linker(self.result, self.writers).link([s for s in self.steps if live[s.index]])
        return self.result

    # Lowering: arguments, slots, families

    def lower(self, index: int, node: AnyNode) -> None:
        step = Step(index, node, len(self.result.family))
        self.base.append(step.slot)
        self.steps.append(step)
        _LOWER[type(node)](self, step, node)
        if len(step.uses) > 1:
            step.uses = list(dict.fromkeys(step.uses))

    def lower_call(self, step: Step, node: Call) -> None:
        step.args = Args(node.args, node.kwargs, self.base, step.uses)
        step.function = self.function_of(node)
        family = self.result.family
        self.add_slots(step, node.outs)
        for out, source in enumerate(node.alias):
            if source is not None:
                family[step.slot + out] = family[self.base[source.node] + source.out]
        if node.writes:
            step.targets = tuple([self.base[ref.node] + ref.out for ref in node.writes])
        for slot in step.targets:
            self.refuse_weight(family[slot], node)
            self.writers.setdefault(family[slot], []).append(step.index)

    def function_of(self, node: Call) -> Callable[..., Any] | None:
        """The function to call; None where it also needs a key or a device."""
        function = FUNCTIONS.get(node.op)
        if function is None:
            raise GraphError(
                f"there is no operation {node.op!r} in this version of torch",
                line=self.result.line(node),
            )
        kind = OPS[node.op].kind
        return None if kind in RANDOM or kind in MAKERS else function

    def refuse_weight(self, family: int, node: Call) -> None:
        source = self.result.source(family)
        if type(source) is Param:
            raise ReadOnlyError(
                f"torch.{node.op} would write into the weight {source.path!r}",
                line=self.result.line(node),
                fix="edit a copy: take .clone() first",
            )

    def lower_apply(self, step: Step, node: Apply) -> None:
        step.args = Args(node.args, node.kwargs, self.base, step.uses)
        self.add_slots(step, node.outs)

    def lower_source(self, step: Step, node: Read | Const | Param) -> None:
        step.dtype = getattr(torch, node.dtype)
        self.add_slots(step, 1)

    def lower_value(self, step: Step, node: Any) -> None:
        step.value = lower(node.value, self.base, step.uses)

    def lower_log(self, step: Step, node: Log) -> None:
        step.args = Args(node.parts, (), self.base, step.uses)

    def add_slots(self, step: Step, count: int) -> None:
        result = self.result
        step.outs = count
        for slot in range(step.slot, step.slot + count):
            result.family.append(slot)
            result.maker.append(step.index)

    # Liveness

    def live(self) -> bytearray:
        """Which nodes an effect (or, on another input, a size to check) needs."""
        live = bytearray(len(self.steps))
        used: set[int] = set()  # families that a later live node uses
        family, maker = self.result.family, self.result.maker
        for step in reversed(self.steps):
            index = step.index
            if index in self.bounds:
                step.bounds = tuple(self.bounds[index])
                live[index] = 1
            if not live[index] and not self.is_wanted(step, used):
                continue
            live[index] = 1
            for slot in step.uses:
                live[maker[slot]] = 1
                used.add(family[slot])
        return live

    def is_wanted(self, step: Step, used: set[int]) -> bool:
        node = step.node
        if type(node) is not Call:
            return isinstance(node, EFFECTS)
        return any(self.result.family[slot] in used for slot in step.targets)


_LOWER: dict[type, Callable[..., None]] = {
    Call: _Planner.lower_call,
    Apply: _Planner.lower_apply,
    **dict.fromkeys((Read, Const, Param), _Planner.lower_source),
    **dict.fromkeys(EFFECTS, _Planner.lower_value),
    Log: _Planner.lower_log,
}


class _Linker:
    """Dependencies among live steps, in one pass in program order."""

    def __init__(self, plan: Plan, writers: dict[int, list[int]]) -> None:
        self.plan = plan
        self.writers = writers
        self.wrote: dict[int, int] = {}  # family -> its last write so far
        self.views: dict[int, list[int]] = {}  # family -> views made since then
        self.uses: dict[int, list[tuple[int, int]]] = {}  # family -> (step, slot) since then
        self.changed: dict[Site, int] = {}  # site -> its last write or fill so far

    def link(self, steps: list[Step]) -> None:
        plan = self.plan
        plan.steps = [None] * len(plan.graph.nodes)
        plan.waits = [0] * len(plan.graph.nodes)
        plan.left = [0] * len(plan.family)
        plan.count = len(steps)
        for step in steps:
            plan.steps[step.index] = step
        self.find_written(steps)
        for step in steps:
            self.link_values(step)
            if type(step.node) in _AT_SITES:
                self.link_site(step)
            self.add_waits(step)
        self.find_direct()

    def find_written(self, steps: list[Step]) -> None:
        plan = self.plan
        for family, writers in self.writers.items():
            alive = [index for index in writers if plan.steps[index] is not None]
            if alive:
                plan.written[family] = alive[-1]
        handed = {plan.family[s.uses[0]] for s in steps if type(s.node) in (Write, Fill)}
        if handed:
            plan.members = {family: [] for family in handed}
            for slot, family in enumerate(plan.family):
                if family in handed:
                    plan.members[family].append(slot)

    def link_values(self, step: Step) -> None:
        plan = self.plan
        for slot in step.uses:
            step.deps.add(plan.maker[slot])
            plan.left[slot] += 1
        if plan.written:
            self.link_versions(step)
        kind = type(step.node)
        if kind is Call:
            step.verify = self.must_verify(step)
            step.watch = self.may_be_models(step)
        elif kind is Read:
            step.watch = True
        elif kind is Save:
            step.clones = {slot for slot in step.uses if self.must_clone(slot, step.index)}

    def link_versions(self, step: Step) -> None:
        plan = self.plan
        writing = {plan.family[slot] for slot in step.targets}
        for slot in step.uses:
            family = plan.family[slot]
            if family in plan.written:
                if family in self.wrote:
                    step.deps.add(self.wrote[family])
                if family not in writing:
                    self.uses.setdefault(family, []).append((step.index, slot))
        for family in writing:
            step.deps.update(self.views.pop(family, ()))
            step.older = [*step.older, *self.uses.pop(family, ())]
            self.wrote[family] = step.index
        for slot in range(step.slot, step.slot + step.outs):
            if plan.family[slot] != slot:
                self.views.setdefault(plan.family[slot], []).append(step.index)
        step.deps.discard(step.index)

    def link_site(self, step: Step) -> None:
        site = step.node.site
        there = self.plan.sites.get(site)
        if there is None:
            there = self.plan.sites[site] = SitePlan()
        there.steps.append(step.index)
        if site in self.changed:
            step.deps.add(self.changed[site])
        if type(step.node) is not Read:
            there.effects.append(step.index)
            self.changed[site] = step.index
            self.plan.fills |= type(step.node) is Fill
        step.waits = 1

    def add_waits(self, step: Step) -> None:
        step.waits += len(step.deps)
        self.plan.waits[step.index] = step.waits
        for before in step.deps:
            self.plan.steps[before].kids.append(step.index)  # type: ignore[union-attr]

    # Storage

    def must_verify(self, step: Step) -> bool:
        """Whether sharing storage otherwise than recorded would change a number."""
        plan = self.plan
        family, exposed = plan.family, (plan.written, plan.members)
        if not (plan.written or plan.members):
            return False
        results = range(step.slot, step.slot + step.outs)
        return any(family[slot] in group for slot in results for group in exposed) or any(
            family[slot] in plan.written for slot in step.uses
        )

    def may_be_models(self, step: Step) -> bool:
        plan = self.plan
        results = range(step.slot, step.slot + step.outs)
        return any(type(plan.source(slot)) is Read for slot in results)

    def must_clone(self, slot: int, index: int) -> bool:
        plan = self.plan
        return plan.is_written_after(slot, index) or type(plan.source(slot)) in (Const, Param)

    def find_direct(self) -> None:
        """Reads whose edits may act on the model's own tensor.

        Nothing else of the graph touches the site, and the last fill comes after the last edit.
        """
        plan = self.plan
        for there in plan.sites.values():
            if not there.effects:
                continue
            steps: list[Any] = [plan.steps[index] for index in there.steps]
            edited = [s for s in steps if type(s.node) is Read and s.slot in plan.written]
            fills = [s for s in steps if type(s.node) is Fill]
            alone = len({s.node.leaf for s in steps}) == 1 and len(edited) == 1
            if alone and len(fills) == len(there.effects):
                source, last = edited[0], fills[-1]
                own = all(plan.family[fill.uses[0]] == source.slot for fill in fills)
                source.direct = own and plan.written[source.slot] < last.index


_AT_SITES = frozenset((Read, Write, Fill))
