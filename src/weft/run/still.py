"""Weights that do not ask for gradients while a run follows its values.

    with still(net) as weights:
        weights.wake(net.lm_head.weight)      # but this one

Nothing is kept for a weight whose gradient nobody wants, and none lands in `param.grad`. Several
runs may be under way that share weights: a weight asks as it did before when the last of them is
over, however it ends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch.nn import Module


class _Held:
    """One weight that runs hold: whether it asked before, and how many runs there are."""

    __slots__ = ("runs", "tensor", "was")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.was = tensor.requires_grad
        self.runs = 0


_LOCK = threading.Lock()
_HELD: dict[int, _Held] = {}  # by the id of the tensor, which is kept alive
_GROUPS: WeakKeyDictionary[Module, list[dict[str, torch.nn.Parameter | None]]] = WeakKeyDictionary()
"""Where a module's weights stand. One in a module that was added since is not still: that costs
memory while it runs, and changes no number."""


class Still:
    """The weights that one run holds."""

    def __init__(self) -> None:
        self._mine: list[_Held] = []

    def begin(self, module: Module) -> None:
        for weight in _weights(module):
            if weight.requires_grad or id(weight) in _HELD:
                self._hold(weight).tensor.requires_grad_(False)

    def wake(self, tensor: torch.Tensor) -> None:
        """Makes one tensor of the module ask for its gradient until the last run is over."""
        if tensor.is_leaf and (tensor.is_floating_point() or tensor.is_complex()):
            with _LOCK:
                self._hold(tensor).tensor.requires_grad_(True)

    def end(self) -> None:
        for held in self._mine:
            held.runs -= 1
            if not held.runs:
                held.tensor.requires_grad_(held.was)
                del _HELD[id(held.tensor)]
        self._mine.clear()

    def _hold(self, tensor: torch.Tensor) -> _Held:
        held = _HELD.get(id(tensor))
        if held is None:
            held = _HELD[id(tensor)] = _Held(tensor)
        held.runs += 1
        self._mine.append(held)
        return held


def _weights(module: Module) -> Iterator[torch.Tensor]:
    groups = _GROUPS.get(module)
    if groups is None:
        groups = _GROUPS[module] = [m._parameters for m in module.modules() if m._parameters]
    for group in groups:
        for weight in group.values():
            if weight is not None and weight.is_leaf:
                yield weight


@contextmanager
def still(module: Module) -> Iterator[Still]:
    """Inside, gradients are followed, and the module's weights ask for none."""
    mine = Still()
    try:
        with _LOCK:
            mine.begin(module)
        with torch.enable_grad():
            yield mine
    finally:
        with _LOCK:
            mine.end()
