"""The oracle of generations: `transformers`' own `generate`, with hooks that count their calls.

    seen = generated(net, ids, {"model.layers.1.output": lambda step, h: h * 2}, max_new_tokens=4)
    seen.result                                  # [batch, prompt + new]
    seen["model.layers.1.output", 2]             # what the model went on with at step 2

A function gets the step and the module's output (`.output`) or first tensor input (`.input`); what
it returns takes its place, unless that is None.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Change = Callable[[int, Any], Any]


class Seen(dict):
    result: Any
    steps: int


def generated(
    net: nn.Module, ids: torch.Tensor, hooks: Mapping[str, Change | None], **options: Any
) -> Seen:
    """Runs `net.generate(ids, ...)`; greedy unless options say otherwise."""
    seen, handles = Seen(), []
    try:
        for key, change in hooks.items():
            path, _, port = key.rpartition(".")
            handles.append(_ADD[port](net.get_submodule(path), key, change or _nothing, seen))
        with torch.no_grad():
            seen.result = net.generate(ids, **{"do_sample": False, "pad_token_id": 0, **options})
    finally:
        for handle in handles:
            handle.remove()
    seen.steps = seen.result.shape[1] - ids.shape[1]
    return seen


def _nothing(step: int, value: Any) -> None:
    return None


def _on_output(module: nn.Module, key: str, change: Change, seen: Seen) -> Any:
    count = iter(range(1 << 30))

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        step = next(count)
        changed = change(step, output)
        seen[key, step] = copy.deepcopy(output if changed is None else changed)
        return changed

    return module.register_forward_hook(hook)


def _on_input(module: nn.Module, key: str, change: Change, seen: Seen) -> Any:
    count = iter(range(1 << 30))

    def hook(module: nn.Module, args: Any) -> Any:
        step = next(count)
        changed = change(step, args[0])
        seen[key, step] = (args[0] if changed is None else changed).clone()
        return None if changed is None else (changed, *args[1:])

    return module.register_forward_pre_hook(hook)


_ADD = {"output": _on_output, "input": _on_input}
