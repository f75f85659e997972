"""Thousands of strangers' graphs through one model: it is afterwards what it was, bit for bit.

tally = walk("counting", seed=0, count=300)
print(tally)
"""

from __future__ import annotations

import random
import re
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from traceback import walk_tb

import weft
from tests.fuzz.graphs import Maker
from tests.fuzz.targets import TARGETS, Target
from tests.run.nets import hook_count
from weft.errors import WeftError
from weft.graph.node import Call, Graph


class ChangedError(AssertionError):
    """The model is not what it was. `seed` makes the graph that did it."""


@dataclass
class Tally:
    """What became of the graphs: `refused` before the model ran, for `reasons` while it did."""

    graphs: int = 0
    done: int = 0
    failed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    operations: set[str] = field(default_factory=set)
    kinds: Counter[str] = field(default_factory=Counter)
    mark: str = ""

    @property
    def admitted(self) -> int:
        return self.done + self.failed

    def __str__(self) -> str:
        refused = self.refused.total()
        return (
            f"{self.graphs} graphs: {self.done} done, {self.failed} failed while they ran, "
            f"{refused} refused; {len(self.operations)} operations; weights {self.mark[:16]}"
        )


def walk(name: str, seed: int, count: int, every: int = 1) -> Tally:
    """Draws `count` graphs; `every` so many the model is looked at, and after the last.

    Raises `ChangedError`, and whatever an error of ours would not explain.
    """
    target = TARGETS[name]()
    before = target.mark()
    tally = Tally(mark=before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(seed, seed + count):
            maker = Maker(target, random.Random(f"{name} {number}"))
            attempt(target, *maker.make(), tally)
            if number % every == 0 or number == seed + count - 1:
                _look(target, before, number)
    return tally


def attempt(target: Target, graph: Graph, frames: dict, tally: Tally) -> None:
    """One graph. Raises what is neither a refusal nor an operation's own error."""
    tally.graphs += 1
    try:
        opened = target.admitted(graph, frames)
    except WeftError as error:
        tally.refused[_reason(error, error.message)] += 1
        return
    tally.operations |= {node.op for node in graph.nodes if isinstance(node, Call)}
    tally.kinds.update(type(node).__name__ for node in graph.nodes)
    try:
        target.drawn(opened)
    except WeftError as error:
        tally.failed += 1
        tally.reasons[_reason(error, error.message)] += 1
    except Exception as error:
        if not hasattr(error, "weft_line") and is_ours(error):
            raise
        tally.reasons[_reason(error, str(error))] += 1
        tally.failed += 1  # an operation's own, or the model's: an id that is no word
    else:
        tally.done += 1


def _reason(error: Exception, text: str) -> str:
    return f"{type(error).__name__}: {re.sub(r'[0-9]+', 'N', text)[:90]}"


def is_ours(error: BaseException) -> bool:
    """Whether Weft itself raised it, and not what it called."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(Path(weft.__file__).parent)


def _look(target: Target, before: str, number: int) -> None:
    if target.mark() != before:
        raise ChangedError(f"the model has changed: at graph {number}, or shortly before")
    assert hook_count(target.net) == 0
