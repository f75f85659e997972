"""The service rows: what a request costs beyond the forward pass, and what travels.

A server runs as `weft serve` runs, with its own processes, on this machine. The forward passes of
all ways are measured in turn in this process; the worker's own pass takes as long.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

import weft
from weft.testing.process import served

from .measure import Sample, in_turn
from .models import gpt2, prompt

LAYERS, LENGTH = 12, 32
FEATURES = 4096
STRENGTHS = 20


@dataclass(frozen=True)
class Trip:
    """Milliseconds beyond the bare forward pass of the same rounds."""

    name: str
    budget: str
    times: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.times)

    @property
    def p95(self) -> float:
        return quantiles(self.times, n=20)[-1]


@dataclass(frozen=True)
class Travel:
    """Bytes of some requests, HTTP bodies only."""

    name: str
    requests: int
    up: int
    down: int


class Bench:
    """One model, here and on a server."""

    def __init__(self, folder: str, url: str) -> None:
        self.net = gpt2(LAYERS)
        self.here = weft.LanguageModel(self.net)
        self.there = weft.LanguageModel(folder, remote=url)
        self.ids = prompt(LENGTH)

    def bare(self, i: int) -> None:
        with torch.no_grad():
            self.net(input_ids=self.ids, use_cache=False)

    def one_save(self, model: Any, **options: Any) -> Any:
        with model.trace(self.ids, **options) as tracer:
            model.transformer.h[6].mlp.output[:, -1] *= 2.0
            model.lm_head.output[:, -1].save("logits")
        return tracer

    def check(self) -> None:
        """Both places give the same numbers before they are measured."""
        here, there = (self.one_save(model).results["logits"] for model in (self.here, self.there))
        torch.testing.assert_close(there, here, rtol=0, atol=1e-5 * float(here.abs().max()))

    # -- what travels ------------------------------------------------------------------------

    def lens(self) -> Any:
        model = self.there
        with model.trace(self.ids) as tracer:
            weft.save(
                [
                    model.lm_head(model.transformer.ln_f(b.output[:, -1]))
                    for b in model.transformer.h
                ]
            )
        return tracer

    def steering(self) -> Iterator[Any]:
        direction, model = torch.randn(64), self.there
        for layer in range(LAYERS):
            for strength in torch.linspace(-4, 4, STRENGTHS).tolist():
                with model.trace(self.ids) as tracer:
                    model.transformer.h[layer].output[:, -1] += strength * direction
                    model.lm_head.output[:, -1].save()
                yield tracer

    def autoencoder(self, encode: torch.Tensor, decode: torch.Tensor) -> Any:
        model = self.there
        with model.trace(self.ids) as tracer:
            features = (model.transformer.h[6].output @ encode).relu()
            model.transformer.h[6].output = features @ decode
            features.amax(1).topk(10).indices.save()
        return tracer


def trips(bench: Bench, rounds: int) -> list[Trip]:
    """One edit and one save, beyond the bare forward."""
    bench.check()
    ways = {
        ("here", "-"): lambda i: bench.one_save(bench.here),
        ('remote="local"', "-"): lambda i: bench.one_save(bench.here, remote="local"),
        ("a server on this machine", "15 ms"): lambda i: bench.one_save(bench.there),
    }
    bare, *samples = in_turn([bench.bare, *ways.values()], rounds)
    return [Trip(*way, _beyond(bare, s)) for way, s in zip(ways, samples, strict=True)]


def _beyond(bare: Sample, sample: Sample) -> tuple[float, ...]:
    return tuple((b - a) / 1e3 for a, b in zip(bare.times, sample.times, strict=True))


def travels(bench: Bench) -> list[Travel]:
    """What travels for the usual experiments."""
    encode, decode = torch.randn(64, FEATURES), torch.randn(FEATURES, 64)
    return [
        _travel("one edit and one save", [bench.one_save(bench.there)]),
        _travel("logit lens over 12 layers", [bench.lens()]),
        _travel(f"steering, 12 layers x {STRENGTHS} strengths", list(bench.steering())),
        _travel("a sparse autoencoder of 2 MB, first", [bench.autoencoder(encode, decode)]),
        _travel("the same one again", [bench.autoencoder(encode, decode)]),
    ]


def _travel(name: str, tracers: list[Any]) -> Travel:
    up, down = (sum(getattr(t.traffic, way) for t in tracers) for way in ("up", "down"))
    return Travel(name, len(tracers), up, down)


@dataclass(frozen=True)
class Found:
    """All that was measured; `stages` are median seconds of a request, as the server tells."""

    trips: list[Trip]
    travels: list[Travel]
    stages: dict[str, float]


def service_rows(rounds: int) -> Found:
    """Everything, against a server of its own."""
    with tempfile.TemporaryDirectory() as folder:
        gpt2(LAYERS).save_pretrained(folder)
        with served(f"bench={folder}") as server:
            bench = Bench(folder, server.url)
            bench.one_save(bench.there)
            found = trips(bench, rounds)
            stages = [bench.one_save(bench.there).stages for _ in range(rounds)]
            medians = {name: median(s[name] for s in stages) for name in stages[0]}
            return Found(found, travels(bench), medians)
