"""Which tensors are weights: the storages of a module's parameters and buffers.

Walking a model takes longer than a small experiment, so the storages are remembered per module.
A hit is confirmed by a fresh walk, because freed memory is used again; a miss is believed while the
first and the last weight are where they were (`Module.to` moves all of them).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from weakref import WeakKeyDictionary

import torch


class Weights:
    """The storages of one module's weights."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.storages = {t.untyped_storage()._cdata for t in _tensors(module)}
        groups = [g for m in module.modules() for g in (m._parameters, m._buffers) if g]
        self._ends = [_End(groups[0]), _End(groups[-1])] if groups else []

    @property
    def device(self) -> torch.device | None:
        """Where the first weight is."""
        first = self._ends[0].tensor() if self._ends else None
        return None if first is None else first.device

    def is_current(self) -> bool:
        """Whether the weights seem to be where they were."""
        return all(end.is_current() for end in self._ends)


class _End:
    """One weight, to see whether the model was moved."""

    def __init__(self, group: Mapping[str, torch.Tensor | None]) -> None:
        self.group = group
        self.name = next(iter(group))
        self.address = self._address()

    def tensor(self) -> torch.Tensor | None:
        return self.group.get(self.name)

    def _address(self) -> int:
        tensor = self.tensor()
        return 0 if tensor is None else tensor.untyped_storage()._cdata

    def is_current(self) -> bool:
        return self._address() == self.address


_KNOWN: WeakKeyDictionary[torch.nn.Module, Weights] = WeakKeyDictionary()


def weights_of(module: torch.nn.Module) -> Weights:
    """The weights of a module, walked at most once while they stay."""
    known = _KNOWN.get(module)
    if known is None or not known.is_current():
        known = _KNOWN[module] = Weights(module)
    return known


def is_still_weight(where: int, module: torch.nn.Module) -> bool:
    """Whether a storage that once was a weight's is one now."""
    fresh = _KNOWN[module] = Weights(module)
    return where in fresh.storages


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
