"""The suite: every cell of families x cases x dtypes x lanes, or some of them.

for cell in run(families=("gpt2",), lanes=("local",)):
    print(cell.key, cell.verdict)
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from .cases import CASES, Case
from .kept import keep, sources
from .lanes import NAMES, Places
from .models import DTYPES, FAMILIES, Subject, make
from .verdicts import FAILED, REFUSED, Cell, Judge, judged

MUST_WORK = Path(__file__).parent / "must_work.txt"
MOST_REFUSED = 0.05
"""The part of all cells that may be refused."""


def run(
    places: Places,
    families: Sequence[str] = FAMILIES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    lanes: Sequence[str] = NAMES,
    cases: Sequence[Case] = CASES,
) -> Iterator[Cell]:
    """The verdicts, family by family."""
    for family in families:
        for dtype in dtypes:
            subject = make(family, dtype)
            for lane in lanes:
                for case in cases:
                    yield cell(places, subject, lane, case)
            places.close(subject)


def cell(places: Places, subject: Subject, lane: str, case: Case) -> Cell:
    """One verdict."""

    def tried() -> Judge:
        where = places.lane(subject, lane)
        judge = Judge(subject, where.shapes)
        case.run(where, judge)
        return judge

    return judged(subject.name, case.number, str(subject.dtype)[6:], lane, tried)


def must_work() -> list[str]:
    """Patterns of cells whose refusal is a failure: `family case dtype lane`, with `*`."""
    lines = [line.partition("#")[0].split() for line in MUST_WORK.read_text().splitlines()]
    return [" ".join(line) for line in lines if line]


def faults(cells: Sequence[Cell], patterns: Sequence[str], whole: bool = True) -> list[str]:
    """What is not as it should be; nothing where the suite is passed.

    How many cells may be refused is a part of the `whole` table, and asked of that only.
    """
    found = [f"{one.key}: failed: {one.reason}" for one in cells if one.verdict == FAILED]
    refused = [one for one in cells if one.verdict == REFUSED]
    for one in refused:
        if any(fnmatchcase(one.key, pattern) for pattern in patterns):
            found.append(f"{one.key}: refused, and must work: {one.reason}")
    if whole and len(refused) > MOST_REFUSED * len(cells):
        found.append(f"{len(refused)} of {len(cells)} cells are refused, more than 5 %")
    return found


def served(**settings: Any) -> Any:
    """The server of the remote lane, for a `with` block."""
    from weft.testing.service import serve

    return serve({}, **settings)


def of_family(family: str) -> None:
    """All cells of a family, with a server of its own; they are kept."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # a look at a server is announced
    start, of = time.perf_counter(), sources()
    with served() as server:
        cells = list(run(Places(server), (family,)))
    keep(family, cells, of)
    print(f"{family}: {len(cells)} cells, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    for one in cells:
        if one.verdict in (REFUSED, FAILED):
            print(f"  {one.key} {one.verdict}: {one.reason}", file=sys.stderr)
