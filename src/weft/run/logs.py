"""What `tracer.log(...)` shows, and in which order; what `tracer.stream(...)` hands out.

A value is put into words when it exists, and held as text until its turn has come: lines come in
the order of the program, in a generation those of each invoke step by step. The length of a line
does not depend on how large its values are. What is streamed waits for no turn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch

from weft.graph.node import Log
from weft.graph.site import Site

from .steps import Plan

OnValue = Callable[[Log, tuple[Any, ...]], None]
"""Who is told what a log hands out: its node, and its parts."""

_HELD = 1 << 20
"""Characters that may wait for their turn; with more of them nothing waits any longer."""


class Lines:
    """The lines of one run. `order`: the nodes that have one."""

    def __init__(self, order: Sequence[int], on_log: Callable[[str], None]) -> None:
        self._left = list(reversed(order))  # what is to be said yet, the next one last
        self._on_log = on_log
        self._held: dict[int, str] = {}
        self._size = 0
        self._skipped: set[int] = set()
        self._waits = True

    def say(self, index: int, parts: Iterable[Any]) -> None:
        """The parts of a line are there."""
        text = " ".join(map(log_text, parts))
        self._held[index] = text
        self._size += len(text)
        self._go_on()
        if self._size > _HELD or not self._waits:
            self.close()
            self._waits = False

    def skip(self, indices: Collection[int]) -> None:
        """These lines will never come."""
        self._skipped.update(indices)
        self._go_on()

    def close(self) -> None:
        """Says all that waits."""
        for index in self._left[::-1]:
            self._say(index)

    def _go_on(self) -> None:
        left = self._left
        while left and (left[-1] in self._held or left[-1] in self._skipped):
            self._say(left.pop())

    def _say(self, index: int) -> None:
        text = self._held.pop(index, None)
        if text is not None:
            self._size -= len(text)
            self._on_log(text)


def logs_in_order(plan: Plan) -> tuple[int, ...]:
    """The nodes that print, in the order in which they shall."""
    logs = [s for s in plan.steps if s is not None and s.kind is Log and s.node.stream is None]
    if not any(site.step for site in plan.sites):
        return tuple([step.index for step in logs])
    place = _places(plan)
    found, last = [], (0, 0)
    for step in logs:
        last = place[step.index] or last  # what is of no step belongs to the line above it
        found.append((*last, step.index))
    return tuple([index for *_, index in sorted(found)])


def _places(plan: Plan) -> list[tuple[int, int] | None]:
    """Of each node: invoke and step of the latest site that it is made of."""
    place: list[tuple[int, int] | None] = [None] * len(plan.nodes)
    for step in plan.steps:
        if step is None:
            continue
        site = getattr(step.node, "site", None)
        made_of = [place[plan.maker[slot]] for slot in step.uses]
        known = [one for one in made_of if one is not None]
        if site is not None:
            known.append((site.invoke, site.step))
        place[step.index] = max(known, default=None)
    return place


def unreached(plan: Plan, sites: Iterable[Site]) -> set[int]:
    """The nodes that print, and never will where these sites do not fire."""
    waiting = [index for site in sites for index in plan.sites[site].steps]
    found = set(waiting)
    while waiting:
        step: Any = plan.steps[waiting.pop()]
        for kid in step.kids:
            if kid not in found:
                found.add(kid)
                waiting.append(kid)
    return found.intersection(plan.logs)


def log_text(part: Any) -> str:
    """One part of a log."""
    if isinstance(part, torch.Tensor):
        return _tensor(part.detach())
    if isinstance(part, (tuple, list)):
        inner = ", ".join([log_text(item) for item in part])
        return f"[{inner}]" if isinstance(part, list) else f"({inner})"
    if isinstance(part, dict):
        return "{" + ", ".join([f"{key!r}: {log_text(item)}" for key, item in part.items()]) + "}"
    return str(part)


def handed(part: Any) -> Any:
    """One part of what is streamed, as it is now."""
    if isinstance(part, torch.Tensor):
        return part.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(part, (tuple, list)):
        items = [handed(item) for item in part]
        return items if isinstance(part, list) else tuple(items)
    if isinstance(part, dict):
        return {key: handed(item) for key, item in part.items()}
    return part


_FEW = 1000
"""PyTorch shows every number of a tensor up to so many, and some along each dimension beyond."""
_DEEP = 4


def _tensor(tensor: torch.Tensor) -> str:
    if tensor.dim() == 0:
        return str(tensor.item())
    above = tensor.dim() - _DEEP
    if tensor.numel() <= _FEW or above <= 0:
        return str(tensor.cpu())
    first = tensor[(0,) * above]  # six numbers along each of many dimensions would be a book
    return f"{list(tensor.shape)}, at {[0] * above}: {first.cpu()}"
