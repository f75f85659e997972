"""Runs an operation on real tensors. Drawn numbers depend on a key, not on what ran before.

    call("softmax", (h, -1), {})
    call("randn_like", (h,), {}, seed_key=seed_of(seed=0, draw=3, step=0, row=0))
    call("zeros", (2, 3), {}, device=h.device)

The global random state is neither read nor changed, so threads do not disturb each other. The
same key gives the same numbers on the same kind of device; a CPU generator uses 32 bits of a key.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from ..graph.ops import OPS, RANDOM
from .draws import DRAWS
from .table import FUNCTIONS

MAKERS = frozenset({"factory", "random_factory"})


def seed_of(seed: int, draw: int, step: int, row: int) -> int:
    """A 64-bit key for one draw: number `draw` of the graph, at a step, for a row."""
    text = f"{seed}/{draw}/{step}/{row}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def call(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    seed_key: int | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """The result of operation `name`.

    `seed_key` keys the numbers of a random operation, which is a `ValueError` without one. What
    has no tensor argument is made on `device`.
    """
    kind = OPS[name].kind
    if kind in RANDOM:
        return _draw(name, args, kwargs, seed_key, device)
    if kind in MAKERS:
        return FUNCTIONS[name](*args, **kwargs, device=device)
    return FUNCTIONS[name](*args, **kwargs)


def _draw(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], key: int | None, device: Any
) -> Any:
    if key is None:
        raise ValueError(f"torch.{name} draws numbers: it needs a seed_key")
    met = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)), None)
    place = torch.device(device or "cpu") if met is None else met.device
    generator = torch.Generator(place).manual_seed(key)
    if met is None:
        kwargs = {**kwargs, "device": place}
    function = DRAWS.get(name)
    if function is not None:
        return function(generator, *args, **kwargs)
    return FUNCTIONS[name](*args, **kwargs, generator=generator)
