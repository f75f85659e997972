"""Late edits: an edit that needs a value which exists only after the edited site has passed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from weft.errors import LateEditError, NotReachedError, WeftError
from weft.graph.node import Call, Graph
from weft.graph.site import Site

from .steps import Plan, line_of


def late_edit(
    graph: Graph, plan: Plan, waits: list[int], index: int, left_out: Collection[Site] = ()
) -> WeftError:
    """The error for an edit whose site has fired while it still waits, with both lines."""
    step: Any = plan.steps[index]
    blocker: Any = plan.steps[_blocker(plan, waits, index)]
    if getattr(blocker.node, "site", None) in left_out:
        return NotReachedError(
            f"the edit of {step.node.site} needs {blocker.node.site}, before which a stop ends "
            f"the pass\n  the other line: {line_of(graph, blocker.node)}",
            line=line_of(graph, step.node),
            fix="move the stop below all that is needed",
        )
    source = blocker.node.site if hasattr(blocker.node, "site") else what(blocker.node)
    return LateEditError(
        f"the edit of {step.node.site} needs {source}, which comes only later\n"
        f"  the later value: {line_of(graph, blocker.node)}",
        line=line_of(graph, step.node),
        fix="edit a site that comes after all that the edit needs",
    )


def late_gradient(graph: Graph, plan: Plan, waits: list[int], index: int) -> LateEditError:
    """The error for a gradient that has flowed on while what is to replace it is not there yet."""
    step: Any = plan.steps[index]
    blocker: Any = plan.steps[_blocker(plan, waits, index)]
    return LateEditError(
        f"a gradient is replaced with a value that needs {what(blocker.node)}, which comes only "
        f"later in the backward\n  the later value: {line_of(graph, blocker.node)}",
        line=line_of(graph, step.node),
        fix="make it of gradients that arrive before: of values later in the forward pass",
    )


def _blocker(plan: Plan, waits: list[int], index: int) -> int:
    """The first step in the way: it waits for its own site only."""
    while True:
        step: Any = plan.steps[index]
        waiting = [before for before in step.deps if waits[before]]
        if not waiting:
            return index
        index = min(waiting)


def what(node: Any) -> str:
    """A node, for messages: `torch.mul`."""
    if isinstance(node, Call):
        return f"torch.{node.op}"
    return f"the {type(node).__name__.lower()} of {getattr(node, 'path', 'a value')}"
