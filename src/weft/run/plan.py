"""Graph -> Plan: what each node waits for, which storage it touches, and how long it is needed.

Results of nodes live in *slots*, numbered in program order. Slots whose tensors share one storage,
as recorded, form a *family*, named by its first slot (a read, constant, weight, applied module or
fresh result). Only steps that an effect needs are kept. `link` finds what each of them waits for.
A plan holds no tensor and can be run many times.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from weft.errors import GraphError, ReadOnlyError
from weft.graph.frame import ITEM_SIZES
from weft.graph.gradients import partners
from weft.graph.loops import unrolled
from weft.graph.node import (
    EFFECTS,
    AnyNode,
    Apply,
    Backward,
    Bound,
    Call,
    Const,
    Grad,
    Graph,
    Log,
    Param,
    Read,
    Ref,
    Regrad,
    Skip,
    Stop,
)
from weft.graph.ops import OPS, RANDOM, is_effect
from weft.kernels.execute import MAKERS
from weft.kernels.table import FUNCTIONS

from .link import Linker
from .logs import logs_in_order
from .lower import Args, lower
from .steps import Plan, Step, line_of

# What a call calls: None where it also needs a key or a device.
CALLED = {
    name: None if OPS[name].kind in RANDOM | MAKERS else function
    for name, function in FUNCTIONS.items()
}
_EFFECTS = frozenset(EFFECTS)
_DTYPES = {name: getattr(torch, name) for name in ITEM_SIZES}


def plan(graph: Graph, strict: bool = True) -> Plan:
    """The plan of a checked graph. Raises `ReadOnlyError` where it writes into a weight.

    The same experiment on another input has the same nodes, so its plan is found again.
    """
    key = _ENCODER.encode((strict, graph.nodes, () if strict else graph.bounds))
    found = _PLANS.pop(key, None) or _Planner(unrolled(graph), strict).plan()
    if len(found.nodes) <= _NODES_KEPT:
        _PLANS[key] = found  # now the youngest
        while len(_PLANS) > _PLANS_KEPT:
            _PLANS.popitem(last=False)
    return found


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
        self.backwards = False  # whether there are any

    def plan(self) -> Plan:
        for index, node in enumerate(self.graph.nodes):
            self.lower(index, node)
        if not self.result.strict:
            for bound in self.graph.bounds:
                self.bounds.setdefault(bound.value.node, []).append(bound)
        live = self.live(set())
        if self.backwards:
            while not all(live[n] for n in self.partners(live)):
                live = self.live(self.partners(live))
        Linker(self.result, self.writers).link([s for s in self.steps if live[s.index]])
        self.result.logs = logs_in_order(self.result)
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
        if is_effect(node.op):
            step.changes = tuple(self.first(step, node))
        self.add_slots(step, node.outs)
        if node.alias:
            self.add_views(step, node)
        if node.writes:
            self.add_writes(step, node)

    def first(self, step: Step, node: Call) -> list[int]:
        """The slot that an operation in place changes: its first argument, however it is given."""
        if node.args and isinstance(node.args[0], Ref):
            return [self.base[node.args[0].node] + node.args[0].out]
        return list(step.uses)

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
        step.changes = tuple({*step.changes, *step.targets})

    def no_such(self, node: Call) -> GraphError:
        message = f"there is no operation {node.op!r} in this version of torch"
        return GraphError(
            message,
            line=line_of(self.graph, node),
            fix="run it with the version of torch that it was recorded with, or record it again",
        )

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
        lower(node.after, self.base, step.uses)

    def lower_skip(self, step: Step, node: Skip) -> None:
        step.args = Args(node.values, (), self.base, step.uses)

    def lower_stop(self, step: Step, node: Stop) -> None:
        step.value = lower(node.condition, self.base, step.uses)

    # Gradients

    def lower_backward(self, step: Step, node: Backward) -> None:
        self.backwards = True
        step.asked = []
        seeds = node.seeds or (None,) * len(node.losses)
        pairs = zip(node.losses, seeds, strict=True)
        step.losses = tuple([(self.slot(one), seed and self.slot(seed)) for one, seed in pairs])
        step.uses = [slot for pair in step.losses for slot in pair if slot is not None]

    def lower_gradient(self, step: Step, node: Grad | Regrad) -> None:
        self.steps[node.backward].asked.append(step.index)  # type: ignore[attr-defined]
        step.of = self.slot(node.of)
        if isinstance(node, Regrad):
            step.uses = [self.slot(node.value)]
        else:
            self.add_slots(step, 1)

    def slot(self, ref: Ref) -> int:
        return self.base[ref.node] + ref.out

    def add_slots(self, step: Step, count: int) -> None:
        step.outs = count
        self.result.family += range(step.slot, step.slot + count)
        self.result.maker += [step.index] * count

    # Liveness

    def partners(self, live: bytearray) -> set[int]:
        """What gradients among live nodes need beside their arguments."""
        return partners(self.graph.nodes, {n for n, is_live in enumerate(live) if is_live})

    def live(self, asked: set[int]) -> bytearray:
        """Which nodes an effect (or, on another input, a size to check) needs; and those asked."""
        live = bytearray(len(self.steps))
        used: set[int] = set()  # families that a later live node uses
        family, maker, bounds = self.result.family, self.result.maker, self.bounds
        for step in reversed(self.steps):
            index = step.index
            if bounds and index in bounds:
                step.bounds = bounds[index]
            elif not live[index] and index not in asked and not self.is_wanted(step, used):
                continue
            live[index] = 1
            for slot in step.uses if step.of < 0 else (*step.uses, step.of):
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
    Skip: _Planner.lower_skip,
    Stop: _Planner.lower_stop,
    Backward: _Planner.lower_backward,
    Grad: _Planner.lower_gradient,
    Regrad: _Planner.lower_gradient,
}
