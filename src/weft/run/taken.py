"""Sites that are only read and saved: nothing is scheduled there, and nothing remembered.

What a `Read` gives is kept for its one `Save` as a copy, which no later change of the model's own
tensor can reach. That costs less than to watch the tensor, as long as it is small; a large one goes
the usual way, where it is shared with the model if nobody changes it.

    saves = take(plan.sites[site].taken, ...)    # None where more than that happens at the site
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from weft.graph.node import Read, Save
from weft.graph.site import Leaf, Site

from .frame import Frame
from .memory import Memory
from .steps import Plan, SitePlan, Step

if TYPE_CHECKING:
    from .firing import SiteSteps

SMALL = 1 << 16
"""Bytes up to which a copy costs less than what a shared tensor needs."""


class Take(NamedTuple):
    """One tensor of a site, and the save that wants it."""

    read: int
    slot: int
    leaf: Leaf
    shape: tuple[int, ...]
    dtype: torch.dtype
    save: int


Takes = Sequence[Take]


def take(
    takes: Takes, site: Site, structure: Any, waits: list[int], memory: Memory, at: SiteSteps
) -> list[int]:
    """Keeps what stands at a site that fires; gives the saves that wait for nothing any more."""
    ready = []
    for index, slot, leaf, shape, dtype, save in takes:
        tensor = structure
        if leaf or not isinstance(tensor, torch.Tensor):
            tensor = Frame(site, structure).own(leaf, at.line(index))
        if tensor.shape != shape or tensor.dtype != dtype:
            at.check_type(at.plan.steps[index], tensor)  # type: ignore[arg-type]
        memory.env[slot] = tensor.clone()
        waits[index] = 0
        waits[save] -= 1
        if not waits[save]:
            ready.append(save)
    return ready


def mark_taken(plan: Plan) -> None:
    """Finds the sites of a plan that are only read and saved."""
    slots: list[int] = []
    for site, there in plan.sites.items():
        if not (there.effects or there.follow):
            there.taken = takes = _takes(plan, there)
            slots += [take.slot for take in takes or ()]
            whole = takes is not None and len(takes) == 1 and not takes[0].leaf
            if whole and site.port == "output":
                plan.quick[site] = takes[0]  # type: ignore[index]
    plan.taken = frozenset(slots)


def _takes(plan: Plan, there: SitePlan) -> Takes | None:
    found = []
    for index in there.steps:
        step: Any = plan.steps[index]
        save = _only_save(plan, step)
        if save is None:
            return None
        node = step.node
        found.append(Take(index, step.slot, node.leaf, node.shape, step.dtype, save.index))
    return tuple(found)


def _only_save(plan: Plan, step: Step) -> Step | None:
    """The save that is all that a read is for."""
    if step.kind is not Read or step.waits != 1 or step.bounds or len(step.kids) != 1:
        return None
    slot = step.slot
    if slot in plan.written or plan.left[slot] != 1 or step.follows or step.captures:
        return None
    if prod(step.node.shape) * step.dtype.itemsize > SMALL:  # type: ignore[union-attr]
        return None
    save: Any = plan.steps[step.kids[0]]
    return save if save.kind is Save and slot not in save.clones else None
