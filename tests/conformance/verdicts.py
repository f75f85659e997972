"""Verdicts: what a cell of the conformance table can be, and who comes to it.

    judge = Judge(subject)
    judge.same(got, lambda net: with_hooks(net, hooks, ids)["h"])     # the oracle, on a bare module

What "the same" means is `weft.testing.same`; the worst comparison of a cell decides. Kernels and
shapes that are those of the oracle give its bits: within the bound is enough only where a case or
a lane says why they are others, and the cell then says so.
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

BITWISE, BOUNDED, REFUSED, FAILED = VERDICTS = ("bitwise", "bounded", "refused", "failed")
_REFUSALS = (InputError, LimitError, RecordingError, UnknownOptionError)


@dataclass(frozen=True)
class Cell:
    """One verdict. `reason` says why where it is not that all bits are the same; `share` is the
    largest part of the bound that a comparison used, 0 where all were to the bit."""

    family: str
    case: int
    dtype: str
    lane: str
    verdict: str
    reason: str = ""
    share: float = 0.0

    @property
    def key(self) -> str:
        """As in `must_work.txt`."""
        return f"{self.family} {self.case} {self.dtype} {self.lane}"


class Judge:
    """Compares, and remembers the worst that it has seen.

    `shapes` says why this lane computes with other shapes than the oracle; empty where it does not.
    """

    def __init__(self, subject: Subject, shapes: str = "") -> None:
        self._subject = subject
        self._shapes = shapes
        self._reasons: list[str] = []
        self.share = 0.0

    @property
    def verdict(self) -> str:
        return BOUNDED if self._reasons else BITWISE

    @property
    def reason(self) -> str:
        """Why numbers are the same within the bound only; empty where they are to the bit."""
        return "; ".join(self._reasons)

    def same(self, got: Any, oracle: Callable[[nn.Module], Any], shapes: str = "") -> None:
        """Raises `AssertionError` unless `got` is what the oracle gives: to the bit, or, where
        `shapes` (else the lane) says why the shapes are others, within the bound.

        For half precision the oracle also runs on the same weights in float32."""
        subject, why = self._subject, shapes or self._shapes
        expected = oracle(subject.net)
        try:
            bitwise(got, expected)
        except AssertionError:
            if not why:
                raise
            half = subject.dtype is not torch.float32
            part = bounded(got, expected, oracle(subject.reference) if half else None)
            self.share = max(self.share, part)
            if why not in self._reasons:
                self._reasons.append(why)

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


def judged(family: str, case: int, dtype: str, lane: str, run: Callable[[], Judge]) -> Cell:
    """The cell of a case: `run` gives the judge that has seen it, or raises."""
    try:
        seen = run()
    except _REFUSALS as error:
        return Cell(family, case, dtype, lane, REFUSED, _one_line(error))
    except Exception as error:  # noqa: BLE001 whatever it is, this cell has failed and says so
        return Cell(family, case, dtype, lane, FAILED, _one_line(error))
    return Cell(family, case, dtype, lane, seen.verdict, seen.reason, seen.share)


def _one_line(error: Exception) -> str:
    text = error.message if isinstance(error, WeftError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"
