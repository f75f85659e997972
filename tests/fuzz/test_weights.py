"""Weights after ten thousand strangers' graphs; `python -m tests.fuzz graphs` draws others."""

from __future__ import annotations

import os
import random

import pytest

from tests.fuzz import targets, weights
from tests.fuzz.graphs import Maker
from tests.fuzz.samples import ALL, samples
from tests.fuzz.targets import Target
from tests.fuzz.weights import ChangedError, walk
from weft.engine.opened import Opened
from weft.wire.frames import write

GRAPHS = int(os.environ.get("WEFT_TEST_GRAPHS", "10000"))
"""In all: a fifth goes through the language model, which takes longer for each."""
COUNTS = {"counting": GRAPHS - GRAPHS // 5, "tiny": GRAPHS // 5}
KINDS = {"Read", "Write", "Fill", "Call", "Apply", "Param", "Const", "Save", "Log", "Guard"}


@pytest.mark.slow
@pytest.mark.timeout(300 + GRAPHS // 20)
@pytest.mark.parametrize("name", COUNTS)
def test_the_weights_are_what_they_were(name: str) -> None:
    """One model through all of them; `walk` looks every 50 graphs, and after the last."""
    tally = walk(name, seed=0, count=COUNTS[name], every=50)
    assert tally.graphs == COUNTS[name]
    assert tally.mark == targets.TARGETS[name]().mark()
    # or the model was never in danger:
    assert tally.done > 0.8 * tally.graphs, tally.refused + tally.reasons
    assert set(tally.kinds) == KINDS | {"Backward", "Grad"}
    assert tally.operations <= ALL
    assert len(tally.operations) > min(500, tally.graphs)


def test_there_is_a_call_of_every_operation() -> None:
    assert set(samples()) == ALL


def test_the_same_seed_makes_the_same_graphs() -> None:
    target = targets.counting()
    (one, given), (other, again) = (Maker(target, random.Random(5)).make() for _ in range(2))
    assert one == other
    assert write(given) == write(again)
    assert Maker(target, random.Random(6)).make()[0] != one


@pytest.mark.parametrize("every", [1, 50])
def test_a_weight_that_changes_is_seen(monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """By one graph of three, without a new version, also where the model is looked at later."""
    drawn: list[Opened] = []

    def spoil(target: Target, opened: Opened) -> None:
        drawn.append(opened)
        if len(drawn) == 2:
            target.net.get_parameter("blocks.1.linear.bias").data[3] += 1e-7

    monkeypatch.setattr(weights.Target, "drawn", spoil)
    with pytest.raises(ChangedError):
        walk("counting", seed=0, count=3, every=every)
    assert len(drawn) == (2 if every == 1 else 3)
