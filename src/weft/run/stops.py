"""Stops: what a pass that a block has ended brings back all the same.

Whatever the model fires after a stop is left out; what needs it never runs. Of a save of several
values those that were reached come back, with None in the place of the others; a save of which
nothing was reached is not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from weft.errors import GraphError
from weft.graph.node import Arg, Map, Ref, Save, Seq, Stop
from weft.graph.site import RESULT, Site

from .lower import Env
from .memory import Memory
from .steps import Plan, Step


def stops(step: Step, memory: Memory, line: object) -> bool:
    """Whether a stop that runs now ends the pass."""
    if step.node.condition is None:
        return True
    tensor = memory.inputs(step)[step.uses[0]]
    if tensor.numel() != 1:
        raise GraphError(
            f"a stop depends on one number, not on {tensor.numel()}",
            line=line,
            fix="use .any() or .all()",
        )
    return bool(tensor)


def left_out(node: Stop, pending: Iterable[Site]) -> dict[Site, None]:
    """The sites that will not fire. A generation that is stopped still has its ids."""
    mine = [site for site in pending if node.invoke in (None, site.invoke)]
    return {site: None for site in mine if node.step is None or site.port != RESULT}


def reached(plan: Plan, waits: list[int], memory: Memory) -> Iterator[tuple[Step, Env]]:
    """The saves that still wait, with what there is of each."""
    for step in plan.steps:
        if step is None or step.kind is not Save or not waits[step.index]:
            continue
        env = memory.inputs(step)
        older = env if env is not memory.env else {}
        there = [s for s in step.uses if s in env and _is_final(plan, waits, step, s, older)]
        if there and _is_plain(step.node.value):
            kept: Env = dict.fromkeys(step.uses)  # type: ignore[arg-type]
            kept.update({slot: env[slot].detach().clone() for slot in there})
            yield step, kept


def _is_final(plan: Plan, waits: list[int], step: Step, slot: int, older: Env) -> bool:
    """Whether a value is the version that the save means.

    What goes back into a tensor of the client's, who was to see each write, may be any version.
    """
    if step.node.name.startswith("<") or slot in older:
        return True
    family = plan.family[slot]
    writes = [n for n in step.deps if waits[n] and _writes(plan, n, family)]
    return not writes


def _writes(plan: Plan, index: int, family: int) -> bool:
    step: Any = plan.steps[index]
    return any(plan.family[target] == family for target in step.targets)


def _is_plain(arg: Arg) -> bool:
    """Whether a value has its tensors in containers only, so that some of them may be missing."""
    waiting: list[Any] = [arg]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Seq):
            waiting += part.items
        elif isinstance(part, Map):
            waiting += part.values
        elif not isinstance(part, (Ref, type(None), bool, int, float, str)):
            return False
    return True
