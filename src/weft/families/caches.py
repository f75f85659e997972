"""The caches of `transformers` that a generation keeps its keys, values and states in."""

from __future__ import annotations

from typing import Any


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
