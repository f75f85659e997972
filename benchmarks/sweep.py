"""A full layer by position patching sweep on the GPT-2 small shape, beside hooks by hand.

    ./run bench sweep

Clean activations are put into a corrupt prompt at each of 12 layers and 9 positions, and the logits
of the last position are kept. By hand: one batch of all 108 points; one batch for each layer; and
the batch of all with `logits_to_keep=1`, as who knows that option would write it. All give the same
numbers before they are measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import median
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import weft

LAYERS, POSITIONS = 12, 9
ROUNDS = 7


@dataclass(frozen=True)
class SweepRow:
    """Seconds of one way, and the median over the rounds of what Weft took as a part of it."""

    name: str
    seconds: float
    weft: float
    ratio: float


class Patching:
    """The work, by hand and with Weft."""

    def __init__(self, width: int = 768) -> None:
        torch.manual_seed(0)
        config = GPT2Config(n_layer=LAYERS, n_embd=width, n_head=12)
        self.net: Any = GPT2LMHeadModel(config).eval()
        self.model: Any = weft.LanguageModel(self.net)
        self.clean, self.corrupt = torch.randint(config.vocab_size, (2, 1, POSITIONS))

    @cached_property
    def kept(self) -> list[torch.Tensor]:
        """Of each layer the clean activations, `[1, pos, d_model]`."""
        kept: list[torch.Tensor] = []
        handles = [
            layer.register_forward_hook(lambda module, args, output: kept.append(output.clone()))
            for layer in self.net.transformer.h
        ]
        self._forward([*handles], self.clean)
        return kept

    def batch(self, **options: Any) -> torch.Tensor:
        """All points in one batch. `[layer * pos, vocab]`"""
        rows = self.corrupt.expand(LAYERS * POSITIONS, POSITIONS)
        return self._forward(
            [self._hook(layer, layer * POSITIONS) for layer in range(LAYERS)], rows, **options
        )

    def batches(self) -> torch.Tensor:
        """One batch for each layer. `[layer * pos, vocab]`"""
        rows = self.corrupt.expand(POSITIONS, POSITIONS)
        return torch.cat([self._forward([self._hook(layer, 0)], rows) for layer in range(LAYERS)])

    def _hook(self, layer: int, first: int) -> Any:
        def patch(module: Any, args: Any, output: torch.Tensor) -> None:
            for position in range(POSITIONS):
                output[first + position, position] = self.kept[layer][0, position]

        return self.net.transformer.h[layer].register_forward_hook(patch)

    def _forward(self, handles: list[Any], ids: torch.Tensor, **options: Any) -> torch.Tensor:
        try:
            with torch.no_grad():
                return self.net(input_ids=ids, use_cache=False, **options).logits[:, -1].clone()
        finally:
            for handle in handles:
                handle.remove()

    def swept(self) -> torch.Tensor:
        """With Weft. `[layer * pos, vocab]`"""
        model, kept = self.model, self.kept

        def point(tracer: Any, layer: int, position: int) -> Any:
            model.transformer.h[layer].output[:, position] = kept[layer][:, position]
            return model.lm_head.output[0, -1]

        found = model.sweep(self.corrupt, point, layer=range(LAYERS), position=range(POSITIONS))
        return found.values.flatten(0, 1)


def sweep_rows(rounds: int = ROUNDS, width: int = 768) -> list[SweepRow]:
    """Each way by hand, in turn with Weft."""
    work = Patching(width)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "hooks, one batch of 108": work.batch,
        "hooks, a batch of 9 for each layer": work.batches,
        "hooks, one batch, `logits_to_keep=1`": partial(work.batch, logits_to_keep=1),
    }
    expected = work.swept()
    for way in ways.values():
        torch.testing.assert_close(way(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    times: dict[str, list[float]] = {name: [] for name in (*ways, "")}
    for _ in range(rounds):
        for name, way in {**ways, "": work.swept}.items():
            begin = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - begin)
    ours = times.pop("")
    return [
        SweepRow(
            name,
            median(theirs),
            median(ours),
            median([a / b for a, b in zip(ours, theirs, strict=True)]),
        )
        for name, theirs in times.items()
    ]
