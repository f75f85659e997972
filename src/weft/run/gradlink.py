"""What a backward waits for, and of what each of its gradients is the gradient.

A tensor that is edited in place has a history for each of its versions. A gradient is that of the
version which the value has where the backward stands: it is *captured* right after the last step
before the backward that writes into it, or else after the one that made it.

So that the run follows what is done with a tensor, it needs a history itself (`Step.follows`): a
weight and a client tensor get one where they enter, a tensor of the model at its site, any other
result where it is made.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

from weft.graph.node import Param, Read, Regrad, Write

from .steps import Plan, SitePlan, Step


def link_backward(plan: Plan, step: Step, writers: dict[int, list[int]]) -> None:
    """Makes a live backward need, and wait for, what its live gradients are gradients of."""
    steps: list[Any] = plan.steps
    plan.backwards.append(step.index)
    step.arrivals = []
    asked = [steps[index] for index in step.asked if steps[index] is not None]
    step.taps = any(one.kind is Regrad for one in asked)
    for slot in dict.fromkeys([one.of for one in asked]):
        _capture(plan, step, slot, writers)
    for one in asked:
        if one.kind is Regrad:
            _wait_for_what_it_brings(plan, step, one)
    step.uses = list(dict.fromkeys([*step.uses, *[one.of for one in asked]]))
    for site in step.node.since:
        plan.sites.setdefault(site, SitePlan()).follow = True


def _capture(plan: Plan, step: Step, slot: int, writers: dict[int, list[int]]) -> None:
    steps: list[Any] = plan.steps
    maker = steps[plan.maker[slot]]
    maker.follows = {*maker.follows, slot}
    if maker.kind is Param:
        plan.params.append(maker.node.path)
    last = _last_writer(plan, slot, step.index, writers)
    at = maker if last is None else steps[last]
    at.captures = [*at.captures, (step.index, slot)]
    step.deps.add(at.index)


def _last_writer(plan: Plan, slot: int, before: int, writers: dict[int, list[int]]) -> int | None:
    alive = [n for n in writers.get(plan.family[slot], ()) if plan.steps[n] is not None]
    place = bisect_left(alive, before)
    return alive[place - 1] if place and alive[place - 1] > plan.maker[slot] else None


def _wait_for_what_it_brings(plan: Plan, step: Step, regrad: Step) -> None:
    """What a replaced gradient needs beside gradients must be there when the backward starts."""
    steps: list[Any] = plan.steps
    waiting, seen = [plan.maker[slot] for slot in regrad.uses], set()
    while waiting:
        index = waiting.pop()
        if index in seen:
            continue
        seen.add(index)
        if index < step.index:
            step.deps.add(index)
        elif steps[index].of < 0:
            waiting += [plan.maker[slot] for slot in steps[index].uses]


def link_followed(plan: Plan) -> None:
    """What is written to a site is followed where a later read of that site is."""
    steps: list[Any] = plan.steps
    for there in plan.sites.values():
        written: dict[Any, int] = {}  # leaf -> the slot that it holds
        for index in there.steps:
            step = steps[index]
            if step.kind is Write:
                written[step.node.leaf] = step.uses[0]
            elif step.kind is Read and step.follows and step.node.leaf in written:
                slot = written[step.node.leaf]
                maker = steps[plan.maker[slot]]
                maker.follows = {*maker.follows, slot}
