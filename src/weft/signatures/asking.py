"""Asking: where the model is elsewhere, what no table covers is asked of whoever has it.

signatures = Signatures(lambda: stand_in, asker=asker)
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from weft.sources.listing import Listing

from .structure import put_together, take_apart


class Asker(Protocol):
    """Somebody who has the model. Answers are bytes of `tables`; called from several threads."""

    def signature(self, args: tuple, kwargs: dict) -> bytes:
        """What the sites look like for this call: `Signatures.answer`."""
        ...

    def inside(self, path: str, way: tuple[str, ...], args: tuple, kwargs: dict) -> bytes:
        """As `signature`, with the operations of a source: `Inside.answer`."""
        ...

    def source(self, path: str, way: tuple[str, ...], call: Any) -> tuple[Listing, tuple[str, ...]]:
        """A source, and the other modules for which it is the same."""
        ...

    def apply(self, path: str, args: tuple, kwargs: dict) -> bytes:
        """What the module at `path` gives for arguments with avals as tensors: `Rules.answer`."""
        ...


def at_hand(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a call that can travel: zeros where there are no numbers."""
    tree, _, leaves = take_apart((args, kwargs))
    return put_together(tree, [_with_numbers(leaf) for leaf in leaves])


def _with_numbers(leaf: Any) -> Any:
    is_empty = isinstance(leaf, torch.Tensor) and leaf.device.type == "meta"
    return torch.zeros(leaf.shape, dtype=leaf.dtype) if is_empty else leaf
