"""Random functions that take no generator, written with one that do.

Each draws the numbers that torch's function draws from a generator in the same state (on the CPU),
except `rrelu`, which draws for every element. None works in place.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import leaky_relu

ALPHA = 1.7580993408473766  # of SELU: what alpha dropout sets dropped elements to, negated


def rand_like(generator: Generator, input: Tensor, **options: Any) -> Tensor:
    return torch.empty_like(input, **options).uniform_(generator=generator)


def randn_like(generator: Generator, input: Tensor, **options: Any) -> Tensor:
    return torch.empty_like(input, **options).normal_(generator=generator)


def randint_like(
    generator: Generator, input: Tensor, low: int, high: int | None = None, **options: Any
) -> Tensor:
    low, high = (0, low) if high is None else (low, high)
    return torch.empty_like(input, **options).random_(low, high, generator=generator)


def dropout(
    generator: Generator,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if p == 0 or not training or not input.numel():
        return input
    return input * _kept(generator, torch.empty_like(input), p)


def dropout1d(
    generator: Generator,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    return _channels(generator, input, p, training, batched=input.ndim == 3)


def dropout2d(
    generator: Generator,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    return _channels(generator, input, p, training, batched=True)


def dropout3d(
    generator: Generator,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    return _channels(generator, input, p, training, batched=input.ndim == 5)


def _channels(
    generator: Generator, input: Tensor, p: float, training: bool, batched: bool
) -> Tensor:
    """Drops whole channels: of `[batch, channel, ...]`, or of `[channel, ...]`."""
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if p == 0 or not training or not input.numel():
        return input
    leading = input.shape[: 2 if batched else 1]
    noise = input.new_empty([*leading, *[1] * (input.ndim - len(leading))])
    return input * _kept(generator, noise, p)


def _kept(generator: Generator, noise: Tensor, p: float) -> Tensor:
    """Zeros where elements are dropped, `1 / (1 - p)` elsewhere."""
    if p == 1:
        return noise.zero_()
    return noise.bernoulli_(1 - p, generator=generator).div_(1 - p)


def alpha_dropout(
    generator: Generator, input: Tensor, p: float = 0.5, training: bool = False,
    inplace: bool = False,
) -> Tensor:  # fmt: skip
    """Self-normalizing Neural Networks (arXiv:1706.02515): keeps mean and variance."""
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if p == 0 or not training or not input.numel():
        return input
    if p == 1:
        return input * torch.zeros_like(input)
    a = 1 / sqrt((ALPHA * ALPHA * p + 1) * (1 - p))
    noise = torch.empty_like(input).bernoulli_(1 - p, generator=generator)
    b = noise.add(-1).mul_(ALPHA * a).add_(ALPHA * a * p)
    return input * noise.mul_(a) + b


def rrelu(
    generator: Generator, input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3,
    training: bool = False, inplace: bool = False,
) -> Tensor:  # fmt: skip
    if not training:
        return leaky_relu(input, (lower + upper) / 2)
    slope = torch.empty_like(input).uniform_(lower, upper, generator=generator)
    return torch.where(input <= 0, input * slope, input)


def gumbel_softmax(
    generator: Generator, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10,
    dim: int = -1,
) -> Tensor:  # fmt: skip
    noise = torch.empty_like(logits, memory_format=torch.legacy_contiguous_format)
    gumbels = -noise.exponential_(generator=generator).log()
    soft = ((logits + gumbels) / tau).softmax(dim)
    if not hard:
        return soft
    index = soft.max(dim, keepdim=True)[1]
    return torch.zeros_like(logits).scatter_(dim, index, 1.0) - soft.detach() + soft


def binomial(generator: Generator, count: Tensor, prob: Tensor) -> Tensor:
    """NaN where the count is NaN, for which torch's own function never returns."""
    unknown = count.isnan()
    drawn = torch.binomial(count.masked_fill(unknown, 0), prob, generator=generator)
    return drawn.masked_fill_(unknown, float("nan"))


DRAWS: dict[str, Callable[..., Tensor]] = {
    "binomial": binomial,
    "rand_like": rand_like,
    "randn_like": randn_like,
    "randint_like": randint_like,
    "nn.functional.dropout": dropout,
    "nn.functional.dropout1d": dropout1d,
    "nn.functional.dropout2d": dropout2d,
    "nn.functional.dropout3d": dropout3d,
    "nn.functional.alpha_dropout": alpha_dropout,
    "nn.functional.rrelu": rrelu,
    "nn.functional.gumbel_softmax": gumbel_softmax,
}
