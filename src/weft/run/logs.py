"""What `tracer.log(...)` shows: text whose length does not depend on how large the values are."""

from __future__ import annotations

from typing import Any

import torch

_FEW = 1000
"""PyTorch shows every number of a tensor up to so many, and some along each dimension beyond."""
_DEEP = 4


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


def _tensor(tensor: torch.Tensor) -> str:
    if tensor.dim() == 0:
        return str(tensor.item())
    above = tensor.dim() - _DEEP
    if tensor.numel() <= _FEW or above <= 0:
        return str(tensor.cpu())
    first = tensor[(0,) * above]  # six numbers along each of many dimensions would be a book
    return f"{list(tensor.shape)}, at {[0] * above}: {first.cpu()}"
