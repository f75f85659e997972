"""Where the tests of this folder run, and what they run on there.

    net = place.net("llama")            # of the zoo, 3 layers
    net = place.larger("llama")         # 4 layers, 256 wide: large enough for the usual kernels

Without a CUDA device the tests are skipped. `WEFT_GPU_STAND_IN=cpu` runs them on the CPU, where
they can be written; what is only true of a GPU is left out there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.families import zoo

_USUAL = "cuda:0" if torch.cuda.is_available() else "cpu"  # where all is skipped
DEVICE = torch.device(os.environ.get("WEFT_GPU_STAND_IN") or _USUAL)
IS_CUDA = DEVICE.type == "cuda"


def net(name: str = "gpt2", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of the zoo, with its weights on the device."""
    return zoo.build(name, dtype, **changes).to(DEVICE)


_WIDTHS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 512},
    "llama": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
}


def larger(name: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The same shape with heads of 64; matrices are as large as in trained models."""
    found = zoo.build(name, dtype, **(_WIDTHS[name] | changes))
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.ndim > 1:
                parameter.mul_((32 / 256) ** 0.5)
    return found.to(DEVICE)


def tokens(*lengths: int, seed: int = 3) -> torch.Tensor:
    """Token ids on the CPU, where users have them. `[batch, pos]`"""
    return torch.tensor(zoo.tokens(*lengths, seed=seed))


def forwards(net: nn.Module) -> Callable[[], list[int]]:
    """Counts from now on: gives the rows of each forward, and stops counting."""
    rows: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(kwargs["input_ids"] if "input_ids" in kwargs else args[0]))

    hook = net.register_forward_pre_hook(note, with_kwargs=True)

    def done() -> list[int]:
        hook.remove()
        return rows

    return done
