"""Small modules with the habits that make trouble, and the checks that every test shares."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

TOLERANCE = 1e-6
Pair = namedtuple("Pair", "first second")


class Chain(nn.Module):
    """A residual stream: `x + block(norm(x))`, `depth` times, then a head."""

    def __init__(self, depth: int = 4, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 5)
        self.calls: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self.blocks):
            self.calls.append(number)
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 2 * torch.tanh(self.linear(self.norm(x)))


class Does(nn.Module):
    """A module whose forward is the given function."""

    def __init__(self, function: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


@dataclass
class Record:
    hidden: torch.Tensor
    extra: Any = None


def example(rows: int = 2, length: int = 3, width: int = 8) -> torch.Tensor:
    return torch.randn(rows, length, width, generator=torch.Generator().manual_seed(1))


def hook_count(module: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(m, name)) for m in module.modules() for name in names)


@contextmanager
def hooked(*hooks: tuple[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Plain output hooks: the oracle. `hook(output)` may return a new output."""
    handles = [
        module.register_forward_hook(lambda m, a, out, hook=hook: hook(out))
        for module, hook in hooks
    ]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, atol=TOLERANCE * _size(expected), rtol=0)


def moved(edited: torch.Tensor, plain: torch.Tensor) -> None:
    """An edit must matter: by at least 100 times the tolerance."""
    assert (edited - plain).abs().max() > 100 * TOLERANCE * _size(plain)


def _size(tensor: torch.Tensor) -> float:
    return max(1.0, tensor.abs().max().item()) if tensor.numel() else 1.0
