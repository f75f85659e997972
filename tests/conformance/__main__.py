"""`./run conformance [FAMILY ...]`: all cells, side by side; writes docs/conformance.md.

With families, only these, and nothing is written. The exit code is 1 if a cell failed, if one that
must work was refused, or if more than 5 % were.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from .lanes import Places
from .models import FAMILIES
from .suite import faults, must_work, run, served
from .table import page
from .verdicts import Cell

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
MOST_PROCESSES = 4


def cells_of(family: str) -> list[Cell]:
    """All cells of a family, with a server of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # a look at a server is announced
    start = time.perf_counter()
    with served() as server:
        cells = list(run(Places(server), (family,)))
    print(f"{family}: {len(cells)} cells, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return cells


def main(names: Sequence[str]) -> int:
    """Runs the cells of these families, of all without a name."""
    unknown = sorted(set(names) - set(FAMILIES))
    if unknown:
        print(f"no family {unknown[0]!r}; there are {', '.join(FAMILIES)}", file=sys.stderr)
        return 2
    families = [name for name in FAMILIES if name in names or not names]
    count = min(MOST_PROCESSES, os.cpu_count() or 1, len(families))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context) as pool:
        cells = [cell for found in pool.map(cells_of, families) for cell in found]
    text = page(cells, _versions())
    if names:
        print(text)
    else:
        PAGE.write_text(text)
        print(f"{PAGE.name} is written", file=sys.stderr)
    found = faults(cells, must_work())
    print("\n".join(found or ["conforms"]))
    return 1 if found else 0


def _versions() -> str:
    import transformers

    return (
        f"PyTorch {torch.__version__.partition('+')[0]} and transformers {transformers.__version__}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
