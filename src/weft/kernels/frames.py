"""Tensors as frames of bytes, and back: the form in which constants leave the process."""

from __future__ import annotations

import torch

from weft.graph.frame import Frame

from .aval import dtype_name


def to_frame(tensor: torch.Tensor) -> Frame:
    """The bytes of a dense tensor, row-major."""
    dense = tensor.detach().to("cpu").contiguous()
    data = dense.reshape(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b""
    return Frame(dtype_name(dense.dtype), tuple(dense.shape), data)


def to_tensor(frame: Frame) -> torch.Tensor:
    """A tensor of its own with a frame's bytes."""
    dtype = getattr(torch, frame.dtype)
    if not frame.data:
        return torch.empty(frame.shape, dtype=dtype)
    flat = torch.frombuffer(bytearray(frame.data), dtype=torch.uint8)
    return flat.view(dtype).reshape(frame.shape)
