"""Drawing a graph through a generation: one forward after another, each a step of the graph.

What is called, and when it is over, a `Decoder` says (`families.decoding`); here its forwards are
called with the graph's hooks of their step. The forwards stop where nothing is left to do; a
generation whose ids nobody wants ends with the last step that is needed. With a `Sharer` those of
several invokes share forwards (`joined`).

    run_generations(graph, constants, module, [decoder])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.nn import Module

from weft.graph.node import Graph
from weft.graph.site import RESULT, Leaf, Site

from .hooks import Drive, Results, normal_mode
from .joined import Joined, Sharer, lanes
from .logs import OnValue
from .part import ModuleCall, Part
from .structure import mapped
from .watch import Watch
from .weave import Loom


class Decoder(Protocol):
    """One generation, forward by forward."""

    def begin(self) -> ModuleCall:
        """The call of the prompt's forward: step 0."""
        ...

    def next(self, output: Any) -> ModuleCall | None:
        """Takes what the forward gave; the call of the next step, or None where it is over."""
        ...

    @property
    def result(self) -> torch.Tensor:
        """Prompt and answer so far, `[batch, pos]`."""
        ...

    def close(self) -> None:
        """Lets go of what it holds: it is not asked again."""
        ...


def run_generations(
    graph: Graph,
    constants: Mapping[str, torch.Tensor],
    module: Module,
    decoders: Sequence[Decoder],
    *,
    strict: bool = True,
    on_log: Callable[[str], None] | None = None,
    on_value: OnValue | None = None,
    device: torch.device | str | None = None,
    overwritten: Callable[[Site, Leaf], bool] | None = None,
    watch: Watch | None = None,
    sharer: Sharer | None = None,
) -> Results:
    """As `invokes.run_all`, with a generation for each invoke of the graph.

    An invoke without a site is not generated. With a `sharer` those that it lets share forwards do;
    without, each has forwards exactly as alone. Values of steps that did not happen, because a
    generation was over before, are left out of what is saved.
    """
    whole = Drive(
        graph, constants, module, strict, on_log or print, overwritten, watch, on_value=on_value
    )
    with normal_mode(), whole.interpreter.mode(module):
        found = _run(whole, decoders, sharer)
    if device is not None:
        found.saved = mapped(found.saved, lambda tensor: tensor.to(device))
    return found


def _run(whole: Drive, decoders: Sequence[Decoder], sharer: Sharer | None) -> Results:
    interpreter = whole.interpreter
    ended = None
    try:
        interpreter.begin()
        for group, shared in lanes(interpreter.plan, decoders, sharer, whole.module):
            parts: list[Part] = [Turns(whole, invoke, decoders[invoke]) for invoke in group]
            if shared and sharer is not None:
                parts = [Joined(whole, group, decoders, sharer)]
            if len(parts) == 1:
                parts[0].call()
            else:
                Loom(parts).run()
            ended = parts[-1].ended
        return Results(interpreter.end(), None, ended)
    finally:
        whole.leave()
        for decoder in decoders:
            decoder.close()


class Turns(Part):
    """The forwards of one generation."""

    def __init__(self, whole: Drive, invoke: int, decoder: Decoder) -> None:
        super().__init__(whole, [invoke], (), {})
        self._decoder = decoder
        self._steps: dict[int, list[Site]] = {}
        self._result: Site | None = None
        for site in self._left:
            if site.port == RESULT:
                self._result = site
            else:
                self._steps.setdefault(site.step, []).append(site)
        self._now: list[Site] = []
        self._names = {invoke, None}
        self._stopped = False  # by a stop of the block

    def call(self) -> None:
        """All forwards, from the prompt's to where nothing is left to do."""
        if self.is_over():
            return
        call: ModuleCall | None = self._decoder.begin()
        step, last = 0, max(self._steps, default=-1)
        while call is not None and (self._result is not None or step <= last):
            self._now = self._steps.pop(step, [])
            self.can_stop = self._result is None and step == last
            self.want_result = not self.can_stop
            output = self._forward(call)
            if self._stopped:
                break
            if output is None:
                return
            call = self._decoder.next(output)
            del output
            step += 1
        self.interpreter.leave_out([site for sites in self._steps.values() for site in sites])
        if self._result is not None and self._result in self.open:
            self.become(self._result, self._decoder.result)

    def _forward(self, call: ModuleCall) -> Any:
        args, kwargs = call
        if not self._now:
            return self.module(*args, **kwargs)
        return self.forward(*self.guarded(args, dict(kwargs)), None)

    def become(self, site: Site, structure: Any) -> Any:
        structure = super().become(site, structure)
        if self.interpreter.stopped & self._names:
            self._stopped = self.can_stop = True
        return structure

    def is_over(self) -> bool:
        return self._stopped or not self.open

    def sites(self) -> list[Site]:
        return self._now
