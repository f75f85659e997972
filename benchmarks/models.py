"""The models that are measured: GPT-2 shapes with random weights, small enough to see overhead."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def gpt2(layers: int, width: int = 64, heads: int = 4) -> GPT2LMHeadModel:
    """A GPT-2 layout with `layers` blocks; 64 wide it is mostly Python, which is the worst case."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        vocab_size=256,
        n_positions=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


def prompt(length: int, vocab: int = 256) -> torch.Tensor:
    """Token ids `[1, length]`."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, vocab, (1, length), generator=generator)


def waited(device: torch.device) -> None:
    """Returns when the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
