"""What a step waits for, and which storage must be watched: one pass over the needed steps.

A write into a family of slots starts a new version of it, and program order decides which version
a use means:

- a use after a write waits for the write; a view made before it is waited for by the write;
- a use before a write that has not run when the write is about to run gets a copy (`Step.older`):
  the write does not wait, or a legal edit would become late.

Steps of one site keep program order by themselves: steps that are ready run in program order, and
a write or fill that is not ready when its site fires is late, which is an error.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

from weft.graph.node import Backward, Call, Const, Fill, Param, Read, Save, Skip, Stop, Write
from weft.graph.site import RESULT

from .cuts import find_cuts
from .gradlink import link_backward, link_followed
from .skips import begin_of
from .steps import Plan, SitePlan, Step
from .taken import mark_taken

_AT_SITES = frozenset((Read, Write, Fill, Skip))
_OTHERS = frozenset((Const, Param))  # whose storage is not ours to give away


class Linker:
    """Dependencies among live steps, in one pass in program order."""

    def __init__(self, plan: Plan, writers: dict[int, list[int]]) -> None:
        self.plan = plan
        self.writers = writers
        self.wrote: dict[int, int] = {}  # family -> its last write so far
        self.views: dict[int, list[int]] = {}  # family -> views made since then
        self.uses: dict[int, list[tuple[int, int]]] = {}  # family -> (step, slot) since then

    def link(self, steps: list[Step]) -> None:
        plan = self.plan
        count = len(plan.nodes)
        plan.steps = [None] * count
        plan.waits = [0] * count
        plan.left = [0] * len(plan.family)
        plan.count = len(steps)
        for step in steps:
            plan.steps[step.index] = step
        self.find_written(steps)
        for step in steps:
            if step.kind is Backward:
                link_backward(plan, step, self.writers)
            self.link_values(step)
            if step.kind in _AT_SITES:
                self.link_site(step)
            elif step.kind is Stop:
                self.link_stop(step)
            self.add_waits(step)
        if not plan.backwards:
            find_cuts(plan, steps)
        if plan.fills:
            self.find_direct()
        if plan.backwards:
            link_followed(plan)
        mark_taken(plan)

    def find_written(self, steps: list[Step]) -> None:
        plan = self.plan
        for family, writers in self.writers.items():
            alive = [index for index in writers if plan.steps[index] is not None]
            if alive:
                plan.written[family] = alive[-1]
        for step in steps:
            if step.kind is Write or step.kind is Fill or step.kind is Skip:
                plan.members.update([(plan.family[slot], []) for slot in step.uses])
        if plan.members:
            for slot, family in enumerate(plan.family):
                if family in plan.members:
                    plan.members[family].append(slot)

    def link_values(self, step: Step) -> None:
        plan, kind = self.plan, step.kind
        for slot in step.uses:
            step.deps.add(plan.maker[slot])
            plan.left[slot] += 1
        if plan.written:
            self.link_versions(step)
        if kind is Read:
            step.watch = True
        elif kind is Call:
            step.verify = bool(plan.written or plan.members) and self.must_verify(step)
            step.watch = bool(step.sources) and self.may_be_models(step)
        elif kind is Save:
            step.clones = [slot for slot in step.uses if self.must_clone(slot, step.index)]

    def link_versions(self, step: Step) -> None:
        """Waits for earlier writes; before a write, for the views made since the last one."""
        family, written, index = self.plan.family, self.plan.written, step.index
        writing = {family[slot] for slot in step.targets} if step.targets else ()
        for slot in step.uses:
            touched = family[slot]
            if touched in written:
                if touched in self.wrote:
                    step.deps.add(self.wrote[touched])
                if touched not in writing:
                    self.uses.setdefault(touched, []).append((index, slot))
        for touched in writing:
            step.deps.update(self.views.pop(touched, ()))
            older = self.uses.pop(touched, ())
            step.older = [*step.older, *[use for use in older if use[0] not in step.deps]]
            self.wrote[touched] = index
        for slot, source in enumerate(step.sources, step.slot):
            if source is not None:
                self.views.setdefault(family[slot], []).append(index)

    def link_site(self, step: Step) -> None:
        site, index = step.node.site, step.index
        if step.kind is Skip:
            self.plan.skips[site] = site = begin_of(site)
        there = self.plan.sites.get(site)
        if there is None:
            there = self.plan.sites[site] = SitePlan()
        there.steps.append(index)
        if step.kind is not Read:
            there.effects.append(index)
            self.plan.fills |= step.kind is Fill
        step.waits = 1

    def link_stop(self, step: Step) -> None:
        """Waits for all that stands before it at sites of its invoke, up to its own step."""
        meant, until, steps = step.node.invoke, step.node.step, self.plan.steps
        for index in range(step.index - 1, -1, -1):
            other = steps[index]
            if other is None:
                continue
            if until is None and other.kind is Stop and other.node.invoke == meant:
                step.deps.add(other.index)  # that one waits for all before
                break
            if other.kind not in _AT_SITES or meant not in (None, other.node.site.invoke):
                continue
            site = other.node.site
            if until is None or (site.step <= until and site.port != RESULT):  # it is for the ids
                step.deps.add(other.index)

    def add_waits(self, step: Step) -> None:
        steps: list[Any] = self.plan.steps
        if step.of >= 0:
            backward = steps[step.node.backward]
            step.deps.add(backward.index)
            backward.arrivals.append(step.index)
        step.waits += len(step.deps)
        self.plan.waits[step.index] = step.waits
        for before in step.deps:
            if step.of < 0 or before != step.node.backward:
                steps[before].kids.append(step.index)

    # Storage

    def must_verify(self, step: Step) -> bool:
        """Whether sharing storage otherwise than recorded would change a number."""
        family, written, members = self.plan.family, self.plan.written, self.plan.members
        for slot in range(step.slot, step.slot + step.outs):
            if family[slot] in written or family[slot] in members:
                return True
        return step.outs > 0 and any(family[slot] in written for slot in step.uses)

    def may_be_models(self, step: Step) -> bool:
        results = range(step.slot, step.slot + step.outs)
        return any(type(self.plan.source(slot)) is Read for slot in results)

    def must_clone(self, slot: int, index: int) -> bool:
        plan = self.plan
        return plan.is_written_after(slot, index) or type(plan.source(slot)) in _OTHERS

    def find_direct(self) -> None:
        """Reads whose edits may act on the model's own tensor (see `is_direct`)."""
        for there in self.plan.sites.values():
            steps: list[Any] = [self.plan.steps[index] for index in there.steps]
            edited = [s for s in steps if s.kind is Read and s.slot in self.plan.written]
            if there.effects and len(edited) == 1:
                edited[0].direct = self.is_direct(edited[0], steps)

    def is_direct(self, source: Step, steps: list[Any]) -> bool:
        """Nobody can tell it from an edit of a copy that is copied back at the end.

        All other steps of the site are fills with this value, the last of them after the last
        edit, and reads of the same leaf that do not stand between an edit and its fill.
        """
        family, leaf = source.slot, source.node.leaf
        fills = [s.index for s in steps if s.kind is Fill and self.plan.family[s.uses[0]] == family]
        others = [s.index for s in steps if s.kind is Read and s is not source]
        if len(fills) + len(others) + 1 < len(steps) or any(s.node.leaf != leaf for s in steps):
            return False
        if not fills or self.plan.written[family] > fills[-1]:
            return False
        return not any(self.is_unfilled(family, fills, index) for index in others)

    def is_unfilled(self, family: int, fills: list[int], index: int) -> bool:
        """Whether at this place in the program an edit has no fill yet."""
        return _last(self.writers[family], index) > _last(fills, index)


def _last(rising: list[int], before: int) -> int:
    """The last of rising numbers that is below another one."""
    place = bisect_left(rising, before)
    return rising[place - 1] if place else -1
