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


def in_turn(
    functions: Sequence[Callable[[int], object]], rounds: int, warmup: int = 5
) -> list[Sample]:
    """Each function's times; round `i` calls every function with `i`, one after another."""
    times: list[list[float]] = [[] for _ in functions]
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds + warmup):
            order = range(len(functions)) if i % 2 else reversed(range(len(functions)))
            for which in order:
                start = time.perf_counter_ns()
                functions[which](i)
                elapsed = (time.perf_counter_ns() - start) / 1e3
                if i >= warmup:
                    times[which].append(elapsed)
            if i % 50 == 0:
                gc.collect()
    finally:
        gc.enable()
    return [Sample(tuple(one)) for one in times]


def over(first: Sample, second: Sample) -> float:
    """Median of the paired differences `second - first`, in microseconds."""
    return median(b - a for a, b in zip(first.times, second.times, strict=True))


def ratio(first: Sample, second: Sample) -> float:
    """Median of the paired ratios `second / first`."""
    return median(b / a for a, b in zip(first.times, second.times, strict=True))
