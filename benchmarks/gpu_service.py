"""The service on one GPU: strangers in one pass and in one loop, and the load test.

    python -m benchmarks.gpu_service --write service.md     # on the first CUDA device
    python -m benchmarks.gpu_service --device cpu --small   # whether it runs at all

What is compared with what, and what is checked before it, is in `merging` and `load`. Models have
random weights in float32, made on the device.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from weft.testing import tiny_path

from .load import USERS, Subject, measured, report
from .merging import LONGEST, Merged, one_loop, one_pass

HEAD = "| work | beside | that, ms | Weft, ms | x |"
ROUNDS = 20


def gpt2(layers: int, width: int, device: torch.device) -> Any:
    """A GPT-2 layout with heads of 64."""
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=max(1, width // 64),
        vocab_size=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    return _built(config, device)


def _built(config: Any, device: torch.device) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@contextmanager
def _tiny(device: torch.device) -> Iterator[tuple[str, Any]]:
    net: Any = AutoModelForCausalLM.from_pretrained(tiny_path()).eval()
    yield tiny_path(), net.to(device)


@contextmanager
def _llama(device: torch.device, small: bool) -> Iterator[tuple[str, Any]]:
    """The shape of Llama's 1.1 billion; with a small vocabulary, as results are not the point."""
    config = LlamaConfig(
        hidden_size=64 if small else 2048,
        intermediate_size=96 if small else 5632,
        num_hidden_layers=3 if small else 22,
        num_attention_heads=4 if small else 32,
        num_key_value_heads=4,
        vocab_size=2048,
        bos_token_id=None,
        eos_token_id=None,
    )
    net = _built(config, device)
    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(folder)
        yield folder, net


def subjects(device: torch.device, small: bool) -> Iterator[Subject]:
    yield Subject("tiny", partial(_tiny, device), str(device))
    yield Subject("Llama-1B", partial(_llama, device, small), str(device))


def shared(device: torch.device, small: bool) -> Iterator[Merged]:
    rounds = 2 if small else ROUNDS
    shapes = ((2, 64),) if small else ((12, 64), (24, 1024))
    for layers, width in shapes:
        net = gpt2(layers, width, device)
        yield one_pass(net, LONGEST, rounds, "1.30")
        yield one_loop(net, rounds)


def line(row: Merged) -> str:
    times = f"{row.other.median / 1e3:.1f} | {row.ours.median / 1e3:.1f}"
    return f"| {row.name} | {row.way} | {times} | {row.ratio:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="The service of Weft on one GPU.")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--small", action="store_true", help="tiny models and few rounds")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a row of the load test")
    parser.add_argument("--only", choices=("shared", "load"), help="one of the two")
    parser.add_argument("--write", type=Path, help="where the tables go")
    options = parser.parse_args()
    device = torch.device(options.device)
    which = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    lines: list[str] = []

    def say(*more: str) -> None:
        print("\n".join(more), flush=True)
        lines.extend(more)
        if options.write:
            options.write.write_text("\n".join(lines) + "\n")

    say(f"torch {torch.__version__} on {which}.", "")
    if options.only != "load":
        say(HEAD, "|---" * 5 + "|")
        for row in shared(device, options.small):
            say(line(row))
    if options.only != "shared":
        for subject in subjects(device, options.small):
            users = (1, 2) if options.small else USERS
            say("", *report([measured(subject, options.seconds, users)]))


if __name__ == "__main__":
    main()
