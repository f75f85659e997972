"""The oracle: hooks by hand, as one writes them without Weft. Short enough to be seen to be right.

    seen = with_hooks(net, {"transformer.h.1.mlp.output": lambda h: h * 2}, ids)
    seen.result.logits, seen["transformer.h.1.mlp.output"]

A key is a module's path and a port. The function gets the module's output, its first tensor input
(`.input`) or its arguments `(args, kwargs)` (`.inputs`); what it returns takes their place, unless
that is None. What the model goes on with is kept, as a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Hooks = Mapping[str, Callable[[Any], Any] | None]


class Seen(dict):
    """What the model went on with, by key, and the model's own `result`."""

    result: Any


def with_hooks(net: nn.Module, hooks: Hooks, *args: Any, **kwargs: Any) -> Seen:
    """Runs `net(*args, **kwargs)` without gradients; the hooks are gone afterwards."""
    seen, handles = Seen(), []
    try:
        for key, change in hooks.items():
            path, _, port = key.rpartition(".")
            handles.append(_ADD[port](net.get_submodule(path), key, change or _nothing, seen))
        with torch.no_grad():
            seen.result = net(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _nothing(value: Any) -> None:
    return None


def _on_output(module: nn.Module, key: str, change: Any, seen: Seen) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        changed = change(output)
        seen[key] = copy.deepcopy(output if changed is None else changed)
        return changed

    return module.register_forward_hook(hook)


def _on_inputs(module: nn.Module, key: str, change: Any, seen: Seen) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        changed = change((args, kwargs))
        seen[key] = copy.deepcopy((args, kwargs) if changed is None else changed)
        return changed

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _on_input(module: nn.Module, key: str, change: Any, seen: Seen) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            changed = change(args[0])
            seen[key] = (args[0] if changed is None else changed).clone()
            return None if changed is None else ((changed, *args[1:]), kwargs)
        name = next(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
        changed = change(kwargs[name])
        seen[key] = (kwargs[name] if changed is None else changed).clone()
        return None if changed is None else (args, {**kwargs, name: changed})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


_ADD = {"output": _on_output, "input": _on_input, "inputs": _on_inputs}


def hook_count(net: nn.Module) -> int:
    """Hooks of every kind on a module and all below it."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in net.modules() for kind in kinds)
