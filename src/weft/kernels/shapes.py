"""Shape rules for the operations that torch cannot run on meta tensors, or not strictly.

Each takes and gives meta tensors, of the shape and dtype that the real function gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def cov(
    input: Tensor, *, correction: int = 1, fweights: Any = None, aweights: Any = None
) -> Tensor:
    """`[n, m]` gives `[n, n]`; one variable gives a number."""
    x = input.reshape(1, -1) if input.ndim < 2 else input
    for weights in (fweights, aweights):
        if weights is None:
            continue
        if weights.shape != x.shape[1:]:
            raise RuntimeError(f"cov(): expected one weight for each of {x.shape[1]} observations")
        x = x * weights
    x = x * 1.0
    return (x @ x.mT).squeeze()


def corrcoef(input: Tensor) -> Tensor:
    return cov(input)


def like(input: Tensor, *_: Any, **__: Any) -> Tensor:
    """Shape, strides and dtype of the first argument."""
    return torch.empty_like(input)


def binomial(count: Tensor, prob: Tensor) -> Tensor:
    return count.new_empty((count + prob).shape)


def setitem(tensor: Tensor, index: Any, value: Any) -> None:
    """On meta tensors, torch lets a value of any shape pass where a tensor is the index."""
    if isinstance(value, Tensor):
        target = tensor[index]
        while value.ndim > target.ndim and value.shape[0] == 1:
            value = value.squeeze(0)
        value = value.expand(target.shape)
    tensor[index] = value


def index_put(tensor: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Tensor:
    _put(tensor, indices, values)
    return torch.index_put(tensor, indices, values, accumulate)


def index_put_(tensor: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Tensor:
    _put(tensor, indices, values)
    return tensor.index_put_(indices, values, accumulate)


def _put(tensor: Tensor, indices: Any, values: Tensor) -> None:
    """The check that torch leaves out on meta tensors."""
    values.expand(tensor[tuple(slice(None) if i is None else i for i in indices)].shape)


SHAPES: dict[str, Callable[..., Any]] = {
    "binomial": binomial,
    "corrcoef": corrcoef,
    "cov": cov,
    "fake_quantize_per_channel_affine": like,
    "fake_quantize_per_tensor_affine": like,
    "index_put": index_put,
    "index_put_": index_put_,
    "Tensor.__setitem__": setitem,
}
