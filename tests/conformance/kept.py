"""Cells of a family that were found, kept in a file until the sources change.

    keep("gpt2", cells, sources())      # of when the cells were begun
    kept("gpt2")               # the cells; None where they are of other sources, or of none

So the table can be made in pieces, and goes on where it was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .verdicts import Cell

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER = ROOT / ".conformance"
_SOURCES = (
    "src/weft",
    "tests/conformance",
    "tests/families/zoo.py",
    "tests/language/autograd.py",
    "tests/language/generated.py",
    "tests/language/hooks.py",
)
"""The library, the cases, their models and their oracles."""
_SAYS = ("__main__.py", "table.py", "test_cells.py")
"""Files of the suite that decide no verdict."""


def keep(family: str, cells: Sequence[Cell], of: str) -> None:
    """Writes down cells of these sources, in place of those of an earlier run."""
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps({"sources": of, "cells": [asdict(one) for one in cells]}, indent=1)
    place = FOLDER / f"{family}.json"
    draft = place.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(place)


def kept(family: str) -> list[Cell] | None:
    """The cells of an earlier run, if the sources and versions are still those of that run."""
    place = FOLDER / f"{family}.json"
    if not place.exists():
        return None
    found = json.loads(place.read_text())
    if found["sources"] != sources():
        return None
    return [Cell(**one) for one in found["cells"]]


def sources() -> str:
    """A hash of all that decides the verdicts."""
    digest = hashlib.sha256(versions().encode())
    for name in _SOURCES:
        place = ROOT / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            if path.parent != HERE or path.name not in _SAYS:
                digest.update(f"{path.relative_to(ROOT)}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def versions() -> str:
    """What the cells were found with."""
    import torch
    import transformers

    import weft

    return (
        f"Weft {weft.__version__}, PyTorch {torch.__version__.partition('+')[0]}, transformers "
        f"{transformers.__version__} and Python {platform.python_version()} "
        f"({sys.platform}, {platform.machine()})"
    )
