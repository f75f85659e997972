"""Measuring several functions in turn, in one process, so that a noisy machine hits all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles


@dataclass(frozen=True)
class Sample:
    """Microseconds of one function over many rounds."""

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.times)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles."""
        low, _, high = quantiles(self.times, n=4)
        return (high - low) / 2


BATCH = 10
"""Rounds of one function before it is the next one's turn."""


def in_turn(
    functions: Sequence[Callable[[int], object]], rounds: int, warmup: int = BATCH
) -> list[Sample]:
    """Each function's times. They take turns every few rounds; round `i` gets `i`."""
    times: list[list[float]] = [[] for _ in functions]
    gc.collect()
    gc.disable()
    try:
        for start in range(0, rounds + warmup, BATCH):
            order = (
                range(len(functions)) if start % (2 * BATCH) else reversed(range(len(functions)))
            )
            for which in order:
                for i in range(start, start + BATCH):
                    elapsed = _timed(functions[which], i)
                    if start >= warmup:
                        times[which].append(elapsed)
            gc.collect()
    finally:
        gc.enable()
    return [Sample(tuple(one)) for one in times]


def _timed(function: Callable[[int], object], i: int) -> float:
    start = time.perf_counter_ns()
    function(i)
    return (time.perf_counter_ns() - start) / 1e3


def over(first: Sample, second: Sample) -> float:
    """Median of the paired differences `second - first`, in microseconds."""
    return median(b - a for a, b in zip(first.times, second.times, strict=True))


def ratio(first: Sample, second: Sample) -> float:
    """Median of the paired ratios `second / first`."""
    return median(b / a for a, b in zip(first.times, second.times, strict=True))
