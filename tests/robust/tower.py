"""A small model to be unkind to, what an experiment must leave as it was, and plain hooks.

tower.embed -> 3 blocks (mix, mlp on a residual) -> norm -> head;  ids [batch, pos] -> logits
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from weft.run.hooks import _RUNNING
from weft.testing.same import bitwise
from weft.trace.current import CURRENT

LAYERS, WIDTH, VOCAB = 3, 8, 11


class Mix(nn.Module):
    """Each position sees the mean of those before it; returns `(mixed, weights)`."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = h.new_ones(h.shape[1], h.shape[1]).tril()
        weights = weights / weights.sum(-1, keepdim=True)
        return weights @ self.value(h), weights


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = Mix()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = h + self.mix(h)[0]
        return h + self.mlp(h)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def tower() -> Tower:
    """The same weights at every call; the global random state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tower().eval()


def prompt(length: int = 5, batch: int = 2) -> torch.Tensor:
    """`[batch, length]`, other ids for other lengths."""
    draw = torch.Generator().manual_seed(length)
    return torch.randint(VOCAB, (batch, length), generator=draw)


def remember(name: str, text: str) -> None:
    """Makes the lines of a text known under a file name, as notebooks do with their cells."""
    linecache.cache[name] = (len(text), None, [*text.splitlines(True)], name)


# --- what must be left as it was ------------------------------------------------------------------

_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def hooks(net: nn.Module) -> int:
    """How many hooks stand on a model and all that is in it."""
    return sum(len(getattr(module, table)) for module in net.modules() for table in _TABLES)


def surroundings() -> dict[str, Any]:
    """What an experiment could leave changed outside the model."""
    return {
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "open block": CURRENT.get(),
        "run": _RUNNING.get(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "random state": torch.get_rng_state().numpy().tobytes(),
    }


@contextmanager
def unchanged(net: nn.Module, *inputs: Any) -> Iterator[None]:
    """The block leaves hooks, weights, training flags, answers and surroundings as they were."""

    def state() -> dict[str, Any]:
        with torch.no_grad():
            answer = net(*inputs)
        return {
            "hooks": hooks(net),
            "answer": answer.clone().numpy().tobytes(),
            "weights": [(k, t.data_ptr(), t._version) for k, t in net.state_dict().items()],
            "attributes": [(k, sorted(vars(m))) for k, m in net.named_modules()],
            "grads": [p.grad is None for p in net.parameters()],
            "training": [m.training for m in net.modules()],
            **surroundings(),
        }

    before = state()
    yield
    after = state()
    for key, was in before.items():
        assert after[key] == was, f"{key} changed"


def same(one: Any, other: Any) -> bool:
    """Whether two results are bitwise the same."""
    try:
        bitwise(one, other)
    except AssertionError:
        return False
    return True


# --- the same experiment by hand ------------------------------------------------------------------

Hook = Callable[[torch.Tensor], torch.Tensor | None]


@torch.no_grad()
def by_hand(net: nn.Module, ids: torch.Tensor, edits: dict[str, Hook]) -> dict[str, torch.Tensor]:
    """Plain forward hooks: `edits[path]` gets an output and may return another one.

    Returns the output of every module that has one tensor as it was given on, and "" for the
    model's own.
    """
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for path, module in net.named_modules():
        if isinstance(module, Mix):
            continue

        def hook(_m: nn.Module, _a: Any, out: torch.Tensor, path: str = path) -> Any:
            changed = edits[path](out) if path in edits else None
            out = out if changed is None else changed
            seen[path] = out.clone()
            return out

        handles.append(module.register_forward_hook(hook))
    try:
        net(ids)
    finally:
        for handle in handles:
            handle.remove()
    return seen
