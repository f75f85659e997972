"""Signatures as bytes: what a service hands to clients that have no weights, or no `transformers`.

    data = encode(kinds)                         # compressed JSON, a few kB for 12 layers
    said = reading.decode(data)                  # Said(kinds, exact, applied)

Everything that occurs twice is written once: trees, leaves, and whole rows but for their path, with
storages counted backwards from the newest, so that the layers of a model become equal.
No code is in it: classes of containers are names, looked up among those already here.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from weft.graph.site import Leaf
from weft.kernels.aval import Aval, dtype_name

from .expressions import Formulas, Layout, Number, Size, Sum
from .layouts import Point, Slot
from .learn import Facts, Table
from .structure import Plain, Tree, native

VERSION = 1


class Exact(NamedTuple):
    """One call as it is: no formulas. `watched` are the inputs whose numbers decide."""

    table: Table
    watched: tuple[int, ...]


class Applied(NamedTuple):
    """What a module gives for given arguments: see `rules.Result`."""

    tree: Tree
    leaves: tuple[tuple[Leaf, Any], ...]
    alias: tuple[int | None, ...]


class Said(NamedTuple):
    """What bytes say."""

    kinds: list[Kind]
    exact: list[Exact]
    applied: list[Applied]


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
    exact: list[tuple[int, tuple[int, ...]]] = []  # (form, watched)
    applied: list[tuple[int, list, list[int], list[int | None]]] = []  # (tree, keys, leaves, alias)


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


def encode(
    known: Sequence[Kind] = (), exact: Sequence[Exact] = (), applied: Sequence[Applied] = ()
) -> bytes:
    """`Kind`s whose `family` is a `Family` and whose spans hold `Formulas`; calls; results."""
    return zlib.compress(msgspec.json.encode(_Writer().tables(known, exact, applied)), 9)


class _Writer:
    """Gives everything a number."""

    def __init__(self) -> None:
        self._trees, self._leaves, self._bodies = _Pool(), _Pool(), _Pool()
        self._names, self._forms = _Pool(), _Pool()

    def tables(
        self, known: Sequence[Kind], exact: Sequence[Exact], applied: Sequence[Applied]
    ) -> Tables:
        kinds = [self._kind(kind) for kind in known]
        calls = [(self._form(Formulas(t, t.rows)), watched) for t, watched in exact]
        results = [self._applied(one) for one in applied]
        return Tables(
            VERSION,
            self._trees.items,
            self._leaves.items,
            self._bodies.items,
            self._names.items,
            self._forms.items,
            kinds,
            calls,
            results,
        )

    def _kind(self, kind: Kind) -> Kind:
        parts = [[one.__name__, _input_out(leaf)] for one, leaf in kind.family.leaves]
        family = [self._tree(kind.family.tree), parts]
        return Kind(family, kind.watched, [self._area(area) for area in kind.areas])

    def _area(self, area: Area) -> Area:
        spans = [Span(self._form(span.formulas), span.low, span.high) for span in area.spans]
        return Area(area.floor, area.kinds, area.fill, spans)

    def _form(self, formulas: Formulas) -> int:
        paths, numbers, newest = [], [], 0
        for like, row in zip(formulas.like.rows, formulas.rows, strict=True):
            whole = like if row is None else row
            facts, newest = _facts_out(whole.facts, newest)
            what = None if row is None else [self._leaf(w) for w in row.what]
            body = [whole.port, whole.call, self._tree(whole.tree), whole.keys, what, facts]
            paths.append(like.path)
            numbers.append(self._bodies.add(body))
        aliases = sorted(formulas.like.aliases.items())
        return self._forms.add([self._names.add(["\n".join(paths), aliases]), numbers])

    def _applied(self, one: Applied) -> tuple[int, list, list[int], list[int | None]]:
        keys = [key for key, _ in one.leaves]
        leaves = [self._leaf(what) for _, what in one.leaves]
        return self._tree(one.tree), keys, leaves, [*one.alias]

    def _leaf(self, leaf: Any) -> int:
        return self._leaves.add(_leaf_out(leaf))

    def _tree(self, tree: Tree) -> int:
        return self._trees.add(_tree_out(tree))


def _tree_out(tree: Tree) -> Any:
    if tree is None:
        return None
    kind, keys, children = tree
    return native(kind), keys, [_tree_out(child) for child in children]


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


def _leaf_out(leaf: Any) -> list:
    if isinstance(leaf, (Aval, Layout)):
        shape, stride = map(_number_out, leaf.shape), map(_number_out, leaf.stride)
        return ["t", dtype_name(leaf.dtype), *shape, *stride, _number_out(leaf.offset)]
    if isinstance(leaf, Size):
        return ["n", _number_out(leaf.value)]
    if isinstance(leaf, Plain):
        return ["p", type(leaf.value).__name__, _plain_out(leaf.value)]
    return ["o", leaf.kind]


def _input_out(leaf: Any) -> Any:
    return [leaf.dims, dtype_name(leaf.dtype)] if isinstance(leaf, Slot) else _plain_out(leaf)


def _plain_out(value: Any) -> Any:
    return value.hex() if isinstance(value, float) else value  # JSON has no inf and no nan


def _number_out(number: Number) -> Any:
    return [number.divisor, *number.terms] if isinstance(number, Sum) else number
