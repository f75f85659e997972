"""A fresh small model for each test, which must find it as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import weft

from .tower import Tower, prompt, tower, unchanged


@pytest.fixture
def net() -> Iterator[Tower]:
    """A small model; hooks, weights, answers, modes and random state are checked after the test."""
    made = tower()
    with unchanged(made, prompt()):
        yield made


@pytest.fixture
def model(net: Tower) -> weft.Model:
    return weft.Model(net)
