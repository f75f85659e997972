"""The caches of `transformers` that a generation keeps its keys, values and states in.

Caches of several generations become one, row below row. Keys and values stand at the right of a
common width, so that distances between positions, which sliding windows count, are what they are
alone; what is left of a shorter row is zero, and masked.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


def fresh_cache(net: Any) -> dict[str, Any]:
    """An empty cache, by the keyword under which the model's forward takes it.

    The one that `generate` makes by default: it grows, and a layer with a sliding window or a state
    keeps no more than that. Nothing for models that make their own.
    """
    from transformers import DynamicCache

    if not net._supports_default_dynamic_cache():
        return {}
    name = "cache_params" if "mamba" in type(net).__name__.lower() else "past_key_values"
    return {name: DynamicCache(config=net.config.get_text_config(decoder=True))}


class _Kind(NamedTuple):
    """What is known of the caches of a model with this configuration."""

    config: Any
    joining: bool
    padded: int


def has_joining_cache(net: Any) -> bool:
    """Whether a model's caches can be put together. What it makes is looked at once."""
    return _kind(net).joining


def longest_padded(net: Any) -> int:
    """The longest forward on an empty cache in which rows may be padded on the right: all of its
    positions are kept, so that the real ones can be told from the others. 0: none, as states have
    run over all of them."""
    return _kind(net).padded


def _kind(net: Any) -> _Kind:
    known = _KINDS.get(net)
    if known is None or known.config is not net.config:
        made = fresh_cache(net)
        joining = bool(made) and all(can_join(it) for it in made.values())
        layers = [layer for it in made.values() for layer in it.layers] if joining else []
        padded = min([_most_padded(layer) for layer in layers], default=0)
        known = _KINDS[net] = _Kind(net.config, joining, padded)
    return known


_KINDS: WeakKeyDictionary[Any, _Kind] = WeakKeyDictionary()


def _most_padded(layer: Any) -> int:
    from transformers import cache_utils as kinds

    known = (kinds.DynamicLayer, kinds.DynamicSlidingWindowLayer)
    return _columns(layer, sys.maxsize) if type(layer) in known else 0


def can_join(cache: Any) -> bool:
    """Whether its rows can stand beside those of others: each layer is of a kind that is known."""
    from transformers import cache_utils as kinds

    known = (
        kinds.DynamicLayer,
        kinds.DynamicSlidingWindowLayer,
        kinds.LinearAttentionLayer,
        kinds.LinearAttentionAndFullAttentionLayer,
    )
    plain = type(cache) is kinds.DynamicCache and not cache.offloading
    return plain and all(type(layer) in known for layer in cache.layers)


def join(cache: Any, width: int, other: Any, others: int) -> None:
    """Puts the rows of `other`, of width `others`, below those of `cache`, of width `width`."""
    both = max(width, others)
    for mine, its in zip(cache.layers, other.layers, strict=True):
        if _has_keys(mine):
            for name in ("keys", "values"):
                pair = [_widened(getattr(one, name), _columns(one, both)) for one in (mine, its)]
                setattr(mine, name, torch.cat(pair))
            _counted(mine, both)
        for states, new in zip(_states(mine), _states(its), strict=True):
            states.update({n: torch.cat([one, new[n]]) for n, one in states.items()})


def align(cache: Any, lengths: Tensor, width: int) -> None:
    """Rows of these lengths, padded on the right of `width`, stand at the right from now on; what
    is left of them is zero. lengths `[rows]`."""
    for layer in cache.layers:
        places = torch.arange(width)[None] - (width - lengths[:, None])  # where each comes from
        places = places.to(layer.keys.device)[:, None, :, None]
        for name in ("keys", "values"):
            old = getattr(layer, name)
            moved = old.gather(2, places.clamp(min=0).expand_as(old))
            setattr(layer, name, moved.masked_fill_(places < 0, 0))


def narrow(cache: Any, rows: Tensor, width: int) -> None:
    """Keeps some rows, and of them the last `width` positions."""
    for layer in cache.layers:
        if _has_keys(layer):
            for name in ("keys", "values"):
                kept = getattr(layer, name)[rows]
                count = _columns(layer, width)
                setattr(layer, name, kept[:, :, kept.shape[2] - count :].contiguous())
            _counted(layer, width)
        for states in _states(layer):
            states.update({name: one[rows] for name, one in states.items()})


def overwrite(cache: Any, rows: tuple[int, int], value: float) -> None:
    """From now on these rows read `value` wherever they look back: for trials of isolation."""
    for layer in cache.layers:
        if _has_keys(layer):
            layer.values[slice(*rows)] = value
        for states in _states(layer):
            for state in states.values():
                state[slice(*rows)] = value


def caches_in(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The caches among the keywords of a forward."""
    return {name: kwargs[name] for name in ("past_key_values", "cache_params") if name in kwargs}


def _has_keys(layer: Any) -> bool:
    return isinstance(getattr(layer, "keys", None), Tensor)


def _states(layer: Any) -> list[dict[int, Tensor]]:
    """The states of a linear layer: of its convolutions, and the recurrent ones."""
    return [getattr(layer, name, {}) for name in ("conv_states", "recurrent_states")]


def _columns(layer: Any, width: int) -> int:
    """How many positions a layer keeps of `width`: a sliding window counts the next one too."""
    window = getattr(layer, "sliding_window", None)
    return width if window is None else min(width, window - 1)


def _counted(layer: Any, width: int) -> None:
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = width


def _widened(tensor: Tensor, columns: int) -> Tensor:
    """`[rows, heads, columns, d]`, with zeros on the left."""
    return torch.nn.functional.pad(tensor, (0, 0, columns - tensor.shape[2], 0))
