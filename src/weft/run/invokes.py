"""Drawing a graph of several invokes: one forward for each, in an order in which nobody waits.

Where the edits of invokes need each other, their forwards take turns (`weave`). One interpreter
runs all of it, so that a value of one invoke is simply there for another. Each forward is called
exactly as it would be alone, so its numbers are, to the bit, those that it gives alone; with a
`Merger` several may share one (`rows`).

    found = run_all(graph, constants, module, [((ids,), {}), ((others,), {})])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import Module

from weft.graph.node import (
    Apply,
    Call,
    Const,
    Fill,
    Graph,
    Guard,
    Log,
    Param,
    Read,
    Save,
    Write,
)
from weft.graph.site import Leaf, Site

from .hooks import Drive, Results, normal_mode, run
from .logs import OnValue
from .part import ModuleCall, Part
from .rows import Lot, Merger, SharedPart, is_mixed, lots
from .steps import Plan
from .structure import mapped
from .turns import passes
from .watch import Watch
from .weave import Loom


def run_all(
    graph: Graph,
    constants: Mapping[str, torch.Tensor],
    module: Module,
    calls: Sequence[ModuleCall],
    *,
    strict: bool = True,
    on_log: Callable[[str], None] | None = None,
    on_value: OnValue | None = None,
    device: torch.device | str | None = None,
    overwritten: Callable[[Site, Leaf], bool] | None = None,
    watch: Watch | None = None,
    merger: Merger | None = None,
    grad: bool = False,
) -> Results:
    """As `hooks.run`, with a call of the module for each invoke of the graph.

    An invoke without a site is not called. With a `merger` those that it lets share a forward do.
    `Results.ended` is where the last forward could stop.
    """
    if len(calls) == 1:
        args, kwargs = calls[0]
        return run(
            graph,
            constants,
            module,
            args,
            kwargs,
            strict=strict,
            on_log=on_log,
            on_value=on_value,
            device=device,
            overwritten=overwritten,
            watch=watch,
            grad=grad,
        )
    whole = Drive(
        graph, constants, module, strict, on_log or print, overwritten, watch, grad, on_value
    )
    with normal_mode(), whole.interpreter.mode(module):
        found = _Block(whole, calls, merger).run()
    if device is not None:
        found.saved = mapped(found.saved, lambda tensor: tensor.to(device))
    return found


MERGED = frozenset((Read, Write, Fill, Call, Apply, Param, Const, Guard, Save, Log))
"""Nodes that mean the same where a forward is shared. A gradient is of one's own forward."""


def is_plain(plan: Plan) -> bool:
    """Whether all that a graph does means the same where its forward is shared."""
    return not is_mixed(plan) and all(s is None or s.kind in MERGED for s in plan.steps)


def forwards(
    plan: Plan, calls: Sequence[ModuleCall], merger: Merger | None, module: Module
) -> Sequence[list[int] | Lot]:
    """The forwards of a run, in order: lots, and groups whose forwards take turns."""
    groups = passes(plan)
    if merger is None or len({site.invoke for site in plan.sites}) < 2:
        return groups
    if not is_plain(plan):
        return groups
    return lots(plan, groups, calls, merger, module)


class _Block:
    """One run of several forwards."""

    def __init__(self, whole: Drive, calls: Sequence[ModuleCall], merger: Merger | None) -> None:
        self._whole = whole
        self._calls = calls
        self._merger = merger

    def run(self) -> Results:
        interpreter = self._whole.interpreter
        ended = None
        try:
            interpreter.begin()
            for group in self._forwards():
                ended = self._forward(group)
            return Results(interpreter.end(), None, ended)
        finally:
            self._whole.leave()

    def _forwards(self) -> Sequence[list[int] | Lot]:
        """The forwards to run, in order."""
        whole = self._whole
        return forwards(whole.interpreter.plan, self._calls, self._merger, whole.module)

    def _forward(self, group: list[int] | Lot) -> Site | None:
        """Runs the forwards of these invokes; says where the last could stop."""
        if isinstance(group, Lot):
            part = SharedPart(self._whole, group)
            part.call()
            return part.ended
        parts = [Part(self._whole, [invoke], *self._calls[invoke]) for invoke in group]
        if len(parts) == 1:
            parts[0].call()
        else:
            Loom(parts).run()
        return parts[-1].ended
