"""The page that the suite writes: docs/conformance.md, from cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby

from .cases import CASES
from .lanes import NAMES
from .models import FAMILIES
from .verdicts import BITWISE, BOUNDED, FAILED, REFUSED, VERDICTS, Cell

SIGNS = {BITWISE: "=", BOUNDED: "~", REFUSED: "refused", FAILED: "FAILED"}

_HEAD = """\
# Conformance

Written by `./run conformance`, which runs every cell; do not edit. The tests run some of them.

Each case is one source that runs on a small random model of each family, in float32 and bfloat16,
in three lanes: **local** (in this process), **remote** (over HTTP, on a live server, by a client
without weights) and **beside** (as an invoke between two others, whose hidden states are NaN and
1e30: families whose rows may share a forward share it, others take turns). What comes out is held
against plain PyTorch hooks, autograd and `generate` of `transformers` on the bare module.

| sign | verdict |
|---|---|
| `=` | the same to the bit: everything where kernels and shapes are those of the plain run |
| `~` | the same within the bound of `testing/same.py`: float32 to 1e-5 of the largest magnitude, \
bfloat16 in the mean at most 1.5 times as far from float32 as the plain run. Only where shapes are \
others, which [the end of this page](#by-name) lists with the part of the bound that was used |
| `refused` | an error that says why, and the way out; at the end of this page too |
| `FAILED` | other numbers, or another error |

Every cell has one of these: none is left out. `tests/conformance/must_work.txt` lists cells that
must not be refused; at most 5 % of all may be. In case 7 requests of strangers are served before
and after, and share its pass. Where several jobs are on their way at once (cases 6 and 7) each also
runs with `alone=True`, which must be the same to the bit.
"""
_LANES = {
    "local": "Local",
    "remote": "Remote; in case 7 among 31 requests of strangers, which fail, take their time, are "
    "full of NaN and try to change weights",
    "beside": "Beside neighbours; in case 7 among 31, which read, take their time, are full of NaN "
    "and 1e30",
}
_NAMED = 6
"""More families than this are counted, or those named that are not meant."""


def page(cells: Sequence[Cell], versions: str) -> str:
    """The whole page."""
    parts = [_HEAD, _cases(), f"With {versions}, on the CPU:\n", _counts(cells)]
    parts += [_table(lane, [one for one in cells if one.lane == lane]) for lane in NAMES]
    return "\n".join([*parts, *_listed(cells)])


def _cases() -> str:
    rows = [f"| {case.number} | {case.title} |" for case in CASES]
    return "\n".join(["| case | what |", "|---|---|", *rows, ""])


# -- counts ----------------------------------------------------------------------------------------


def _counts(cells: Sequence[Cell]) -> str:
    """How many cells have which verdict: of all, of a dtype, of a lane, of a case."""
    groups: list[tuple[str, Callable[[Cell], bool]]] = [("all", lambda one: True)]
    groups += [(name, lambda one, name=name: one.dtype == name) for name in ("float32", "bfloat16")]
    groups += [(name, lambda one, name=name: one.lane == name) for name in NAMES]
    groups += [
        (f"case {case.number}", lambda one, number=case.number: one.case == number)
        for case in CASES
    ]
    rows = [_count(name, [one for one in cells if belongs(one)]) for name, belongs in groups]
    head = f"| | cells | {' | '.join(VERDICTS)} |"
    return "\n".join([head, f"|---|---|{'---|' * len(VERDICTS)}", *rows, ""])


def _count(name: str, cells: Sequence[Cell]) -> str:
    counts = Counter(one.verdict for one in cells)
    parts = [
        f"{counts[verdict]} ({100 * counts[verdict] / len(cells):.1f} %)"
        if counts[verdict]
        else "0"
        for verdict in VERDICTS
    ]
    return f"| {name} | {len(cells)} | {' | '.join(parts)} |"


# -- a lane ----------------------------------------------------------------------------------------


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


# -- reasons ---------------------------------------------------------------------------------------


def _listed(cells: Sequence[Cell]) -> list[str]:
    """Every cell that is not to the bit, with its reason: cells of one case and reason in a row."""
    groups: dict[tuple[int, str, str], list[Cell]] = {}
    odd = [one for one in cells if one.verdict != BITWISE]
    for one in sorted(odd, key=lambda one: (-VERDICTS.index(one.verdict), one.case)):
        groups.setdefault((one.case, one.verdict, one.reason), []).append(one)
    head = ["case", "cells", "verdict", "reason", "families", "dtype", "lane"]
    rows = [_row(verdict, reason, mine) for (_, verdict, reason), mine in groups.items()]
    line = f"|{'---|' * len(head)}"
    return ["## By name", "", f"| {' | '.join(head)} |", line, *rows, ""] if rows else []


def _row(verdict: str, reason: str, cells: Sequence[Cell]) -> str:
    reason = reason.replace("|", r"\|")
    if verdict == BOUNDED:
        reason += f" (at most {100 * max(one.share for one in cells):.0f} % of the bound)"
    columns = [
        f"{cells[0].case}",
        f"{len(cells)}",
        SIGNS[verdict],
        reason,
        _families(dict.fromkeys(one.family for one in cells)),
        ", ".join(dict.fromkeys(one.dtype for one in cells)),
        ", ".join(dict.fromkeys(one.lane for one in cells)),
    ]
    return f"| {' | '.join(columns)} |"


def _families(names: dict[str, None]) -> str:
    """By name where they are few, else by those that are missing."""
    others = [name for name in FAMILIES if name not in names]
    if not others:
        return "all"
    if len(names) <= max(_NAMED, len(others)):
        return ", ".join(names)
    return f"all but {', '.join(others)}"
