"""`./run bench [PART ...] [--rounds N] [--write]`: measures, prints, and keeps the tables."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch

from .generation import generation_rows
from .library import Row, all_rows
from .load import TINY, WIDE, measured, report
from .merging import merging_rows
from .recording import memory_slope, operation_times
from .service import service_rows
from .sweep import ROUNDS, sweep_rows

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"

LOAD_ROUNDS = 100
"""The most rounds of the load test: ten of them are a second of each row."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; or all")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--write", action="store_true", help=f"keep the tables in {PAGE.name}")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {min(unknown)!r}")
    torch.set_num_threads(1)
    for part in options.parts or PARTS:
        lines = [line for lines in PARTS[part](options.rounds) for line in _say(*lines)]
        if options.write:
            _keep(part, "\n".join(lines))


def _keep(part: str, table: str) -> None:
    """Replaces the part's table, which stands between two marks."""
    first, last = f"<!-- {part} -->\n", f"\n<!-- end of {part} -->"
    head, _, rest = PAGE.read_text().partition(first)
    _, found, tail = rest.partition(last)
    if not found:
        raise SystemExit(f"{PAGE.name} has no marks for {part}")
    PAGE.write_text(f"{head}{first}{table}{found}{tail}")


Lines = Iterator[tuple[str, ...]]


def _library(rounds: int) -> Lines:
    yield (
        f"{_when(rounds)} Microseconds; medians, with half the quartile distance.",
        "",
        "| work | layers | prompt | bare | hooks | Weft "
        "| over hooks | over bare | x hooks | budget |",
        "|---|---|---|---|---|---|---|---|---|---|",
    )
    for row in all_rows(rounds):
        yield (_cells(row),)
    times = operation_times()
    yield (
        "",
        "| recording | measured | budget |",
        "|---|---|---|",
        f"| one operation, first time | {times['first time']:.1f} us | 20 us |",
        f"| one operation, repeated signature | {times['repeated']:.1f} us | 5 us |",
        f"| memory per trace, over 1,000 | {memory_slope():.0f} bytes | flat |",
    )


def _cells(row: Row) -> str:
    kind = "fresh length" if row.fresh else "warm"
    times = [f"{s.median:.0f} ± {s.spread:.0f}" for s in (row.bare, row.hooks, row.traced)]
    gaps = [f"{row.over_hooks:+.0f}", f"{row.over_bare:+.0f}", f"{row.ratio:.2f}"]
    return "| " + " | ".join([row.name, str(row.layers), kind, *times, *gaps, row.budget]) + " |"


def _service(rounds: int) -> Lines:
    found = service_rows(rounds)
    yield (
        f"{_when(rounds)} Milliseconds beyond the bare forward pass of the same rounds.",
        "",
        "| one edit and one save | median | p95 | budget |",
        "|---|---|---|---|",
        *[f"| {t.name} | {t.median:.1f} | {t.p95:.1f} | {t.budget} |" for t in found.trips],
        "",
        "| stage of a request | median ms |",
        "|---|---|",
        *[f"| {name} | {1e3 * seconds:.2f} |" for name, seconds in found.stages.items()],
        "",
        "| what travels | requests | bytes up | bytes down |",
        "|---|---|---|---|",
        *[f"| {t.name} | {t.requests} | {t.up:,} | {t.down:,} |" for t in found.travels],
    )


def _sweep(rounds: int) -> Lines:
    rounds = min(rounds, ROUNDS)
    yield (
        f"{_when(rounds)} Seconds; medians.",
        "",
        "| layers x positions, GPT-2 small shape | by hand | Weft | Weft / by hand |",
        "|---|---|---|---|",
    )
    for row in sweep_rows(rounds):
        yield (f"| {row.name} | {row.seconds:.2f} | {row.weft:.2f} | {row.ratio:.2f} |",)


def _generation(rounds: int) -> Lines:
    yield (
        f"{_when(rounds)} Microseconds; medians.",
        "",
        "| 20 tokens, edited at each step, 12 layers | other way | Weft | over it | x | budget |",
        "|---|---|---|---|---|---|",
    )
    for row in generation_rows(rounds):
        times = f"{row.other.median:.0f} | {row.ours.median:.0f}"
        yield (f"| {row.name} | {times} | {row.over:+.0f} | {row.ratio:.2f} | {row.budget} |",)


def _merging(rounds: int) -> Lines:
    yield (
        f"{_when(rounds)} Milliseconds; medians.",
        "",
        "| requests of different users | beside | that | shared | x | budget |",
        "|---|---|---|---|---|---|",
    )
    for row in merging_rows(rounds):
        times = f"{row.other.median / 1e3:.1f} | {row.ours.median / 1e3:.1f}"
        yield (f"| {row.name} | {row.way} | {times} | {row.ratio:.2f} | {row.budget} |",)


def _load(rounds: int) -> Lines:
    seconds = min(rounds, LOAD_ROUNDS) / 10
    cores = os.cpu_count()
    yield (
        f"Measured {date.today()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{cores} cores for server and users, one thread a process, {seconds:g} s a row; load "
        f"average before: {os.getloadavg()[0]:.1f}.",
        "",
    )
    yield tuple(report([measured(subject, seconds) for subject in (TINY, WIDE)]))


def _when(rounds: int) -> str:
    return (
        f"Measured {date.today()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"one thread, {rounds} rounds in turn."
    )


def _say(*lines: str) -> tuple[str, ...]:
    for line in lines:
        print(line, flush=True)
    return lines


PARTS: dict[str, Callable[[int], Lines]] = {
    "library": _library,
    "service": _service,
    "sweep": _sweep,
    "generation": _generation,
    "merging": _merging,
    "load": _load,
}


if __name__ == "__main__":
    main()
