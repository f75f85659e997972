"""Generations with an edit at each step: beside `generate` with hooks by hand, and shared.

    ./run bench generation

A direction is added to a layer at every step of 20 new tokens. First one prompt: `transformers`'
`generate` with a hook, beside one block. Then four prompts of different lengths: by hand one after
another, as invokes of one block that share steps, and as invokes with forwards of their own.
All give the same tokens before they are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import weft

from .measure import Sample, in_turn, over, ratio
from .models import gpt2, prompt

LAYERS, EDITED, NEW = 12, 5, 20
LENGTHS = (9, 23, 14, 32)
OPTIONS: dict[str, Any] = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class GenerationRow:
    """One piece of work, by hand (or as the second of two ways of Weft), and with Weft."""

    name: str
    other: Sample
    ours: Sample
    budget: str = ""

    @property
    def over(self) -> float:
        return over(self.other, self.ours)

    @property
    def ratio(self) -> float:
        return ratio(self.other, self.ours)


class Steering:
    """The work, by hand and with Weft."""

    def __init__(self, layers: int = LAYERS) -> None:
        self.net: Any = gpt2(layers)
        self.model: Any = weft.LanguageModel(self.net)
        self.edited = min(EDITED, layers - 1)
        self.direction = torch.linspace(-1, 1, self.net.config.n_embd)
        self.prompts = [prompt(length) for length in LENGTHS]

    def by_hand(self, prompts: Sequence[torch.Tensor], i: int = 0) -> list[torch.Tensor]:
        """`generate` of `transformers`, one prompt after another. Each `[1, prompt + new]`."""

        def add(module: Any, args: Any, output: torch.Tensor) -> None:
            output[:, -1] += self.direction

        handle = self.net.transformer.h[self.edited].register_forward_hook(add)
        try:
            with torch.no_grad():
                return [self.net.generate(ids, **OPTIONS) for ids in prompts]
        finally:
            handle.remove()

    def block(self, ids: torch.Tensor, i: int = 0) -> list[torch.Tensor]:
        """One prompt, one block."""
        with self.model.generate(ids, **OPTIONS) as tracer:
            self.model.transformer.h[self.edited].output[:, -1] += self.direction
            found = tracer.result.save()
        return [found]

    def invokes(self, alone: bool, i: int = 0) -> list[torch.Tensor]:
        """All prompts in one block."""
        found = []
        with self.model.generate(**OPTIONS, alone=alone) as tracer:
            for ids in self.prompts:
                with tracer.invoke(ids):
                    self.model.transformer.h[self.edited].output[:, -1] += self.direction
                    found.append(tracer.result.save())
        return found


def generation_rows(rounds: int, layers: int = LAYERS) -> list[GenerationRow]:
    """The rows; `rounds` of each, in turn."""
    work = Steering(layers)
    first = work.prompts[0]
    one: list[Callable[[int], Any]] = [partial(work.by_hand, [first]), partial(work.block, first)]
    several: list[Callable[[int], Any]] = [
        partial(work.by_hand, work.prompts),
        partial(work.invokes, True),
        partial(work.invokes, False),
    ]
    for ways in (one, several):
        expected = ways[0](0)
        for way in ways[1:]:
            for got, tokens in zip(way(0), expected, strict=True):
                assert torch.equal(got, tokens)
    hooks, block = in_turn(one, rounds)
    singly, alone, shared = in_turn(several, rounds)
    return [
        GenerationRow("one prompt, beside hooks", hooks, block, "+1,000 us"),
        GenerationRow("four prompts that share steps, beside hooks one by one", singly, shared),
        GenerationRow("four prompts that share steps, beside `alone=True`", alone, shared),
    ]
