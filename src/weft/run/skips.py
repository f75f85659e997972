"""Skips: modules that do not run in this call, whose output is a value of the graph.

A skip acts when the module is about to begin, after the reads and edits of its arguments. Then the
module's hooks fire as ever, so its output is a site like any other; only its `forward` is not
called: while a run with skips is on its way, a `sources.stand.StandIn` stands in the `forward` of
each module concerned. An operation inside a forward is skipped in the same way (`run.sources`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from msgspec.structs import replace
from torch.nn import Module

from weft.errors import GraphError, WriteMismatchError
from weft.graph.site import Leaf, Site, begin_port, leaf_text
from weft.sources.stand import NOTHING, Ask, stand_down, stand_in

from .frame import Frame, Held
from .host import Told
from .memory import Memory
from .steps import Plan, Step
from .structure import tensors

Hand = Callable[[Held], torch.Tensor]


def begin_of(site: Site) -> Site:
    """Where a module or an operation begins, of the site of its output."""
    return replace(site, port=begin_port(site.port))


# -- values --------------------------------------------------------------------------------------


def held_by(step: Step, memory: Memory, plan: Plan) -> list[Held]:
    """The values of a skip as they are at this place in the program."""
    env = memory.inputs(step)
    found = []
    for _, slot in step.args.slots:  # type: ignore[union-attr]
        value = env[slot]
        later = plan.is_written_after(slot, step.index)
        found.append(Held(value.clone(), None) if later else Held(value, slot))
    return found


def output_of(step: Step, frame: Frame, hand: Hand, told: Told | None, line: object) -> Any:
    """What the module gives in place of what it would: in its own structure, kinds and devices."""
    node = step.node
    device = next((tensor.device for tensor in tensors(frame.structure)), None)
    values = {leaf: hand(held) for leaf, held in zip(node.leaves, frame.skipped, strict=True)}
    signature = None if told is None else told.site(node.site)
    if signature is None:
        if tuple(values) != ((),):
            raise GraphError(
                f"the structure of {node.site} is not known",
                line=line,
                fix="record the experiment on this model",
            )
        return values[()]
    leaves = signature.leaves
    if [leaf for leaf, what in leaves if hasattr(what, "dtype")] != list(values):
        raise GraphError(
            f"a skip gives other tensors than {node.site} has",
            line=line,
            fix="record the experiment on this model",
        )
    found = [_leaf(node.site, leaf, what, values.get(leaf), device, line) for leaf, what in leaves]
    return signature.rebuild(found)


def _leaf(
    site: Site, leaf: Leaf, what: Any, value: Any, device: torch.device | None, line: object
) -> Any:
    if value is None:
        if not hasattr(what, "value"):
            raise GraphError(
                f"{site}{leaf_text(leaf)} is a {what}; a graph cannot make it",
                line=line,
                fix="skip the modules inside it instead",
            )
        return what.value
    floating = value.is_floating_point() and what.dtype.is_floating_point
    if tuple(value.shape) != tuple(what.shape) or (value.dtype != what.dtype and not floating):
        raise WriteMismatchError(
            f"{site}{leaf_text(leaf)} is {what!r}, but {str(value.dtype)[6:]}{list(value.shape)} "
            "is given for it",
            line=line,
            fix="give a tensor of its shape and kind of dtype",
        )
    return value.to(device=device or value.device, dtype=what.dtype)


# -- modules -------------------------------------------------------------------------------------


class Skipping:
    """The modules that one forward may skip. `calls` are its hooks, by path."""

    def __init__(self, calls: Mapping[str, Any], told: Told | None) -> None:
        self._calls = calls
        self._told = told
        self._skips: dict[int, list[tuple[Any, dict[int, Site]]]] = {}
        self._modules: list[tuple[Module, Ask]] = []

    def add(self, module: Module, path: str, sites: Mapping[int, Site], ask: Ask) -> None:
        """Calls of a module, by number, that may be skipped."""
        self._skips.setdefault(id(module), []).append((self._calls[path], dict(sites)))
        stand_in(module, ask)
        self._modules.append((module, ask))

    def remove(self) -> None:
        while self._modules:
            stand_down(*self._modules.pop())

    def instead(self, module: Module, given: dict[Site, Any]) -> Any:
        """What the call of a module that has just begun is to give; or `NOTHING`."""
        for calls, sites in self._skips.get(id(module), ()):
            site = sites.get(calls.current)
            if site in given:
                self.pass_over(site)
                return given.pop(site)
        return NOTHING

    def pass_over(self, skipped: Site) -> None:
        """Counts the calls that would have happened inside, so that later ones keep their names."""
        inside = {} if self._told is None else self._told.inside(skipped)
        for path, count in inside.items():
            if path in self._calls:
                self._calls[path].started += count
