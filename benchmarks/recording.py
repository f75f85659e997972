"""What recording costs on its own: one operation, new and repeated; and memory over many traces."""

from __future__ import annotations

import gc
import resource
import time
from statistics import median

import torch

import weft

from .models import gpt2, prompt


def operation_times() -> dict[str, float]:
    """Microseconds to record one operation: median over common ones, first time and repeated."""
    model = weft.LanguageModel(gpt2(2))
    first: list[float] = []
    again: list[float] = []
    for length in range(8, 24):
        with model.scan(prompt(length)):
            h = model.transformer.h[0].output
            v = torch.ones(64)
            for operation in _OPERATIONS:
                first.append(_timed(operation, h, v))
            for operation in _OPERATIONS:
                again.append(min(_timed(operation, h, v) for _ in range(5)))
    return {"first time": median(first), "repeated": median(again)}


_OPERATIONS = (
    lambda h, v: h[:, -1],
    lambda h, v: h * 2.0,
    lambda h, v: h + v,
    lambda h, v: h @ h.transpose(-1, -2),
    lambda h, v: h.softmax(-1),
    lambda h, v: h.mean(dim=1),
    lambda h, v: h.norm(dim=-1),
    lambda h, v: torch.relu(h),
)


def _timed(operation, h, v) -> float:
    start = time.perf_counter_ns()
    operation(h, v)
    return (time.perf_counter_ns() - start) / 1e3


def memory_slope(traces: int = 1000) -> float:
    """Bytes of resident memory per trace over `traces`, after a warm-up of as many."""
    model = weft.LanguageModel(gpt2(2))
    ids = prompt(32)

    def once() -> None:
        with model.trace(ids):
            model.transformer.h[0].mlp.output[:, -1] *= 2.0
            model.lm_head.output.save()

    for _ in range(traces):
        once()
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(traces):
        once()
    gc.collect()
    return 1024.0 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / traces
