"""Graph -> Plan: what each node waits for, which storage it touches, and how long it is needed.

Results of nodes live in *slots*, numbered in program order. Slots whose tensors share one storage,
as recorded, form a *family*, named by its first slot (a read, constant, weight, applied module or
fresh result). A write into a family starts a new version of it; program order decides which
version a use means:

- a use after a write waits for the write; a view made before it is waited for by the write;
- a use before a write that has not run when the write is about to run gets a copy (`Step.older`):
  the write does not wait, or a legal edit would become late.

Steps of one site keep program order by themselves: steps that are ready run in program order, and
a write or fill that is not ready when its site fires is late, which is an error.
Only steps that an effect needs are kept. The plan holds no tensor and can be run many times.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec
import torch

from weft.errors import GraphError, ReadOnlyError
from weft.graph.frame import ITEM_SIZES
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

# What a call calls: None where it also needs a key or a device.
CALLED = {
    name: None if OPS[name].kind in RANDOM | MAKERS else function
    for name, function in FUNCTIONS.items()
}
_EFFECTS = frozenset(EFFECTS)
_OTHERS = frozenset((Const, Param))  # whose storage is not ours to give away
_AT_SITES = frozenset((Read, Write, Fill))
_DTYPES = {name: getattr(torch, name) for name in ITEM_SIZES}


class Step:
    """One node, lowered."""

    outs = 0
    waits = 0  # what it waits for: its deps, and its site
    args: Args | None = None
    function: Callable[..., Any] | None = None  # None: it needs more than its arguments
    value: tuple[Any, Hole] = (None, None)  # of a save; for a write or fill, its slot
    dtype: torch.dtype | None = None
    targets: tuple[int, ...] = ()  # slots that it writes into
    sources: tuple[int | None, ...] = ()  # of each result: the slot whose storage it shares
    bounds: Sequence[Bound] = ()
    older: Sequence[tuple[int, int]] = ()  # (step, slot) to copy, if waiting, before it writes
    clones: Collection[int] = ()  # slots that a save must copy
    direct = False  # a read whose edits may act on the model's own tensor
    watch = False  # its results may be the model's own tensors
    verify = False  # shared storage must be as recorded

    def __init__(self, index: int, node: AnyNode, slot: int) -> None:
        self.index = index
        self.node: Any = node
        self.kind = type(node)
        self.slot = slot  # of the first result
        self.uses: list[int] = []  # slots that it needs, each once
        self.deps: set[int] = set()  # steps that run before it
        self.kids: list[int] = []  # steps that wait for it


class SitePlan:
    """The steps of one site in program order, and those among them that change it."""

    __slots__ = ("effects", "steps")

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.effects: list[int] = []


class Plan:
    """What `Interpreter` runs. See the module's text."""

    __slots__ = (
        "count",
        "family",
        "fills",
        "nodes",
        "left",
        "maker",
        "members",
        "sites",
        "steps",
        "strict",
        "waits",
        "written",
    )

    def __init__(self, nodes: tuple[AnyNode, ...], strict: bool) -> None:
        self.nodes = nodes
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

    def source(self, slot: int) -> AnyNode:
        """The node whose result owns the storage of a slot."""
        return self.nodes[self.maker[self.family[slot]]]

    def is_written_after(self, slot: int, index: int) -> bool:
        """Whether a later node than `index` writes into the storage of a slot."""
        return self.written.get(self.family[slot], -1) > index


def plan(graph: Graph, strict: bool = True) -> Plan:
    """The plan of a checked graph. Raises `ReadOnlyError` where it writes into a weight.

    The same experiment on another input has the same nodes, so its plan is found again.
    """
    key = _ENCODER.encode((strict, graph.nodes, () if strict else graph.bounds))
    found = _PLANS.pop(key, None) or _Planner(graph, strict).plan()
    if len(graph.nodes) <= _NODES_KEPT:
        _PLANS[key] = found  # now the youngest
        while len(_PLANS) > _PLANS_KEPT:
            _PLANS.popitem(last=False)
    return found


def line_of(graph: Graph, node: AnyNode | Bound) -> Where | None:
    """The user's line of a node."""
    return graph.where[node.at] if node.at < len(graph.where) else None


