"""Signatures as bytes: what a service hands to clients that have no weights, or no `transformers`.

    data = encode(signatures.known())            # compressed JSON, a few kB for 12 layers
    known = decode(data)

Everything that occurs twice is written once: trees, leaves, and whole rows but for their path, with
storages counted backwards from the newest, so that the layers of a model become equal.
No code is in it: classes of containers are names, looked up among those already imported.
"""

from __future__ import annotations

import zlib
from typing import Any

import msgspec
import torch
from msgspec import Struct

from weft.errors import GraphError
from weft.kernels.aval import Aval, dtype_name

from .expressions import Formulas, Layout, Number, Size, Sum
from .layouts import Family, Point, Slot
from .learn import Facts, Row, Table
from .structure import Opaque, Plain, Tree

VERSION = 1
LARGEST = 64 << 20  # bytes of JSON that are worth reading

_KINDS = {kind.__name__: kind for kind in (type(None), bool, int, float, str)}


class Span(Struct, array_like=True):
    """Formulas (by number) and the corners between which they hold."""

    formulas: Any
    low: Point
    high: Point


class Area(Struct, array_like=True):
    """A region: its smallest sizes, the kinds of numbers of watched inputs, and its boxes."""

    floor: Point
    kinds: tuple[tuple[int, str], ...]
    fill: int
    spans: list[Span]


class Kind(Struct, array_like=True):
    """A family of calls and what is known of it."""

    family: Any
    watched: tuple[int, ...]
    areas: list[Area]


class Tables(Struct, array_like=True):
    """All that crosses. Later fields name things of the earlier ones by number."""

    version: int
    trees: list[Any]
    leaves: list[list]
    bodies: list[list]
    names: list[tuple[str, list[tuple[str, str]]]]  # (paths joined by line ends, aliases)
    forms: list[tuple[int, list[int]]]
    kinds: list[Kind]


class _Pool:
    """Things by number, each once."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._number: dict[bytes, int] = {}

    def add(self, item: Any) -> int:
        key = msgspec.json.encode(item)
        if key not in self._number:
            self._number[key] = len(self.items)
            self.items.append(item)
        return self._number[key]


def encode(known: list[Kind]) -> bytes:
    """`Kind`s whose `family` is a `Family` and whose spans hold `Formulas`."""
    trees, leaves, bodies, names, forms = _Pool(), _Pool(), _Pool(), _Pool(), _Pool()

    def form(formulas: Formulas) -> int:
        paths, numbers, newest = [], [], 0
        for like, row in zip(formulas.like.rows, formulas.rows, strict=True):
            whole = like if row is None else row
            facts, newest = _facts_out(whole.facts, newest)
            what = None if row is None else [leaves.add(_leaf_out(w)) for w in row.what]
            body = [whole.port, whole.call, trees.add(whole.tree), whole.keys, what, facts]
            paths.append(like.path)
            numbers.append(bodies.add(body))
        aliases = sorted(formulas.like.aliases.items())
        return forms.add([names.add(["\n".join(paths), aliases]), numbers])

    def family(of: Family) -> list:
        parts = [[kind.__name__, _input_out(leaf)] for kind, leaf in of.leaves]
        return [trees.add(of.tree), parts]

    kinds = [
        Kind(
            family(kind.family),
            kind.watched,
            [
                Area(
                    a.floor,
                    a.kinds,
                    a.fill,
                    [Span(form(s.formulas), s.low, s.high) for s in a.spans],
                )
                for a in kind.areas
            ],
        )
        for kind in known
    ]
    tables = Tables(
        VERSION, trees.items, leaves.items, bodies.items, names.items, forms.items, kinds
    )
    return zlib.compress(msgspec.json.encode(tables), 9)


def decode(data: bytes) -> list[Kind]:
    """The reverse of `encode`. Raises GraphError for anything that it cannot have written."""
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(data, LARGEST)
        if unpacker.unconsumed_tail:
            raise ValueError(f"more than {LARGEST} bytes")
        tables = msgspec.json.decode(raw, type=Tables)
        if tables.version != VERSION:
            raise ValueError(f"version {tables.version}, this is {VERSION}")
        return _Reader(tables).kinds()
    except (zlib.error, ValueError, TypeError, LookupError, AttributeError) as error:
        raise GraphError(f"these bytes are no table of signatures: {error}") from error


class _Reader:
    """Undoes the numbering."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._trees = [_tree_in(tree) for tree in tables.trees]
        self._leaves = [_leaf_in(leaf) for leaf in tables.leaves]
        self._forms = [self._form(*form) for form in tables.forms]

    def kinds(self) -> list[Kind]:
        for kind in self._tables.kinds:
            number, parts = kind.family
            leaves = tuple([_input_in(name, leaf) for name, leaf in parts])
            kind.family = Family(self._trees[number], leaves)
            for area in kind.areas:
                for span in area.spans:
                    span.formulas = self._forms[span.formulas]
        return self._tables.kinds

    def _form(self, names: int, numbers: list[int]) -> Formulas:
        joined, aliases = self._tables.names[names]
        like, rows, newest = [], [], 0
        for path, number in zip(joined.split("\n"), numbers, strict=True):
            port, call, tree, keys, what, facts = self._tables.bodies[number]
            facts, newest = _facts_in(facts, newest)
            leaves = tuple([self._leaves[n] for n in what or ()])
            keys = tuple([tuple(key) for key in keys])
            row = Row(path, port, call, self._trees[tree], keys, leaves, facts)
            like.append(row)
            rows.append(None if what is None else row)
        return Formulas(Table(tuple(like), dict(aliases)), tuple(rows))


