"""The way back from bytes to signatures. What comes from elsewhere is believed in nothing.

    said = decode(data)          # GraphError for what `tables.encode` cannot have written

Sizes, references and work are bounded, containers are only of harmless classes (`structure`), and
every row fits its structure: what is decoded can be used like what was learnt here.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from weft.errors import GraphError
from weft.graph.inside import is_port
from weft.graph.site import Leaf
from weft.kernels.aval import Aval

from .expressions import LARGEST, Formulas, Layout, Number, Size, Sum
from .layouts import FULL, HOLES, RANGE, Family, Point, Slot
from .learn import Facts, Row, Table
from .structure import Opaque, Plain, Tree, foreign
from .tables import VERSION, Applied, Area, Exact, Kind, Said, Tables

JSON_BYTES = 16 << 20
MOST_LEAVES = 4_000_000
"""Leaves of all rows together: rows are written once and may be named often."""

_PLAIN = {kind.__name__: kind for kind in (type(None), bool, int, float, str)}


def decode(data: bytes) -> Said:
    """What the bytes say. Raises GraphError for anything that `encode` cannot have written."""
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(data, JSON_BYTES)
        if unpacker.unconsumed_tail or not unpacker.eof:
            raise ValueError(f"they are cut off, or more than {JSON_BYTES} bytes")
        tables = msgspec.json.decode(raw, type=Tables)
        if tables.version != VERSION:
            raise ValueError(f"version {tables.version}, this is {VERSION}")
        return _Reader(tables).said()
    except _UNREADABLE as error:
        raise GraphError(f"these bytes are no table of signatures: {error}") from None


_UNREADABLE = (
    *(zlib.error, msgspec.DecodeError, ValueError, TypeError, LookupError, AttributeError),
    *(ArithmeticError, RecursionError),
)


class _Reader:
    """Undoes the numbering."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._work = MOST_LEAVES
        self._trees = [_tree_in(tree) for tree in tables.trees]
        self._keys = [_keys_of(tree) for tree in self._trees]
        self._leaves = [_leaf_in(leaf) for leaf in tables.leaves]
        self._bodies = [self._body(*body) for body in tables.bodies]
        self._names = [(joined.split("\n"), dict(aliases)) for joined, aliases in tables.names]
        self._forms = [self._form(*form) for form in tables.forms]

    def said(self) -> Said:
        tables = self._tables
        return Said(
            [self._kind(kind) for kind in tables.kinds],
            [self._exact(form, watched) for form, watched in tables.exact],
            [self._applied(*one) for one in tables.applied],
        )

    # -- rows ------------------------------------------------------------------------------------

    def _body(
        self, port: str, call: int, tree: int, keys: list, what: list | None, facts: list
    ) -> tuple[Row, list, bool]:
        """(a row but for path and facts, its facts as written, whether its leaves are known)"""
        _require(is_port(port) and _is_count(call), "an unknown port")
        known = self._at(self._keys, tree)
        _require(known == tuple([tuple(key) for key in keys]), "keys of another structure")
        leaves = tuple([self._at(self._leaves, n) for n in what or ()])
        if what is not None:
            _check_leaves(leaves, facts)
        _require(len(facts) == len(known) and (what is None or len(what) == len(known)), "leaves")
        row = Row("", port, call, self._trees[tree], known, leaves, ())
        return row, facts, what is not None

    def _form(self, names: int, numbers: list[int]) -> Formulas:
        paths, aliases = self._at(self._names, names)
        like, rows, newest = [], [], 0
        if len(paths) != len(numbers):
            raise ValueError("paths and rows do not match")
        for path, number in zip(paths, numbers, strict=True):
            body, written, is_known = self._at(self._bodies, number)
            self._spend(1 + len(written))
            facts, newest = _facts_in(written, newest)
            row = body._replace(path=path, facts=facts)
            like.append(row)
            rows.append(row if is_known else None)
        return Formulas(Table(tuple(like), aliases), tuple(rows))

    def _spend(self, leaves: int) -> None:
        self._work -= leaves
        _require(self._work >= 0, f"more than {MOST_LEAVES} leaves")

    def _at(self, pool: Sequence[Any], number: int) -> Any:
        """The thing of this number: never counted from the end."""
        _require(type(number) is int and 0 <= number < len(pool), "a number of nothing")
        return pool[number]

    # -- what is said ----------------------------------------------------------------------------

    def _kind(self, kind: Kind) -> Kind:
        number, parts = kind.family
        leaves = tuple([_input_in(name, leaf) for name, leaf in parts])
        _require(len(leaves) == len(self._at(self._keys, number)), "inputs of another structure")
        tensors = sum([isinstance(leaf, Slot) for _, leaf in leaves])
        _require(all(0 <= n < tensors for n in kind.watched), "a watched input that is not there")
        areas = [self._area(area, kind.watched) for area in kind.areas]
        return Kind(Family(self._trees[number], leaves), kind.watched, areas)

    def _area(self, area: Area, watched: tuple[int, ...]) -> Area:
        for number, kind in area.kinds:
            _require(number in watched and kind in (FULL, HOLES, RANGE), "numbers of unknown kind")
        _require(set(area.floor) <= {1, 2}, "a floor is 1 or 2")
        for span in area.spans:
            span.formulas = self._at(self._forms, span.formulas)
            _require(_is_inside(area.floor, span.low) and _is_inside(span.low, span.high), "a box")
        return area

    def _exact(self, form: int, watched: tuple[int, ...]) -> Exact:
        formulas = self._at(self._forms, form)
        fixed = [row for row in formulas.rows if row is not None and _is_fixed(row)]
        _require(len(fixed) == len(formulas.rows), "a call with formulas")
        tensors = sum([isinstance(what, Aval) for what in fixed[0].what]) if fixed else 0
        _require(all(0 <= n < tensors for n in watched), "a watched input that is not there")
        return Exact(formulas.like, watched)

    def _applied(self, tree: int, keys: list, leaves: list[int], alias: list) -> Applied:
        known = self._at(self._keys, tree)
        _require(known == tuple([tuple(key) for key in keys]), "keys of another structure")
        what = [self._at(self._leaves, n) for n in leaves]
        _require(len(what) == len(known) == len(alias), "leaves")
        _require(not any(isinstance(one, (Layout, Size)) for one in what), "a result with formulas")
        return Applied(self._trees[tree], tuple(zip(known, what, strict=True)), tuple(alias))


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"it cannot be read: {what}")


