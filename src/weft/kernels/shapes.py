"""Shape rules for the operations that torch cannot run on meta tensors.

Each gives a meta tensor of the shape and dtype that the real function gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def cov(
    input: Tensor, *, correction: int = 1, fweights: Any = None, aweights: Any = None
) -> Tensor:
    """`[n, m]` gives `[n, n]`; one variable gives a number."""
    x = input.reshape(1, -1) if input.ndim < 2 else input
    for weights in (fweights, aweights):
        x = x if weights is None else x * weights
    x = x * 1.0
    return (x @ x.mT).squeeze()


def corrcoef(input: Tensor) -> Tensor:
    return cov(input)


SHAPES: dict[str, Callable[..., Any]] = {"cov": cov, "corrcoef": corrcoef}