_ENCODER = msgspec.msgpack.Encoder()
_PLANS: OrderedDict[bytes, Plan] = OrderedDict()
_PLANS_KEPT = 64
_NODES_KEPT = 4096


class _Planner:
    def __init__(self, graph: Graph, strict: bool) -> None:
        self.graph = graph
        self.result = Plan(graph.nodes, strict)
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
        step.function = CALLED.get(node.op, _unknown)
        if step.function is _unknown:
            raise self.no_such(node)
        self.add_slots(step, node.outs)
        if node.alias:
            self.add_views(step, node)
        if node.writes:
            self.add_writes(step, node)

    def add_views(self, step: Step, node: Call) -> None:
        base, family = self.base, self.result.family
        step.sources = tuple(
            [None if ref is None else base[ref.node] + ref.out for ref in node.alias]
        )
        for slot, source in enumerate(step.sources, step.slot):
            if source is not None:
                family[slot] = family[source]

    def add_writes(self, step: Step, node: Call) -> None:
        family = self.result.family
        step.targets = tuple([self.base[ref.node] + ref.out for ref in node.writes])
        for slot in step.targets:
            self.refuse_weight(family[slot], node)
            self.writers.setdefault(family[slot], []).append(step.index)

    def no_such(self, node: Call) -> GraphError:
        message = f"there is no operation {node.op!r} in this version of torch"
        return GraphError(message, line=line_of(self.graph, node))

    def refuse_weight(self, family: int, node: Call) -> None:
        source = self.result.source(family)
        if type(source) is Param:
            raise ReadOnlyError(
                f"torch.{node.op} would write into the weight {source.path!r}",
                line=line_of(self.graph, node),
                fix="edit a copy: take .clone() first",
            )

    def lower_apply(self, step: Step, node: Apply) -> None:
        step.args = Args(node.args, node.kwargs, self.base, step.uses)
        self.add_slots(step, node.outs)

    def lower_source(self, step: Step, node: Read | Const | Param) -> None:
        step.dtype = _DTYPES[node.dtype]
        self.add_slots(step, 1)

    def lower_value(self, step: Step, node: Any) -> None:
        step.value = lower(node.value, self.base, step.uses)

    def lower_log(self, step: Step, node: Log) -> None:
        step.args = Args(node.parts, (), self.base, step.uses)

    def add_slots(self, step: Step, count: int) -> None:
        step.outs = count
        self.result.family += range(step.slot, step.slot + count)
        self.result.maker += [step.index] * count

    # Liveness

    def live(self) -> bytearray:
        """Which nodes an effect (or, on another input, a size to check) needs."""
        live = bytearray(len(self.steps))
        used: set[int] = set()  # families that a later live node uses
        family, maker, bounds = self.result.family, self.result.maker, self.bounds
        for step in reversed(self.steps):
            index = step.index
            if bounds and index in bounds:
                step.bounds = bounds[index]
            elif not live[index] and not self.is_wanted(step, used):
                continue
            live[index] = 1
            for slot in step.uses:
                live[maker[slot]] = 1
                used.add(family[slot])
        return live

    def is_wanted(self, step: Step, used: set[int]) -> bool:
        """Whether a step changes something: the model, the outside, or a value used later."""
        if step.kind in _EFFECTS:
            return True
        return bool(step.targets) and any(self.result.family[slot] in used for slot in step.targets)


