"""Drawing a graph of several invokes: one forward for each, in an order in which nobody waits.

Where the edits of invokes need each other, their forwards take turns (`weave`). One interpreter
runs all of it, so that a value of one invoke is simply there for another. Each forward is called
exactly as it would be alone, so its numbers are, to the bit, those that it gives alone.

    found = run_all(graph, constants, module, [((ids,), {}), ((others,), {})])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import Module

from weft.graph.node import Graph
from weft.graph.site import Leaf, Site

from .hooks import Drive, Results, normal_mode, run
from .interpreter import Interpreter
from .structure import mapped
from .turns import passes
from .watch import Watch
from .weave import Loom

Call = tuple[tuple[Any, ...], Mapping[str, Any]]


def run_all(
    graph: Graph,
    constants: Mapping[str, torch.Tensor],
    module: Module,
    calls: Sequence[Call],
    *,
    strict: bool = True,
    on_log: Callable[[str], None] | None = None,
    device: torch.device | str | None = None,
    overwritten: Callable[[Site, Leaf], bool] | None = None,
    watch: Watch | None = None,
) -> Results:
    """As `hooks.run`, with a call of the module for each invoke of the graph.

    An invoke without a site is not called. `Results.ended` is where the last forward could stop.
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
            device=device,
            overwritten=overwritten,
            watch=watch,
        )
    whole = Drive(graph, constants, module, strict, on_log or print, overwritten, watch)
    with torch.no_grad(), normal_mode():
        found = _Block(whole, calls).run()
    if device is not None:
        found.saved = mapped(found.saved, lambda tensor: tensor.to(device))
    return found


class _Block:
    """One run of several forwards."""

    def __init__(self, whole: Drive, calls: Sequence[Call]) -> None:
        self._whole = whole
        self._calls = calls

    def run(self) -> Results:
        interpreter = self._whole.interpreter
        ended = None
        try:
            interpreter.begin()
            for group in passes(interpreter.plan):
                ended = self._forward(group)
            return Results(interpreter.end(), None, ended)
        finally:
            del self._whole.interpreter  # it knows its host: no cycle may hold tensors

    def _forward(self, group: list[int]) -> Site | None:
        """Runs the forwards of these invokes; says where the last could stop."""
        parts = [Part(self._whole, [invoke], *self._calls[invoke]) for invoke in group]
        if len(parts) == 1:
            parts[0].call()
        else:
            Loom(parts).run()
        return parts[-1].ended


class Part(Drive):
    """The forward of one invoke, or of several that share it. `whole` has what all share."""

    def __init__(
        self, whole: Drive, invokes: Iterable[int], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.module = whole.module
        self.interpreter: Interpreter = whole.interpreter
        self.callers = whole.callers
        self.weights = whole.weights
        self.can_stop = True
        self.want_result = False
        self.error = None
        self.ended = None
        self._args, self._kwargs = args, kwargs
        self._invokes = frozenset(invokes)
        self._left = [site for site in self.interpreter.sites if site.invoke in self._invokes]
        self.pause: Callable[[Site], None] | None = None
        """Waits, at a site, until its edits can act."""

    def call(self) -> None:
        """The forward, from its begin to where nothing is left to do."""
        if not self.is_over():
            args, kwargs = self.guarded(self._args, dict(self._kwargs))
            self.forward(args, kwargs, None)

    def sites(self) -> Iterable[Site]:
        return self._left

    def is_over(self) -> bool:
        pending = self.interpreter.sites
        return not any(site in pending for site in self._left)

    def become(self, site: Site, structure: Any) -> Any:
        if self.pause is not None:
            self.pause(site)
        return self.interpreter.fire(site, structure)
