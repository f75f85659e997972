"""Verdicts: what a cell of the conformance table can be, and who comes to it.

    judge = Judge(subject)
    judge.same(got, lambda net: with_hooks(net, hooks, ids)["h"])     # the oracle, on a bare module

What "the same" means is `weft.testing.same`; the worst comparison of a cell decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weft.errors import InputError, LimitError, RecordingError, UnknownOptionError, WeftError
from weft.testing.same import bitwise, bounded, moves

from .models import Subject

BITWISE, BOUNDED, REFUSED, FAILED, ABSENT = VERDICTS = (
    "bitwise",
    "bounded",
    "refused",
    "failed",
    "not there yet",
)
_REFUSALS = (InputError, LimitError, RecordingError, UnknownOptionError)


class NotThereYet(Exception):
    """The library does not have what the case is about."""


@dataclass(frozen=True)
class Cell:
    """One verdict. `reason` says why where it is not that numbers are the same."""

    family: str
    case: int
    dtype: str
    lane: str
    verdict: str
    reason: str = ""

    @property
    def key(self) -> str:
        """As in `must_work.txt`."""
        return f"{self.family} {self.case} {self.dtype} {self.lane}"


class Judge:
    """Compares, and remembers the worst that it has seen."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self.verdict = BITWISE

    def same(self, got: Any, oracle: Callable[[nn.Module], Any]) -> None:
        """Raises `AssertionError` unless `got` is what the oracle gives, to the bit or within the
        bound. For half precision the oracle also runs on the same weights in float32."""
        subject = self._subject
        expected = oracle(subject.net)
        try:
            bitwise(got, expected)
        except AssertionError:
            half = subject.dtype is not torch.float32
            bounded(got, expected, oracle(subject.reference) if half else None)
            self.verdict = BOUNDED

    def exact(self, got: Any, expected: Any) -> None:
        """Raises unless two are the same to the bit."""
        bitwise(got, expected)

    def moves(self, edited: Any, base: Any) -> None:
        """Raises unless an edit is seen in the output: else two lost edits would be the same."""
        moves(edited, base)

    def raises(self, kind: type[Exception], pattern: str, do: Callable[[], object]) -> None:
        """Raises unless `do` raises this, with a message that has the pattern."""
        try:
            do()
        except kind as error:
            assert re.search(pattern, f"{error}"), f"{error} does not say {pattern!r}"
            return
        raise AssertionError(f"no {kind.__name__} about {pattern!r}")


def judged(family: str, case: int, dtype: str, lane: str, run: Callable[[], str]) -> Cell:
    """The cell of a case: `run` gives a verdict, or raises."""
    try:
        return Cell(family, case, dtype, lane, run())
    except NotThereYet as absent:
        return Cell(family, case, dtype, lane, ABSENT, str(absent))
    except _REFUSALS as error:
        return Cell(family, case, dtype, lane, REFUSED, _one_line(error))
    except (AssertionError, WeftError, RuntimeError, ValueError, TypeError, LookupError) as error:
        return Cell(family, case, dtype, lane, FAILED, _one_line(error))


def _one_line(error: Exception) -> str:
    text = error.message if isinstance(error, WeftError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"
