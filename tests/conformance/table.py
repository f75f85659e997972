"""The page that the suite writes: docs/conformance.md, from cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from .cases import CASES
from .lanes import NAMES
from .verdicts import ABSENT, BITWISE, BOUNDED, FAILED, REFUSED, VERDICTS, Cell

SIGNS = {BITWISE: "=", BOUNDED: "~", REFUSED: "refused", FAILED: "FAILED", ABSENT: "."}

_HEAD = """\
# Conformance

Written by `./run conformance`, which runs every cell; do not edit. The tests run some of them.

Each case is one source that runs on a small random model of each family, in float32 and bfloat16,
in three lanes: **local** (in this process), **remote** (over HTTP, on a live server, by a client
without weights) and **beside** (as an invoke between two others, whose hidden states are NaN and
1e30). What comes out is held against plain PyTorch hooks and autograd on the bare module.

| sign | verdict |
|---|---|
| `=` | the same to the bit |
| `~` | the same within the bound of `testing/same.py`: float32 to 1e-5 of the largest magnitude, \
bfloat16 at most 1.5 times as far from float32 as the plain run |
| `refused` | an error that says why, and the way out; listed below |
| `FAILED` | other numbers, or another error |
| `.` | what the case needs is not there yet; never counted as passed |

`tests/conformance/must_work.txt` lists cells that must not be refused. At most 5 % of all may be.
"""
_LANES = {
    "local": "Local",
    "remote": "Remote; in case 7 among 31 requests of strangers, which fail, take their time, are "
    "full of NaN and try to change weights",
    "beside": "Beside neighbours",
}


def page(cells: Sequence[Cell], versions: str) -> str:
    """The whole page."""
    parts = [_HEAD, _cases(), f"With {versions}, on the CPU: {_counts(cells)}.\n"]
    parts += [_table(lane, [one for one in cells if one.lane == lane]) for lane in NAMES]
    return "\n".join([*parts, *_listed(cells)])


def _cases() -> str:
    rows = [f"| {case.number} | {case.title} |" for case in CASES]
    return "\n".join(["| case | what |", "|---|---|", *rows, ""])


def _counts(cells: Sequence[Cell]) -> str:
    counts = Counter(one.verdict for one in cells)
    said = [f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]]
    return f"{len(cells)} cells, {', '.join(said)}"


def _table(lane: str, cells: Sequence[Cell]) -> str:
    """Families by cases; in a cell float32, then bfloat16."""
    numbers = [case.number for case in CASES]
    rows = []
    for family, mine in groupby(cells, key=lambda one: one.family):
        signs: dict[int, list[str]] = {number: [] for number in numbers}
        for one in mine:
            signs[one.case].append(SIGNS[one.verdict])
        rows.append(f"| {family} | {' | '.join(' '.join(signs[n]) for n in numbers)} |")
    head = [
        f"## {_LANES[lane]}",
        "",
        "In each cell: float32, bfloat16.",
        "",
        f"| family | {' | '.join(map(str, numbers))} |",
        f"|---|{'---|' * len(numbers)}",
    ]
    return "\n".join([*head, *rows, ""])


def _listed(cells: Sequence[Cell]) -> list[str]:
    """Every cell that is refused, failed or not there, with its reason."""
    odd = [one for one in cells if one.reason]
    if not odd:
        return []
    rows = [f"| {one.key} | {SIGNS[one.verdict]} | {one.reason} |" for one in _joined(odd)]
    return ["## By name", "", "| cell | verdict | reason |", "|---|---|---|", *rows, ""]


def _joined(cells: Sequence[Cell]) -> list[Cell]:
    """Cells of one verdict and reason as one, with `*` where they differ."""
    found: dict[tuple[int, str, str], Cell] = {}
    for one in cells:
        key = one.case, one.verdict, one.reason.replace("|", r"\|")
        seen = found.setdefault(key, one)
        found[key] = Cell(
            seen.family if seen.family == one.family else "*",
            one.case,
            seen.dtype if seen.dtype == one.dtype else "*",
            seen.lane if seen.lane == one.lane else "*",
            one.verdict,
            key[2],
        )
    return list(found.values())
