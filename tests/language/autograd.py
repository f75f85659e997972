"""The oracle of gradients: hooks by hand and autograd, on the bare module.

    seen = gradients(net, ["transformer.h.1.output"], lambda out: out.logits.sum(), ids)
    seen["transformer.h.1.output"]              # what retain_grad leaves there

A key is a module's path and `output` or `input` (its first tensor), or the name of a weight.
`change` maps keys to functions of what stands there, as in a forward hook; `backward` maps keys to
functions of the gradient there, as in `Tensor.register_hook`. Weights are left without gradients.

With `frozen` weights the graph begins at the first key. Where a gradient is a sum over many uses,
autograd adds them up in another order then, and the last bits are others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Change = Callable[[Any], Any]


def gradients(
    net: nn.Module,
    keys: list[str],
    loss: Callable[[Any], torch.Tensor],
    *args: Any,
    change: Mapping[str, Change] = {},
    backward: Mapping[str, Change] = {},
    frozen: bool = False,
    **kwargs: Any,
) -> dict[str, torch.Tensor]:
    """The gradients at `keys`, by key."""
    weights = dict(net.named_parameters(remove_duplicate=False))
    kept: dict[str, torch.Tensor] = {}
    handles = []

    def see(key: str, tensor: torch.Tensor) -> torch.Tensor:
        if key in change:
            changed = change[key](tensor)
            tensor = tensor if changed is None else changed
        if not tensor.requires_grad:
            tensor = tensor.detach().requires_grad_()
        if key in backward:
            tensor.register_hook(backward[key])
        tensor.retain_grad()
        kept[key] = tensor
        return tensor

    for key in dict.fromkeys([*keys, *change, *backward]):
        if key not in weights:
            handles.append(_hook(net, key, see))
    asked = [weight for weight in weights.values() if frozen and weight.requires_grad]
    try:
        for weight in asked:
            weight.requires_grad_(False)
        loss(net(*args, **kwargs)).backward()
        found = {**kept, **weights}
        return {key: found[key].grad.clone() for key in keys}
    finally:
        for handle in handles:
            handle.remove()
        for weight in asked:
            weight.requires_grad_()
        for weight in weights.values():
            weight.grad = None


def _hook(net: nn.Module, key: str, see: Callable[[str, torch.Tensor], torch.Tensor]) -> Any:
    path, _, port = key.rpartition(".")
    module = net.get_submodule(path)

    def on_output(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (see(key, output[0]), *output[1:])
        return see(key, output)

    def on_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (see(key, args[0]), *args[1:]), kwargs
        name = next(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
        return args, {**kwargs, name: see(key, kwargs[name])}

    if port == "output":
        return module.register_forward_hook(on_output)
    return module.register_forward_pre_hook(on_input, with_kwargs=True)


def untouched(net: nn.Module) -> bool:
    """Whether every weight asks for gradients, and none has one."""
    return all(p.requires_grad and p.grad is None for p in net.parameters())
