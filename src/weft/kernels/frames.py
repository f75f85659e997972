"""Tensors as frames of bytes, and back: the form in which constants leave the process."""

from __future__ import annotations

import numpy as np
import torch

from weft.graph.frame import Frame

from .aval import dtype_name


def to_frame(tensor: torch.Tensor) -> Frame:
    """The bytes of a tensor, row-major. One copy: the frame is a view of memory of its own."""
    dense = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    dense.copy_(tensor.detach())
    return Frame(dtype_name(dense.dtype), tuple(dense.shape), _bytes_of(dense).data.toreadonly())


def to_tensor(frame: Frame) -> torch.Tensor:
    """A tensor that owns its memory and can be written, with a frame's bytes. One copy."""
    tensor = torch.empty(frame.shape, dtype=getattr(torch, frame.dtype), device="cpu")
    _bytes_of(tensor)[:] = np.frombuffer(frame.data, dtype=np.uint8)
    return tensor


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous tensor."""
    if not tensor.numel():
        return np.empty(0, np.uint8)
    return tensor.reshape(-1).view(torch.uint8).numpy()
