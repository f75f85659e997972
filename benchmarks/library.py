"""The library rows: Weft beside the bare forward and beside hand-written hooks at the same sites.

The hooks do what a careful user would write: `no_grad`, clones of what is kept, removal. `fresh`
rows give every round a prompt length that the model has never seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import weft

from .measure import Sample, in_turn, over, ratio
from .models import gpt2, prompt

WARM_LENGTH = 32
FIRST_FRESH = 40


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    layers: int
    fresh: bool
    bare: Sample
    hooks: Sample
    traced: Sample
    budget: str

    @property
    def over_hooks(self) -> float:
        return over(self.hooks, self.traced)

    @property
    def over_bare(self) -> float:
        return over(self.bare, self.traced)

    @property
    def ratio(self) -> float:
        return ratio(self.hooks, self.traced)


class Case:
    """One piece of work, three ways. `ids(i)` gives the prompt of round `i`."""

    name = ""
    budget = ""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.net = gpt2(layers)
        self.model = weft.LanguageModel(self.net)
        self.fresh = False

    def ids(self, i: int) -> torch.Tensor:
        return prompt(FIRST_FRESH + i if self.fresh else WARM_LENGTH)

    def bare(self, i: int) -> None:
        ids = self.ids(i)
        with torch.no_grad():
            self.net(input_ids=ids, use_cache=False)

    def hooks(self, i: int) -> Any:
        raise NotImplementedError

    def traced(self, i: int) -> Any:
        raise NotImplementedError

    def check(self) -> None:
        """Both ways give the same numbers."""
        first, second = self.hooks(3), self.traced(3)
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(a.abs().max()))

    @contextmanager
    def hooked(self, *pairs: tuple[torch.nn.Module, Callable]) -> Iterator[None]:
        handles = [module.register_forward_hook(hook) for module, hook in pairs]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward(self, i: int) -> None:
        with torch.no_grad():
            self.net(input_ids=self.ids(i), use_cache=False)


class Empty(Case):
    name = "read the model's own result"
    budget = "60 us over the bare forward"

    def hooks(self, i: int) -> Any:
        with torch.no_grad():
            return [self.net(input_ids=self.ids(i), use_cache=False).logits.clone()]

    def traced(self, i: int) -> Any:
        with self.model.trace(self.ids(i)):
            logits = self.model.lm_head.output.save()
        return [logits]


class EditAndRead(Case):
    name = "one edit, one read"
    budget = "150 us over hooks"

    def hooks(self, i: int) -> Any:
        kept: list[torch.Tensor] = []

        def edit(module: Any, args: Any, output: torch.Tensor) -> None:
            output[:, -1] *= 2.0

        def read(module: Any, args: Any, output: torch.Tensor) -> None:
            kept.append(output.clone())

        middle: Any = self.net.transformer.h[self.layers // 2].mlp
        with self.hooked((middle, edit), (self.net.lm_head, read)):
            self.forward(i)
        return kept

    def traced(self, i: int) -> Any:
        model = self.model
        with model.trace(self.ids(i)):
            model.transformer.h[self.layers // 2].mlp.output[:, -1] *= 2.0
            logits = model.lm_head.output.save()
        return [logits]


class SaveAll(Case):
    name = "save every layer"
    budget = "1.05 x hooks at 12 layers"

    def hooks(self, i: int) -> Any:
        kept: list[torch.Tensor] = []

        def read(module: Any, args: Any, output: torch.Tensor) -> None:
            kept.append(output.clone())

        with self.hooked(*[(block, read) for block in self.net.transformer.h]):
            self.forward(i)
        return kept

    def traced(self, i: int) -> Any:
        model = self.model
        with model.trace(self.ids(i)):
            kept = [block.output.save() for block in model.transformer.h]
        return kept


class CacheAll(Case):
    name = "cache every module"
    budget = "1.05 x hooks at 12 layers"

    def hooks(self, i: int) -> Any:
        kept: list[torch.Tensor] = []

        def keep(value: Any) -> None:
            if isinstance(value, torch.Tensor):
                kept.append(value.clone())
            elif isinstance(value, (tuple, list)):
                for item in value:
                    keep(item)
            elif isinstance(value, dict):
                for item in value.values():
                    keep(item)

        def read(module: Any, args: Any, output: Any) -> None:
            keep(output)

        with self.hooked(*[(module, read) for module in self.net.modules()]):
            self.forward(i)
        return kept

    def traced(self, i: int) -> Any:
        with self.model.trace(self.ids(i)) as tracer:
            cache = tracer.cache()
        return cache

    def check(self) -> None:
        """The same tensors, in the order in which the modules return."""
        kept, cache = self.hooks(3), self.traced(3)
        found = [cache[path].output for path in cache]
        mine = [out if isinstance(out, torch.Tensor) else first_tensor(out) for out in found]
        sums = sorted(round(float(t.double().sum()), 3) for t in mine)
        assert sums == sorted(round(float(t.double().sum()), 3) for t in kept)


def first_tensor(structure: Any) -> torch.Tensor:
    """The first tensor of a tuple or a ModelOutput."""
    items = structure.values() if isinstance(structure, dict) else structure
    return next(item for item in items if isinstance(item, torch.Tensor))


class Lens(Case):
    name = "logit lens, every layer"
    budget = "600 us over hooks at 12 layers"

    def hooks(self, i: int) -> Any:
        kept: list[torch.Tensor] = []
        net = self.net

        def read(module: Any, args: Any, output: torch.Tensor) -> None:
            kept.append(net.lm_head(net.transformer.ln_f(output[:, -1])))

        with self.hooked(*[(block, read) for block in net.transformer.h]):
            self.forward(i)
        return kept

    def traced(self, i: int) -> Any:
        model = self.model
        with model.trace(self.ids(i)):
            kept = [
                model.lm_head(model.transformer.ln_f(block.output[:, -1])).save()
                for block in model.transformer.h
            ]
        return kept


class Early(Case):
    name = "read layer 0 only"
    budget = "cost proportional to depth"

    def hooks(self, i: int) -> Any:
        kept: list[torch.Tensor] = []

        def read(module: Any, args: Any, output: torch.Tensor) -> None:
            kept.append(output.clone())

        with self.hooked((self.net.transformer.h[0], read)):
            self.forward(i)
        return kept

    def traced(self, i: int) -> Any:
        with self.model.trace(self.ids(i)):
            kept = self.model.transformer.h[0].output.save()
        return [kept]


class Invokes(Case):
    """Eight prompts of different lengths; by hand they are one batch, padded on the right."""

    name = "8 invokes: one edit, one read each"
    budget = "one pass; 1.3 x hooks"
    count = 8

    def prompts(self, i: int) -> list[torch.Tensor]:
        width = self.ids(i).shape[1]
        return [prompt(width - 2 * number) for number in range(self.count)]

    def batch(self, i: int) -> torch.Tensor:
        prompts = self.prompts(i)
        whole = torch.zeros(len(prompts), prompts[0].shape[1], dtype=torch.int64)
        for row, ids in zip(whole, prompts, strict=True):
            row[: ids.shape[1]] = ids[0]
        return whole

    def bare(self, i: int) -> None:
        with torch.no_grad():
            self.net(input_ids=self.batch(i), use_cache=False)

    def hooks(self, i: int) -> Any:
        kept: list[torch.Tensor] = []
        lengths = [ids.shape[1] for ids in self.prompts(i)]

        def edit(module: Any, args: Any, output: torch.Tensor) -> None:
            for row, length in zip(output, lengths, strict=True):
                row[length - 1] *= 2.0

        def read(module: Any, args: Any, output: torch.Tensor) -> None:
            kept.extend([output[n : n + 1, :length].clone() for n, length in enumerate(lengths)])

        middle: Any = self.net.transformer.h[self.layers // 2].mlp
        with self.hooked((middle, edit), (self.net.lm_head, read)), torch.no_grad():
            self.net(input_ids=self.batch(i), use_cache=False)
        return kept

    def traced(self, i: int) -> Any:
        model, kept = self.model, []
        with model.trace() as tracer:
            for ids in self.prompts(i):
                with tracer.invoke(ids):
                    model.transformer.h[self.layers // 2].mlp.output[:, -1] *= 2.0
                    kept.append(model.lm_head.output.save())
        return kept


CASES: tuple[type[Case], ...] = (Empty, EditAndRead, SaveAll, CacheAll, Lens, Early, Invokes)


def measure(case: Case, rounds: int, fresh: bool) -> Row:
    """One row; the numbers of both ways are compared first."""
    case.check()
    case.fresh = fresh
    bare, hooks, traced = in_turn([case.bare, case.hooks, case.traced], rounds)
    return Row(case.name, case.layers, fresh, bare, hooks, traced, case.budget)


def all_rows(rounds: int) -> Iterator[Row]:
    """Every case at 2 and 12 layers, warm and with fresh lengths."""
    for kind in CASES:
        for layers in (2, 12):
            for fresh in (False, True):
                yield measure(kind(layers), rounds, fresh)
