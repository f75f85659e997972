"""Where things lie in a server's data folder."""

from __future__ import annotations

from pathlib import Path


def ledger_of(data: Path) -> Path:
    return data / "weft.sqlite"


def objects_of(data: Path) -> Path:
    return data / "objects"
