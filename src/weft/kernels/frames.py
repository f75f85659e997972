"""Tensors as frames of bytes, and back: the form in which constants leave the process."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from weft.graph.frame import Frame

from .aval import dtype_name


def to_frame(tensor: torch.Tensor) -> Frame:
    """The bytes of a tensor, row-major. One copy: the frame is a view of memory of its own."""
    dense = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    dense.copy_(tensor.detach())
    flat = dense.reshape(-1).view(torch.uint8)
    return Frame(dtype_name(dense.dtype), tuple(dense.shape), flat.numpy().data.toreadonly())


def to_tensor(frame: Frame) -> torch.Tensor:
    """A tensor that owns its memory and can be written, with a frame's bytes. One copy."""
    tensor = torch.empty(frame.shape, dtype=getattr(torch, frame.dtype), device="cpu")
    data = np.frombuffer(frame.data, dtype=np.uint8)
    if data.nbytes != tensor.nbytes:
        raise ValueError(f"{data.nbytes} bytes are no {frame.dtype}{list(frame.shape)}")
    # not through tensor.numpy(), after which a tensor can never be resized
    ctypes.memmove(tensor.data_ptr(), data.ctypes.data, data.nbytes)
    return tensor
