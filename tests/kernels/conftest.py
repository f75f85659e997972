"""The calls that the tests of the operation table share."""

from __future__ import annotations

import pytest

from . import byhand, opdb
from .compare import distinct
from .opdb import Sample


@pytest.fixture(scope="session")
def drawn() -> list[Sample]:
    """Two samples of each operation and dtype from PyTorch's tests, and those made by hand."""
    return distinct((*opdb.calls(2), *byhand.calls()))
