"""The oracle of generations: `transformers`' own `generate`, with hooks that count their calls.

    seen = generated(net, ids, {"model.layers.1.output": lambda step, h: h * 2}, max_new_tokens=4)
    seen.result                                  # [batch, prompt + new]
    seen["model.layers.1.output", 2]             # what the model went on with at step 2

A function gets the step and the module's output (`.output`) or first tensor input (`.input`); what
it returns takes its place, unless that is None.

Where tokens are drawn, `with keyed(seed):` around it replaces its one draw by ours.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

import torch
from torch import nn

from weft.kernels.execute import seed_of

Change = Callable[[int, Any], Any]


class Seen(dict):
    result: Any
    steps: int


def generated(
    net: nn.Module, ids: torch.Tensor, hooks: Mapping[str, Change | None], **options: Any
) -> Seen:
    """Runs `net.generate(ids, ...)`; greedy unless options say otherwise."""
    seen, handles, generate = Seen(), [], cast(Any, net).generate
    try:
        for key, change in hooks.items():
            path, _, port = key.rpartition(".")
            handles.append(_ADD[port](net.get_submodule(path), key, change or _nothing, seen))
        with torch.no_grad():
            seen.result = generate(ids, **{"do_sample": False, "pad_token_id": 0, **options})
    finally:
        for handle in handles:
            handle.remove()
    seen.steps = seen.result.shape[1] - ids.shape[1]
    return seen


@contextmanager
def keyed(seed: int) -> Iterator[None]:
    """Inside, `torch.multinomial` draws as the text of `weft.families.sampler` says."""
    steps: dict[str, int] = {"step": 0}

    def draw(chances: torch.Tensor, num_samples: int) -> torch.Tensor:
        step, steps["step"] = steps["step"], steps["step"] + 1
        assert num_samples == 1
        found = []
        for row, each in enumerate(chances):
            passed = each.double().cumsum(-1)
            at = (seed_of(seed, -1, step, row) >> 11) / 2**53 * passed[-1]
            found.append(int((passed <= at).sum()))
        return torch.tensor(found)[:, None]

    with mock.patch("torch.multinomial", draw), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, about options without effect
        yield


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
