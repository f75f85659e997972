"""A home of a test's own, so that nothing is found of whoever runs the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def own_home(patch: pytest.MonkeyPatch, folder: Path, **environ: str) -> None:
    """State, data and configuration lie in this folder, and no setting is made but `environ`."""
    for name in ("STATE", "DATA", "CONFIG"):
        patch.setenv(f"XDG_{name}_HOME", str(folder / name.lower()))
    for name in [name for name in os.environ if name.startswith("WEFT_")]:
        patch.delenv(name)
    for name, value in environ.items():
        patch.setenv(name, value)
