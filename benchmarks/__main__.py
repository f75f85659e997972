"""`./run bench [--rounds N] [--write]`: measures, prints, and with --write keeps the table."""

from __future__ import annotations

import argparse
import platform
from datetime import date
from pathlib import Path

import torch

from .library import Row, all_rows
from .recording import memory_slope, operation_times

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
MARK = "<!-- measured -->"


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--write", action="store_true", help=f"keep the table in {PAGE.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = list(_lines(options.rounds))
    if options.write:
        head = PAGE.read_text().split(MARK)[0]
        PAGE.write_text(f"{head}{MARK}\n" + "\n".join(lines) + "\n")


def _lines(rounds: int):
    yield from _say(
        f"Measured {date.today()}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, one thread, {rounds} rounds in turn. Microseconds; medians, "
        "with half the quartile distance.",
        "",
        "| work | layers | prompt | bare | hooks | Weft "
        "| over hooks | over bare | x hooks | budget |",
        "|---|---|---|---|---|---|---|---|---|---|",
    )
    for row in all_rows(rounds):
        yield from _say(_cells(row))
    times = operation_times()
    yield from _say(
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


def _say(*lines: str) -> tuple[str, ...]:
    for line in lines:
        print(line, flush=True)
    return lines


if __name__ == "__main__":
    main()
