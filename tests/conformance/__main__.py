"""`./run conformance [FAMILY ...]`: the cells of these families, of all without a name.

They are kept in `.conformance/`, and docs/conformance.md is written as soon as every family has
cells of the sources as they are: so the table can be made family by family. The exit code is 1 if a
cell failed, if one that must work was refused, or if more than 5 % were.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from .kept import kept, versions
from .models import FAMILIES
from .suite import faults, must_work, of_family
from .table import page
from .verdicts import Cell

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
MOST_PROCESSES = 4


def main(names: Sequence[str]) -> int:
    """Runs the cells of these families, of all without a name."""
    unknown = sorted(set(names) - set(FAMILIES))
    if unknown:
        print(f"no family {unknown[0]!r}; there are {', '.join(FAMILIES)}", file=sys.stderr)
        return 2
    _run([name for name in FAMILIES if name in names or not names])
    found = {name: cells for name in FAMILIES if (cells := kept(name)) is not None}
    cells = [one for name in FAMILIES for one in found.get(name, ())]
    missing = [name for name in FAMILIES if name not in found]
    if missing:
        print(f"no page yet: nothing of {', '.join(missing)}", file=sys.stderr)
    else:
        PAGE.write_text(page(cells, versions()))
        print(f"{PAGE.name} is written", file=sys.stderr)
    return _judge(cells, whole=not missing)


def _run(families: Sequence[str]) -> None:
    """Side by side; one alone needs no process of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"  # threads of a server too round as the oracle does
    count = min(MOST_PROCESSES, os.cpu_count() or 1, len(families))
    if count == 1:
        for name in families:
            of_family(name)
        return
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(of_family, families))


def _judge(cells: Sequence[Cell], whole: bool) -> int:
    found = faults(cells, must_work(), whole)
    print("\n".join(found or ["conforms"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
