"""The steps at a site: reads, writes and fills, and what the model gets when they are done.

A read whose value is edited gets a private copy, which is copied back at the end. In the usual case
(`Step.direct`) it is the model's own tensor instead, and whatever else shares it is copied first.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch

from weft.errors import ReadOnlyError, SiteMismatchError, WriteMismatchError
from weft.graph.node import Call, Fill, Graph, Read, Skip
from weft.graph.site import RESULT, Leaf, Site, Where, leaf_text
from weft.kernels.aval import dtype_name

from .frame import Frame, Held
from .host import Host, Told
from .memory import Memory, storage
from .skips import held_by, output_of
from .steps import Plan, Step, line_of


class SiteSteps:
    """Runs the steps of one run that stand at sites."""

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        memory: Memory,
        host: Host,
        overwritten: Callable[[Site, Leaf], bool] | None,
    ) -> None:
        self.graph = graph
        self.plan = plan
        self._memory = memory
        self._host = host
        self._overwritten = overwritten
        # Families that act on the model's own tensor; whether all others are safe from that.
        # Once is enough: the site's later reads get copies (`_read_again`).
        self.direct: dict[int, bool] = {}

    def protect(self, slots: tuple[int, ...]) -> None:
        """Before a write into these slots: copies what shares a model's tensor with them."""
        for slot in slots:
            family = self.plan.family[slot]
            if self.direct.get(family) is False:
                self._memory.protect(self._memory.env[slot], family)
                self.direct[family] = True

    def _line(self, step: Step) -> Where | None:
        return line_of(self.graph, step.node)

    def line(self, index: int) -> Where | None:
        """The user's line of a step, by its number."""
        return line_of(self.graph, self.plan.nodes[index])

    def read(self, step: Step, frame: Frame) -> torch.Tensor:
        """What the leaf is at this place in the program."""
        held = frame.now.get(step.node.leaf) if frame.now else None
        return self._read_again(step, frame, held) if held else self._first_read(step, frame)

    def _first_read(self, step: Step, frame: Frame) -> torch.Tensor:
        leaf = step.node.leaf
        tensor = frame.structure
        if leaf or not isinstance(tensor, torch.Tensor):
            tensor = frame.own(leaf, self._line(step))
        self.check_type(step, tensor)
        changes = self._overwritten is not None and self._overwritten(frame.site, leaf)
        if step.slot not in self.plan.written:
            return tensor.clone() if changes else tensor
        direct = step.direct and not changes and tensor.is_contiguous()
        if not direct or self._host.is_weight(storage(tensor)):
            return tensor.clone()
        self.direct[step.slot] = False
        return tensor

    def _read_again(self, step: Step, frame: Frame, held: Held) -> torch.Tensor:
        plan, tensor = self.plan, held.tensor
        self.check_type(step, tensor)
        frame.lend(step.node.leaf)
        edited = step.slot in plan.written
        if edited or (held.slot is not None and plan.is_written_after(held.slot, step.index)):
            return tensor.clone()
        return tensor

    def check_type(self, step: Step, tensor: torch.Tensor) -> None:
        """Raises unless a read gives what was recorded, or on another input the same kind."""
        node, dtype = step.node, step.dtype
        if node.site.port == RESULT:  # a generation may end early
            return
        if tensor.shape == node.shape and tensor.dtype == dtype:
            return
        same_kind = _kind(tensor.dtype) == _kind(dtype) and tensor.dim() == len(node.shape)  # type: ignore[arg-type]
        if self.plan.strict or not same_kind:
            raise SiteMismatchError(
                f"{node.site}{leaf_text(node.leaf)} should be {node.dtype}{list(node.shape)}, "
                f"but is {type_text(tensor)}",
                line=self._line(step),
                fix="record the experiment on an input like this one",
            )

    def write(self, step: Step, frame: Frame) -> None:
        """Rebinds a leaf to a value, which is taken as it is now."""
        leaf = step.node.leaf
        slot = step.uses[0]
        value = self._memory.inputs(step)[slot]
        held = frame.now.get(leaf)
        present = held.tensor if held else frame.own(leaf, self._line(step))
        fitting = self._fitted(step, value, present)
        if self.plan.is_written_after(slot, step.index) and fitting is value:
            fitting = value.clone()
        frame.write(leaf, Held(fitting, slot if fitting is value else None))

    def _fitted(self, step: Step, value: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """`value` as the site needs it: its shape exactly, its floating dtype, its device."""
        both_floating = value.is_floating_point() and present.is_floating_point()
        if value.shape != present.shape or (value.dtype != present.dtype and not both_floating):
            raise WriteMismatchError(
                f"{step.node.site}{leaf_text(step.node.leaf)} is {type_text(present)}, "
                f"but {type_text(value)} is written to it",
                line=self._line(step),
                fix="write a tensor of its shape and kind of dtype",
            )
        if value.dtype is present.dtype and value.device == present.device:
            return value
        return value.to(device=present.device, dtype=present.dtype)

    def fill(self, step: Step, frame: Frame) -> None:
        """Makes an edited read the value of its leaf."""
        leaf = step.node.leaf
        slot = step.uses[0]
        value = self._memory.inputs(step)[slot]
        if self.plan.family[slot] in self.direct:
            frame.fill(leaf, Held(value, slot))  # it is the model's own tensor
            return
        own = frame.own(leaf, self._line(step))
        if leaf not in frame.rebound and self._host.is_weight(storage(own)):
            raise ReadOnlyError(
                f"{step.node.site}{leaf_text(leaf)} is a weight of the model; "
                "an edit in place would change it",
                line=self._line(step),
                fix="assign a new value to the site instead of editing it in place",
            )
        self._fitted(step, value, own)
        later = self.plan.is_written_after(slot, step.index) and not self._is_refilled(step)
        frame.fill(leaf, Held(value.clone(), None) if later else Held(value, slot))

    def _is_refilled(self, step: Step) -> bool:
        """Whether the next that happens to the leaf is another fill."""
        steps, node = self.plan.steps, step.node
        there = self.plan.sites[node.site].steps
        for place in range(bisect_right(there, step.index), len(there)):
            later: Any = steps[there[place]]
            if later.kind is not Skip and later.node.leaf == node.leaf:
                return later.kind is Fill
        return False

    def skip(self, step: Step, frame: Frame) -> None:
        """The module that is about to begin will give these values instead of running."""
        frame.skip = step
        frame.skipped = held_by(step, self._memory, self.plan)

    # The end of a firing

    def skipped(self, frame: Frame, told: Told | None) -> Any:
        """What the module gives instead of running."""
        handed: set[int] = set()
        step = frame.skip
        hand = lambda held: self._hand_over(held, handed, False)
        return output_of(step, frame, hand, told, self._line(step))

    def close(self, frame: Frame) -> Any:
        """What the model gets, once all steps of the site have run."""
        handed: set[int] = set()
        values = {
            leaf: self._hand_over(held, handed, leaf in frame.lent)
            for leaf, held in frame.rebound.items()
        }
        for leaf, value in frame.filled.items():
            try:
                self._fill_own(frame.own(leaf, None), value)
            except RuntimeError as error:
                error.add_note(f"in the edit of {frame.site}{leaf_text(leaf)} in place")
                raise
        return frame.result(values) if values else frame.structure

    def _hand_over(self, held: Held, handed: set[int], lent: bool) -> torch.Tensor:
        """A tensor for the model to do with as it likes."""
        tensor = held.tensor
        free = held.slot is None or self._is_free(held.slot, tensor)
        if lent or not free or storage(tensor) in handed:
            tensor = tensor.clone()
        handed.add(storage(tensor))
        return tensor

    def _is_free(self, slot: int, tensor: torch.Tensor) -> bool:
        """Whether the graph made this tensor and needs it no longer."""
        plan, family = self.plan, self.plan.family[slot]
        source = type(plan.source(slot))
        private = source is Read and family in plan.written and family not in self.direct
        made = source is Call or private
        memory = self._memory
        return made and not memory.is_needed(plan.members[family]) and not memory.is_shared(tensor)

    def _fill_own(self, own: torch.Tensor, value: torch.Tensor) -> None:
        if value is not own:
            self._memory.protect(own, None)
            own.copy_(value)


def type_text(tensor: torch.Tensor) -> str:
    """`float32[2, 3]`."""
    return f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "floating"
    if dtype.is_complex:
        return "complex"
    return "bool" if dtype is torch.bool else "integer"
