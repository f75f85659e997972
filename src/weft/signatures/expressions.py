"""Expressions: the sites of a model as formulas in batch `B` and length `S`.

Fitted to exact passes at a few points and checked at all of them: every size, stride, offset and
plain integer is a sum of at most two terms `c * B^i * S^j`. Nothing is smoothed: what does not come
out exactly has no expression, and costs an exact pass.

    formulas = fit({(1, 9): table, (1, 20): other, (1, 67): third})
    formulas.row(12, (1, 33))           # what site 12 looks like at length 33
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from math import lcm
from typing import Any, NamedTuple

import torch

from weft.kernels.aval import Aval, intern

from .layouts import Point
from .learn import Row, Table
from .structure import Plain

# Powers of (B, S), simplest first.
POWERS = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2), (2, 0), (2, 1), (2, 2))

LARGEST = 2**62


class Sum(NamedTuple):
    """`(c * B^i * S^j + ...) / divisor` with integer `c`; the terms are (c, i, j)."""

    terms: tuple[tuple[int, int, int], ...]
    divisor: int = 1

    def at(self, point: Point) -> int:
        """The number at a point. Raises ArithmeticError where it is no integer, or no size."""
        batch, length = point
        total = sum([c * batch**i * length**j for c, i, j in self.terms])
        number, rest = divmod(total, self.divisor)
        if rest or not -LARGEST <= number <= LARGEST:
            raise ArithmeticError("not an integer of 63 bits")
        return number


Number = int | Sum


class Layout(NamedTuple):
    """An `Aval` with formulas."""

    shape: tuple[Number, ...]
    stride: tuple[Number, ...]
    offset: Number
    dtype: torch.dtype

    def at(self, point: Point) -> Aval:
        shape = tuple([_number(n, point) for n in self.shape])
        stride = tuple([_number(n, point) for n in self.stride])
        return intern(shape, stride, _number(self.offset, point), self.dtype)


class Size(NamedTuple):
    """A plain integer leaf with a formula."""

    value: Sum

    def at(self, point: Point) -> Plain:
        return Plain(self.value.at(point))


class Formulas(NamedTuple):
    """A table with formulas; a row is None where it has none. `like` gives the names."""

    like: Table
    rows: tuple[Row | None, ...]

    def row(self, index: int, point: Point) -> Row | None:
        """Site `index` at a point, or None where an exact pass has to tell."""
        row = self.rows[index]
        if row is None:
            return None
        try:
            what = [w.at(point) if isinstance(w, (Layout, Size)) else w for w in row.what]
        except ArithmeticError:
            return None
        return row._replace(what=tuple(what))

    def holds(self, table: Table, point: Point) -> bool:
        """Whether an exact pass at `point` shows what the formulas say."""
        if not same_form(self.like, table):
            return False
        rows = enumerate(table.rows)
        return all(self.rows[i] is None or self.row(i, point) == row for i, row in rows)


def _number(number: Number, point: Point) -> int:
    if type(number) is int:
        return number
    found = number.at(point)  # type: ignore[union-attr]
    if found < 0:
        raise ArithmeticError("no size")
    return found


def fit(tables: dict[Point, Table]) -> Formulas | None:
    """Formulas that hold at all the points; None where the passes differ in more than numbers."""
    points, (first, *others) = list(tables), list(tables.values())
    if not all(same_form(first, other) for other in others):
        return None
    known: dict[tuple, Any] = {}
    rows = zip(*[table.rows for table in tables.values()], strict=True)
    return Formulas(first, tuple([_fit_row(row, points, known) for row in rows]))


def same_form(one: Table, other: Table) -> bool:
    """Equal in all but numbers: sites, order, structures, sharing, dtypes, ranks, options."""
    pairs = zip(one.rows, other.rows, strict=False)
    return len(one.rows) == len(other.rows) and all(_same_row(a, b) for a, b in pairs)


def _same_row(one: Row, other: Row) -> bool:
    if one._replace(what=()) != other._replace(what=()):
        return False
    leaves = zip(one.what, other.what, strict=False)
    return len(one.what) == len(other.what) and all(_same_leaf(a, b) for a, b in leaves)


def _same_leaf(one: Any, other: Any) -> bool:
    if isinstance(one, (Aval, Layout)):
        is_tensor = isinstance(other, Aval)
        return is_tensor and one.dtype == other.dtype and len(one.shape) == len(other.shape)
    if one == other or isinstance(one, Size):
        return one == other or (type(other) is Plain and _is_int(other))
    return type(one) is Plain and type(other) is Plain and _is_int(one) and _is_int(other)


def _is_int(plain: Plain) -> bool:
    return type(plain.value) is int


def _fit_row(rows: Sequence[Row], points: list[Point], known: dict[tuple, Any]) -> Row | None:
    what = []
    for leaves in zip(*[row.what for row in rows], strict=True):
        if leaves not in known:
            known[leaves] = _fit_leaf(leaves, points)
        what.append(known[leaves])
    return None if None in what else rows[0]._replace(what=tuple(what))


def _fit_leaf(leaves: tuple, points: list[Point]) -> Any:
    first = leaves[0]
    if all(leaf == first for leaf in leaves):
        return first
    if isinstance(first, Plain):
        number = fit_number([leaf.value for leaf in leaves], points)
        return None if number is None else Size(number)  # type: ignore[arg-type]
    flat = [(*leaf.shape, *leaf.stride, leaf.offset) for leaf in leaves]
    numbers = [fit_number(values, points) for values in zip(*flat, strict=True)]
    if None in numbers:
        return None
    rank = len(first.shape)
    return Layout(tuple(numbers[:rank]), tuple(numbers[rank:-1]), numbers[-1], first.dtype)  # type: ignore[arg-type]


def fit_number(values: Sequence[int], points: list[Point]) -> Number | None:
    """The simplest number or sum that gives `values` at `points`, with a point left to check."""
    if all(value == values[0] for value in values):
        return values[0]
    columns = [[b**i * s**j for b, s in points] for i, j in POWERS]
    for k, column in enumerate(columns):
        ratio = Fraction(values[0], column[0])
        if all(ratio * x == value for x, value in zip(column, values, strict=True)):
            return _sum([(ratio, *POWERS[k])])
    if len(points) < 3:
        return None
    for k, m in combinations(range(len(POWERS)), 2):
        pair = _two_terms(values, columns[k], columns[m])
        if pair is not None:
            return _sum([(pair[0], *POWERS[k]), (pair[1], *POWERS[m])])
    return None


def _two_terms(
    values: Sequence[int], xs: list[int], ys: list[int]
) -> tuple[Fraction, Fraction] | None:
    """(p, q) with `p*x + q*y == value` everywhere, from the first two points that decide it."""
    for i, j in combinations(range(len(values)), 2):
        determinant = xs[i] * ys[j] - xs[j] * ys[i]
        if determinant:
            p = Fraction(values[i] * ys[j] - values[j] * ys[i], determinant)
            q = Fraction(xs[i] * values[j] - xs[j] * values[i], determinant)
            fits = all(p * x + q * y == v for x, y, v in zip(xs, ys, values, strict=True))
            return (p, q) if fits else None
    return None


def _sum(terms: list[tuple[Fraction, int, int]]) -> Sum:
    divisor = lcm(*[c.denominator for c, _, _ in terms])
    return Sum(tuple([(int(c * divisor), i, j) for c, i, j in terms if c]), divisor)