def _facts_out(facts: tuple[Facts | None, ...], newest: int) -> tuple[list, int]:
    """Groups count back from the newest, which is 1; a new one is 0."""
    out: list[Any] = []
    for fact in facts:
        if fact is None:
            out.append(None)
            continue
        out.append([newest - fact.group, fact.overwritten + 2 * fact.tied])
        newest = max(newest, fact.group + 1)
    return out, newest


def _facts_in(facts: list, newest: int) -> tuple[tuple[Facts | None, ...], int]:
    out: list[Facts | None] = []
    for fact in facts:
        if fact is None:
            out.append(None)
            continue
        back, flags = fact
        out.append(Facts(newest - back, bool(flags & 1), bool(flags & 2)))
        newest = max(newest, newest - back + 1)
    return tuple(out), newest


def _tree_in(tree: Any) -> Tree:
    if tree is None:
        return None
    kind, keys, children = tree
    return str(kind), tuple(keys), tuple([_tree_in(child) for child in children])


def _leaf_out(leaf: Any) -> list:
    if isinstance(leaf, (Aval, Layout)):
        shape, stride = map(_number_out, leaf.shape), map(_number_out, leaf.stride)
        return ["t", dtype_name(leaf.dtype), *shape, *stride, _number_out(leaf.offset)]
    if isinstance(leaf, Size):
        return ["n", _number_out(leaf.value)]
    if isinstance(leaf, Plain):
        return ["p", type(leaf.value).__name__, _plain_out(leaf.value)]
    return ["o", leaf.kind]


def _leaf_in(leaf: list) -> Any:
    form, *rest = leaf
    if form == "t":
        dtype = _dtype(rest[0])
        *numbers, offset = map(_number_in, rest[1:])
        rank = len(numbers) // 2
        made = Layout(tuple(numbers[:rank]), tuple(numbers[rank:]), offset, dtype)
        fixed = all(type(n) is int for n in (*numbers, offset))
        return made.at((1, 1)) if fixed else made
    if form == "n":
        number = _number_in(rest[0])
        return Size(number) if isinstance(number, Sum) else Plain(number)
    if form == "p":
        return Plain(_plain_in(*rest))
    if form == "o":
        return Opaque(str(rest[0]))
    raise ValueError(f"an unknown leaf {form!r}")


def _input_out(leaf: Any) -> Any:
    return [leaf.dims, dtype_name(leaf.dtype)] if isinstance(leaf, Slot) else _plain_out(leaf)


def _input_in(kind: str, leaf: Any) -> tuple[type, Any]:
    if kind == Slot.__name__:
        return Slot, Slot(tuple(leaf[0]), _dtype(leaf[1]))
    return _KINDS[kind], _plain_in(kind, leaf)


def _plain_out(value: Any) -> Any:
    return value.hex() if isinstance(value, float) else value  # JSON has no inf and no nan


def _plain_in(kind: str, value: Any) -> Any:
    made = float.fromhex(value) if kind == "float" else value
    if type(made) is not _KINDS[kind]:
        raise ValueError(f"{made!r} is no {kind}")
    return made


def _number_out(number: Number) -> Any:
    return [number.divisor, *number.terms] if isinstance(number, Sum) else number


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
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no dtype {name!r}")
    return found
