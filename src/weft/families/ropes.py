"""Rotary embeddings that follow the length: they keep state on the model, which is put back.

Beyond some length the forward of such a model exchanges its rotary frequencies. That is right while
one generation goes on, and must not be found there by the next one. Two generations of such a model
cannot take turns step by step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def moving_ropes(net: nn.Module) -> list[nn.Module]:
    """The rotary modules that change with the length of the input."""
    return [one for one in net.modules() if any(map(_moves, _kinds(one)))]


def _kinds(module: nn.Module) -> list[Any]:
    kind = getattr(module, "rope_type", None)
    return list(kind.values()) if isinstance(kind, dict) else [kind]


def _moves(kind: Any) -> bool:
    """Source: `dynamic_rope_update` in transformers 5.23, `modeling_rope_utils.py`."""
    return isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")


@contextmanager
def ropes_kept(net: nn.Module) -> Iterator[None]:
    """Rotary modules afterwards are as they were, in numbers too."""
    spaces: list[dict[str, Any]] = []
    for one in moving_ropes(net):
        spaces += [vars(one), one._buffers]
    saved = [(space, dict(space)) for space in spaces]
    tensors = [t for space in spaces for t in space.values() if isinstance(t, Tensor)]
    numbers = [(tensor, tensor.clone()) for tensor in tensors]
    try:
        yield
    finally:
        for space, was in saved:
            for name in [name for name in space if name not in was]:
                del space[name]
            space.update(was)
        for tensor, value in numbers:
            tensor.copy_(value)
