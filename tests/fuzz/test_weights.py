"""Weights after hundreds of strangers' graphs; `python -m tests.fuzz graphs` draws thousands."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from tests.fuzz import targets, weights
from tests.fuzz.graphs import Maker
from tests.fuzz.samples import ALL, samples
from tests.fuzz.targets import Target
from tests.fuzz.weights import ChangedError, Tally, walk
from weft.engine.opened import Opened
from weft.wire.frames import write

COUNTS = {"counting": 240, "tiny": 60}


@pytest.fixture(scope="module")
def tallies() -> Iterator[dict[str, Tally]]:
    """What became of the graphs through each model. None of them changed it: `walk` looks."""
    return {name: walk(name, seed=0, count=count) for name, count in COUNTS.items()}


def test_the_weights_are_what_they_were(tallies: dict[str, Tally]) -> None:
    for name, tally in tallies.items():
        assert tally.graphs == COUNTS[name]
        assert tally.mark == targets.TARGETS[name]().mark()


def test_most_graphs_run(tallies: dict[str, Tally]) -> None:
    """Or the model was never in danger."""
    for tally in tallies.values():
        assert tally.done > 0.8 * tally.graphs, tally.refused + tally.reasons


def test_the_graphs_are_of_all_kinds(tallies: dict[str, Tally]) -> None:
    kinds = sum((tally.kinds for tally in tallies.values()), start=type(tallies["tiny"].kinds)())
    wanted = {"Read", "Write", "Fill", "Call", "Apply", "Param", "Const", "Save", "Log", "Guard"}
    assert set(kinds) == wanted | {"Backward", "Grad"}
    assert set.union(*(tally.operations for tally in tallies.values())) <= ALL
    assert len(set.union(*(tally.operations for tally in tallies.values()))) > 500


def test_there_is_a_call_of_every_operation() -> None:
    assert set(samples()) == ALL


def test_the_same_seed_makes_the_same_graphs() -> None:
    target = targets.counting()
    (one, given), (other, again) = (Maker(target, random.Random(5)).make() for _ in range(2))
    assert one == other
    assert write(given) == write(again)
    assert Maker(target, random.Random(6)).make()[0] != one


def test_a_weight_that_changes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(target: Target, opened: Opened) -> None:
        with torch.no_grad():
            target.net.get_parameter("blocks.1.linear.bias")[3] += 1e-7

    monkeypatch.setattr(weights.Target, "drawn", spoil)
    with pytest.raises(ChangedError):
        walk("counting", seed=0, count=3)
