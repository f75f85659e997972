"""Where formulas hold: boxes of (batch, length) whose corners were checked by exact passes.

A model's structure may switch at some size (a sliding window, a limit on batch times length, a
rope for long contexts), and no fit says where. What is assumed is only that such a switch is a
threshold: once passed in one direction it stays passed. So formulas that hold at the lowest and at
the highest corner of a box hold inside it, and outside of all boxes nothing is derived.

    region = Region(probe)                # probe(point) -> Table or None
    region.add((1, 9), table)             # what a first exact pass showed
    region.add((1, 20), other)            # probes once above, and fits
    region.find((1, 33))                  # Formulas
    region.find((1, 90))                  # None: beyond what was probed
    region.reach((1, 90))                 # probes above, and gives the formulas if they still hold
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .expressions import Formulas, fit, same_form
from .layouts import Point
from .learn import Table

# Probes above what was asked for, so that the next longer prompt costs nothing. Odd numbers, far
# from powers of two, at which models round or switch.
BATCHES = (7, 37, 131, 521)
LENGTHS = (67, 257, 1031, 4099)

# Attempts that came to nothing before a region gives up and stays exact.
PATIENCE = 6


@dataclass
class Box:
    """Formulas, and the corners between which they hold. They do not at `over` and `under`."""

    formulas: Formulas
    low: Point
    high: Point
    over: list[Point] = field(default_factory=list)
    under: list[Point] = field(default_factory=list)

    def holds(self, point: Point) -> bool:
        return _below(self.low, point) and _below(point, self.high)


class Region:
    """The boxes of one family of calls, for inputs of one kind, on one side of batch 1 and length 1
    (where layouts degenerate)."""

    def __init__(self, probe: Callable[[Point], Table | None], floor: Point, fill: int = 0) -> None:
        self.boxes: list[Box] = []
        self.patience = PATIENCE
        self.probed: dict[Point, Table | None] = {}
        self.probe = probe
        self.fill = fill  # a token id that is valid
        self._floor = floor  # smallest sizes of the region
        self._loose: dict[Point, Table] = {}  # exact passes that lie in no box

    def known(self) -> list[Box]:
        """The boxes; an exact pass that lies in none is a box of one point."""
        lone = [Box(Formulas(t, t.rows), at, at) for at, t in self._loose.items()]
        return [*self.boxes, *[box for box in lone if self.find(box.low) is None]]

    def take(self, boxes: list[Box]) -> None:
        """Takes boxes that somebody else has checked; those inside others are left out."""
        for box in boxes:
            if not any(known.holds(box.low) and known.holds(box.high) for known in self.boxes):
                inside = [k for k in self.boxes if box.holds(k.low) and box.holds(k.high)]
                self.boxes = [*[k for k in self.boxes if k not in inside], box]

    def find(self, point: Point) -> Formulas | None:
        """Formulas known to hold at `point`."""
        for box in self.boxes:
            if box.holds(point):
                return box.formulas
        return None

    def reach(self, point: Point) -> Formulas | None:
        """Formulas that hold at `point` after all, by growing a box; `probed` is what that cost."""
        self.probed.clear()
        for box in self.boxes:
            if self.patience and self._grow_up(box, point) and self._grow_down(box, point):
                return box.formulas
        return None

    def add(self, point: Point, table: Table) -> None:
        """Takes an exact pass, and fits formulas when there are two of one form."""
        self._loose[point] = table
        if len(self._loose) < 2 or not self.patience:
            return
        if not self._fit(point, margin=True) and not self._fit(point, margin=False):
            self.patience -= 1

    def _fit(self, point: Point, margin: bool) -> bool:
        like = self._loose[point]
        tables = {at: table for at, table in self._loose.items() if same_form(like, table)}
        if len(tables) < 2:
            return False
        low, high = _meet(tables), _join(tables)
        if margin:
            high = _above(high, self._floor)
        for corner in (low, high, (low[0], high[1])):
            if corner not in tables:
                tables[corner] = found = self.probe(corner)  # type: ignore[assignment]
                if found is None:
                    return False
        formulas = fit(tables) if len(tables) > 2 else None
        if formulas is None:
            return False
        self.boxes.append(Box(formulas, low, high))
        self._loose = {at: table for at, table in self._loose.items() if at not in tables}
        return True

    def _grow_up(self, box: Box, point: Point) -> bool:
        want = _join((box.high, point))
        if want == box.high:
            return True
        for corner in dict.fromkeys((_above(want, self._floor), want)):
            known = any(_below(failed, corner) for failed in box.over)
            if not known and self._check(box, corner, box.over):
                box.high = corner
                return True
        return False

    def _grow_down(self, box: Box, point: Point) -> bool:
        want = _meet((box.low, point))
        if want == box.low:
            return True
        for corner in dict.fromkeys((self._floor, want)):
            known = any(_below(corner, failed) for failed in box.under)
            if not known and self._check(box, corner, box.under):
                box.low = corner
                return True
        return False

    def _check(self, box: Box, corner: Point, failed: list[Point]) -> bool:
        table = self.probed[corner] = self.probe(corner)
        if table is not None and box.formulas.holds(table, corner):
            return True
        failed.append(corner)
        self.patience -= 1
        return False


def _below(one: Point, other: Point) -> bool:
    return one[0] <= other[0] and one[1] <= other[1]


def _meet(points: object) -> Point:
    batches, lengths = zip(*points, strict=True)  # type: ignore[call-overload]
    return min(batches), min(lengths)


def _join(points: object) -> Point:
    batches, lengths = zip(*points, strict=True)  # type: ignore[call-overload]
    return max(batches), max(lengths)


def _above(point: Point, floor: Point) -> Point:
    """The next larger corner worth a probe; a size that is 1 in the whole region stays 1."""
    batch, length = point
    return (
        1 if floor[0] == 1 else next((n for n in BATCHES if n > batch), batch),
        1 if floor[1] == 1 else next((n for n in LENGTHS if n > length), length),
    )
