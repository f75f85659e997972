"""Slices that only wait to be saved: they are cut out at once, and hold nothing but themselves.

A save of a list waits for the last of its tensors. Until then a view among them would keep alive
all that it is a view of: `weft.save([layer.output[:, -1] for layer in layers])` every layer's whole
output. A save copies a part of a tensor anyway; here it is copied earlier.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from weft.graph.node import Call, Save

from .steps import Plan, Step


def find_cuts(plan: Plan, steps: Sequence[Step]) -> None:
    """Tells steps which of their results are to be cut out: nobody but saves uses them, and what
    they are parts of does not change before."""
    saves = [step for step in steps if step.kind is Save]
    if not any(len(save.uses) > 1 for save in saves):
        return
    counts = Counter([slot for save in saves for slot in save.uses])
    for slot, count in counts.items():
        maker = plan.steps[plan.maker[slot]]
        if maker is None or maker.kind is not Call or plan.family[slot] == slot:
            continue
        if count == plan.left[slot] and not plan.is_written_after(slot, maker.index):
            maker.cuts = {*maker.cuts, slot}
            maker.verify = True


def cut(part: torch.Tensor) -> torch.Tensor:
    """`part`, without what it is a part of."""
    return part.clone() if part.untyped_storage().nbytes() > part.nbytes else part


def families(plan: Plan) -> list[int]:
    """The families of slots, where what is cut out is one of its own."""
    found = plan.family.copy()
    for step in plan.steps:
        if step is not None:
            for slot in step.cuts:
                found[slot] = slot
    return found
