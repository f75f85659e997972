"""Counts the bytes of tensors that are alive, at each operation of this thread."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Within it, every storage that an operation makes is counted until nobody has it.

    `peak` is the most at any operation. Meta tensors have no bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(one) for one in tree_leaves((args, kwargs)) if _counts(one)}
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if _counts(one) and _key(one) not in given:
                storage = one.untyped_storage()
                self._live[_key(one)] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        """Bytes that are alive."""
        self._live = {key: kept for key, kept in self._live.items() if not kept[0].expired()}
        return sum(size for _, size in self._live.values())

    def left(self) -> int:
        """Bytes that are alive when garbage has been collected."""
        gc.collect()
        return self.now()


def _counts(one: Any) -> bool:
    return isinstance(one, torch.Tensor) and one.device.type != "meta"


def _key(one: torch.Tensor) -> int:
    return one.untyped_storage()._cdata