def _unknown() -> None:
    """Stands for an operation that this version of torch lacks."""


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

    def link(self, steps: list[Step]) -> None:
        plan = self.plan
        count = len(plan.nodes)
        plan.steps = [None] * count
        plan.waits = [0] * count
        plan.left = [0] * len(plan.family)
        plan.count = len(steps)
        for step in steps:
            plan.steps[step.index] = step
        self.find_written(steps)
        for step in steps:
            self.link_values(step)
            if step.kind in _AT_SITES:
                self.link_site(step)
            self.add_waits(step)
        if plan.fills:
            self.find_direct()

    def find_written(self, steps: list[Step]) -> None:
        plan = self.plan
        for family, writers in self.writers.items():
            alive = [index for index in writers if plan.steps[index] is not None]
            if alive:
                plan.written[family] = alive[-1]
        for step in steps:
            if step.kind is Write or step.kind is Fill:
                plan.members[plan.family[step.uses[0]]] = []
        if plan.members:
            for slot, family in enumerate(plan.family):
                if family in plan.members:
                    plan.members[family].append(slot)

    def link_values(self, step: Step) -> None:
        plan, kind = self.plan, step.kind
        for slot in step.uses:
            step.deps.add(plan.maker[slot])
            plan.left[slot] += 1
        if plan.written:
            self.link_versions(step)
        if kind is Read:
            step.watch = True
        elif kind is Call:
            step.verify = bool(plan.written or plan.members) and self.must_verify(step)
            step.watch = bool(step.sources) and self.may_be_models(step)
        elif kind is Save:
            step.clones = [slot for slot in step.uses if self.must_clone(slot, step.index)]

    def link_versions(self, step: Step) -> None:
        """Waits for earlier writes; before a write, for the views made since the last one."""
        family, written, index = self.plan.family, self.plan.written, step.index
        writing = {family[slot] for slot in step.targets} if step.targets else ()
        for slot in step.uses:
            touched = family[slot]
            if touched in written:
                if touched in self.wrote:
                    step.deps.add(self.wrote[touched])
                if touched not in writing:
                    self.uses.setdefault(touched, []).append((index, slot))
        for touched in writing:
            step.deps.update(self.views.pop(touched, ()))
            older = self.uses.pop(touched, ())
            step.older = [*step.older, *[use for use in older if use[0] not in step.deps]]
            self.wrote[touched] = index
        for slot, source in enumerate(step.sources, step.slot):
            if source is not None:
                self.views.setdefault(family[slot], []).append(index)

    def link_site(self, step: Step) -> None:
        site, index = step.node.site, step.index
        there = self.plan.sites.get(site)
        if there is None:
            there = self.plan.sites[site] = SitePlan()
        there.steps.append(index)
        if step.kind is not Read:
            there.effects.append(index)
            self.plan.fills |= step.kind is Fill
        step.waits = 1

    def add_waits(self, step: Step) -> None:
        steps: list[Any] = self.plan.steps
        step.waits += len(step.deps)
        self.plan.waits[step.index] = step.waits
        for before in step.deps:
            steps[before].kids.append(step.index)

    # Storage

    def must_verify(self, step: Step) -> bool:
        """Whether sharing storage otherwise than recorded would change a number."""
        family, written, members = self.plan.family, self.plan.written, self.plan.members
        for slot in range(step.slot, step.slot + step.outs):
            if family[slot] in written or family[slot] in members:
                return True
        return step.outs > 0 and any(family[slot] in written for slot in step.uses)

    def may_be_models(self, step: Step) -> bool:
        results = range(step.slot, step.slot + step.outs)
        return any(type(self.plan.source(slot)) is Read for slot in results)

    def must_clone(self, slot: int, index: int) -> bool:
        plan = self.plan
        return plan.is_written_after(slot, index) or type(plan.source(slot)) in _OTHERS

    def find_direct(self) -> None:
        """Reads whose edits may act on the model's own tensor (see `is_direct`)."""
        for there in self.plan.sites.values():
            steps: list[Any] = [self.plan.steps[index] for index in there.steps]
            edited = [s for s in steps if s.kind is Read and s.slot in self.plan.written]
            if there.effects and len(edited) == 1:
                edited[0].direct = self.is_direct(edited[0], steps)

    def is_direct(self, source: Step, steps: list[Any]) -> bool:
        """Nobody can tell it from an edit of a copy that is copied back at the end.

        All other steps of the site are fills with this value, the last of them after the last
        edit, and reads of the same leaf that do not stand between an edit and its fill.
        """
        family, leaf = source.slot, source.node.leaf
        fills = [s.index for s in steps if s.kind is Fill and self.plan.family[s.uses[0]] == family]
        others = [s.index for s in steps if s.kind is Read and s is not source]
        if len(fills) + len(others) + 1 < len(steps) or any(s.node.leaf != leaf for s in steps):
            return False
        if not fills or self.plan.written[family] > fills[-1]:
            return False
        return not any(self.is_unfilled(family, fills, index) for index in others)

    def is_unfilled(self, family: int, fills: list[int], index: int) -> bool:
        """Whether at this place in the program an edit has no fill yet."""
        last = max([fill for fill in fills if fill < index], default=-1)
        return any(last < write < index for write in self.writers[family])
