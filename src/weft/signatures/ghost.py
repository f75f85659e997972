"""A model without its users' hooks, for passes that never happened.

Shapes are learnt by a fake pass. A hook that a user has put on the model would fire in it and keep
fake tensors, or count a forward that the user never asked for. Where there are such hooks the pass
goes through a copy of the modules on the meta device, without them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

# Hooks of these packages belong to the model: transformers collects hidden states with them.
_OF_THE_MODEL = ("accelerate", "peft", "transformers", "weft")


def without_hooks(module: nn.Module) -> nn.Module:
    """`module` itself if nobody has put hooks on it, else a copy on meta that has none.

    A module that cannot be copied is given back as it is: its hooks will fire.
    """
    if not any(True for _ in _foreign(module)):
        return module
    try:
        ghost = copy.deepcopy(module, _weights_on_meta(module))
    except Exception:  # noqa: BLE001 (what a module holds may refuse in any way)
        return module
    for table, key in list(_foreign(ghost)):
        del table[key]
    return ghost


def _foreign(module: nn.Module) -> Iterator[tuple[dict[int, Any], int]]:
    """(table, key) of every hook that does not belong to the model."""
    for one in module.modules():
        for table in (one._forward_pre_hooks, one._forward_hooks):
            for key, hook in list(table.items()):
                home = getattr(hook, "__module__", None) or type(hook).__module__
                if home.partition(".")[0] not in _OF_THE_MODEL:
                    yield table, key


def _weights_on_meta(module: nn.Module) -> dict[int, Any]:
    """For `deepcopy`: what stands in for each weight. Weights that are one stay one."""
    found: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        meta = tensor.detach().to("meta")
        grad = tensor.requires_grad
        is_weight = isinstance(tensor, nn.Parameter)
        found[id(tensor)] = nn.Parameter(meta, requires_grad=grad) if is_weight else meta
    return found