def _is_count(number: Any) -> bool:
    return type(number) is int and number >= 0


def _is_inside(low: Point, high: Point) -> bool:
    return low[0] <= high[0] and low[1] <= high[1]


def _is_fixed(row: Row) -> bool:
    return not any(isinstance(what, (Layout, Size)) for what in row.what)


def _check_leaves(leaves: tuple, facts: list) -> None:
    """Tensors have facts, and nothing else has."""
    for what, fact in zip(leaves, facts, strict=True):
        _require(isinstance(what, (Aval, Layout)) == (fact is not None), "facts of no tensor")


def _facts_in(facts: list, newest: int) -> tuple[tuple[Facts | None, ...], int]:
    out: list[Facts | None] = []
    for fact in facts:
        if fact is None:
            out.append(None)
            continue
        back, flags = fact
        _require(_is_count(back) and back <= newest and flags in (0, 1, 2, 3), "an unknown fact")
        out.append(Facts(newest - back, bool(flags & 1), bool(flags & 2)))
        newest = max(newest, newest - back + 1)
    return tuple(out), newest


# -- structures and leaves -----------------------------------------------------------------------


def _tree_in(tree: Any) -> Tree:
    if tree is None:
        return None
    kind, keys, children = tree
    _require(type(kind) is str and len(keys) == len(children), "an unknown structure")
    _require(all(type(key) in (str, int) for key in keys), "a key that is no text or number")
    _require(len(set(keys)) == len(keys), "a key that is there twice")
    if kind in ("tuple", "list"):
        _require(list(keys) == list(range(len(keys))), "items out of order")
    return foreign(kind), tuple(keys), tuple([_tree_in(child) for child in children])


def _keys_of(tree: Tree) -> tuple[Leaf, ...]:
    """The key paths of the leaves of a structure."""
    if tree is None:
        return ((),)
    pairs = zip(tree[1], tree[2], strict=True)
    return tuple([(key, *rest) for key, child in pairs for rest in _keys_of(child)])


def _leaf_in(leaf: list) -> Any:
    form, *rest = leaf
    if form == "t":
        return _layout_in(*rest)
    if form == "n":
        number = _number_in(rest[0])
        return Size(number) if isinstance(number, Sum) else Plain(number)
    if form == "p":
        return Plain(_plain_in(*rest))
    if form == "o" and type(rest[0]) is str:
        return Opaque(rest[0])
    raise ValueError(f"an unknown leaf {form!r}")


def _layout_in(dtype: str, *written: Any) -> Aval | Layout:
    *numbers, offset = map(_number_in, written)
    rank, rest = divmod(len(numbers), 2)
    _require(not rest and rank <= 64, "a shape without strides")
    made = Layout(tuple(numbers[:rank]), tuple(numbers[rank:]), offset, _dtype(dtype))
    if any(type(n) is not int for n in (*numbers, offset)):
        return made
    check_layout(made.shape, made.stride, offset)
    return made.at((1, 1))


def check_layout(shape: Sequence[Any], stride: Sequence[Any], offset: Any) -> None:
    """Raises ValueError where no tensor can have this layout: PyTorch counts bytes in 63 bits."""
    _require(all(map(_is_count, (*shape, *stride, offset))), "a size that is none")
    extent = offset + sum([(n - 1) * step for n, step in zip(shape, stride, strict=True) if n])
    _require(max(extent, math.prod(shape), *shape) * 16 <= LARGEST, "a size out of bounds")


def _input_in(kind: str, leaf: Any) -> tuple[type, Any]:
    if kind != Slot.__name__:
        return _PLAIN[kind], _plain_in(kind, leaf)
    dims, dtype = leaf
    _require(all(dim in ("B", "S") or _is_count(dim) for dim in dims), "an unknown dimension")
    return Slot, Slot(tuple(dims), _dtype(dtype))


def _plain_in(kind: str, value: Any) -> Any:
    made = float.fromhex(value) if kind == "float" else value
    if type(made) is not _PLAIN[kind]:
        raise ValueError(f"{made!r} is no {kind}")
    return made


def _number_in(number: Any) -> Number:
    if type(number) is int:
        return number
    divisor, *terms = number
    if type(divisor) is not int or divisor < 1:
        raise ValueError("a divisor must be positive")
    return Sum(tuple([_term(*term) for term in terms]), divisor)


def _term(c: int, i: int, j: int) -> tuple[int, int, int]:
    if not (type(c) is int and i in (0, 1, 2) and j in (0, 1, 2)):
        raise ValueError("an unknown term")
    return c, i, j


def _dtype(name: str) -> torch.dtype:
    found = vars(torch).get(name) if type(name) is str else None
    if not isinstance(found, torch.dtype):
        raise ValueError("an unknown dtype")
    return found
