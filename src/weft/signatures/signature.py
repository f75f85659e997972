"""Signatures: what each site of a model looks like for one input layout, learnt without weights.

    signatures = Signatures(lambda: skeleton)             # one for each model
    sig = signatures.for_call((ids,), {})                 # -> Signature
    sig.site("transformer.h.3", "output", 0).leaves       # (((), float32[1, 9, 768]),): see `sites`

The first call of a layout costs one fake pass of the model; later ones a look-up. From the second
batch or length on, sites are formulas in batch and length (`regions` says how far they reach).
Where somebody else has the model, an `Asker` is asked instead (`asking`), and no pass is made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import nn

from weft.errors import GraphError

from .asking import Asker, at_hand
from .expressions import Formulas
from .inside import Inside
from .layouts import Family, Point, family_of, kind_of, layout_of
from .learn import Facts, Row, Table
from .passes import Passes
from .reading import decode
from .regions import Box, Region
from .rules import Rules
from .second import Pair
from .shapes import Look
from .sites import Signature, SiteSignature
from .structure import Opaque, Plain
from .tables import Area, Exact, Kind, Said, Span, encode
from .telling import Telling

__all__ = ["Facts", "Opaque", "Plain", "Signature", "Signatures", "SiteSignature"]

# Layouts remembered for each model; a signature is small, a fresh one costs a pass or a formula.
REMEMBERED = 1024


class _Known:
    """The signatures of one layout, by what the numbers of the watched inputs are like."""

    def __init__(self, watched: frozenset[int]) -> None:
        self.watched = watched
        self.signatures: dict[tuple[str | bytes, ...], Signature] = {}


class _Kin:
    """The calls of one family. `watched` are the inputs whose numbers the model reads; `idle` the
    looks whose answer does nothing, by all looks of the pass."""

    def __init__(self) -> None:
        self.watched: frozenset[int] = frozenset()
        self.idle: dict[tuple[Look, ...], frozenset[int]] = {}
        self.regions: dict[Any, Region] = {}


_LEARNING = threading.RLock()
"""One pass at a time in the process: the ids of PyTorch's hooks are not drawn safely by threads."""


class Signatures:
    """The signatures of one model; safe to use from several threads.

    `module_provider()` gives the module, on meta or real. `real()` gives it with weights, for
    forwards that cannot be faked. `device` is where the model will run (default: where the weights
    are, or the CPU for weights on meta). `state()` tells, if given, how the model stands now
    (dtype, mode): when that changes, everything is learnt anew. With an `asker` nothing is learnt
    by passes: what the tables do not cover is asked, once for each layout.
    """

    def __init__(
        self,
        module_provider: Callable[[], nn.Module],
        real: Callable[[], nn.Module] | None = None,
        device: torch.device | str | None = None,
        state: Callable[[], object] = lambda: None,
        asker: Asker | None = None,
        telling: Telling | None = None,
    ) -> None:
        self._passes = Passes(module_provider, real, device, telling)

        def made(telling: Telling | None, asker: Asker | None) -> Signatures:
            return Signatures(module_provider, real, device, state, asker, telling)

        self.inside = Inside(module_provider, made, state, asker)
        """What is inside the forwards: sources, and the sites of their operations."""
        self._asker = asker
        self._state = state
        # Who asks, waits: the lock of all passes must not be held meanwhile, nor may others of
        # this model who need no answer be kept.
        self._turn: AbstractContextManager = _LEARNING if asker is None else threading.RLock()
        self._lock = _LEARNING if asker is None else threading.RLock()
        self._learnt_in: object = state()
        self._known: dict[Any, _Known] = {}
        self._kin: dict[Family, _Kin] = {}
        self.rules = Rules(self._passes.device_of, asker)
        self.kept: dict[str, Any] = {}
        """What others make of this model, by names of their own."""

    @property
    def passes(self) -> int:
        """Exact passes so far."""
        return self._passes.count

    def state(self) -> object:
        """How the model stands now: when that changes, nothing of before holds."""
        return self._state()

    def second(self, pair: Callable[[nn.Module], Pair]) -> Table:
        """The exact table of the second of two calls: see `second.learn_second`."""
        with _LEARNING:
            return self._passes.second(pair)

    def of_table(self, table: Table) -> Signature:
        """The signature of a pass that is known exactly."""
        return self.of_rows(table, table.rows.__getitem__)

    def of_rows(self, table: Table, row: Callable[[int], Row]) -> Signature:
        """That of a pass whose names are those of `table`, and whose rows are told when needed."""
        return Signature(table, row, self.rules)

    def for_call(self, args: tuple, kwargs: dict) -> Signature:
        """The signature of `module(*args, **kwargs)`."""
        state = self._state()
        if state != self._learnt_in:
            self._start_anew(state)
        layout, tensors = layout_of(args, kwargs)
        found = self._remembered(layout, tensors)
        if found is not None:
            return found
        with self._lock:
            kin, family, found = self._find_out(layout, tensors, args, kwargs)
            if found is None and self._asker is None:
                found = self._learn(kin, family, tensors, args, kwargs)
                self._remember(layout, tensors, kin.watched, found)
        return found or self._ask(layout, tensors, args, kwargs)

    def _remembered(self, layout: Any, tensors: list[torch.Tensor]) -> Signature | None:
        known = self._known.get(layout)
        return None if known is None else known.signatures.get(_kinds(tensors, known.watched))

    def _start_anew(self, state: object) -> None:
        """Forgets what was known of the model before it was cast or switched."""
        with self._lock:
            if state != self._learnt_in:
                self.clear()
                self._learnt_in = state

    def clear(self) -> None:
        """Forgets everything; for a model whose code or options have changed."""
        with self._lock:
            self._known.clear()
            self._kin.clear()
            self.rules.clear()
            self.inside.clear()

    # -- bytes -----------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """All that is known for families of calls, as compressed data."""
        with self._lock:
            return encode([_kind(family, kin) for family, kin in self._kin.items()])

    def add_bytes(self, data: bytes) -> None:
        """Takes what `to_bytes` of another one gave. Raises GraphError for other bytes.

        What it does not cover is still learnt from the module, or asked.
        """
        said = decode(data)
        with self._lock:
            self._take(said)

    def answer(self, args: tuple, kwargs: dict) -> bytes:
        """For a client that asks about this call: the call as it is, and what is known of its kin.

        Of a new kind of call a second size is learnt, so that the client need not ask for others.
        """
        with self._lock:
            signature = self.for_call(args, kwargs)
            layout, tensors = layout_of(args, kwargs)
            family = family_of(args, kwargs)
            kinds = []
            if family:
                kin = self._kin.setdefault(family[0], _Kin())
                self._widen(kin, *family, tensors)
                kinds.append(_kind(family[0], kin))
            watched = tuple(sorted(self._known[layout].watched))
            return encode(kinds, [Exact(signature.exact(), watched)])

    def formulas(self, args: tuple, kwargs: dict) -> tuple[Formulas, Point] | None:
        """The sites of this call as formulas in batch and length, and its own; None where there
        are none. A second size may have to be learnt for it."""
        with self._lock:
            self.for_call(args, kwargs)
            _, tensors = layout_of(args, kwargs)
            family = family_of(args, kwargs)
            if family is None:
                return None
            kin = self._kin.setdefault(family[0], _Kin())
            region = self._region(kin, *family, tensors)
            if region is None:
                return None
            if region.find(family[1]) is None:
                self._widen(kin, *family, tensors)
            found = region.find(family[1])
            return None if found is None else (found, family[1])

    def _widen(self, kin: _Kin, family: Family, point: Point, tensors: list[torch.Tensor]) -> None:
        region = self._region(kin, family, point, tensors)
        if region is not None and not region.boxes and region.patience:
            for near in _near(point):
                table = region.probe(near)
                if table is not None:
                    region.add(near, table)
                    return

    def _take(self, said: Said) -> None:
        for kind in said.kinds:
            kin = self._kin.setdefault(kind.family, _Kin())
            kin.watched |= frozenset(kind.watched)
            for area in kind.areas:
                region = self._open(kin, kind.family, area.floor, dict(area.kinds), area.fill)
                region.take([Box(s.formulas, s.low, s.high) for s in area.spans])

    # -- asking ----------------------------------------------------------------------------------

    def _ask(self, layout: Any, tensors: list, args: tuple, kwargs: dict) -> Signature:
        with self._turn:
            with self._lock:  # another thread may have been faster
                _, _, found = self._find_out(layout, tensors, args, kwargs)
            if found is not None:
                return found
            exact = self._asked(args, kwargs)
            if any(number >= len(tensors) for number in exact.watched):
                raise GraphError("the answer is for a call with more inputs than this one has")
            found = Signature(exact.table, exact.table.rows.__getitem__, self.rules)
            with self._lock:
                self._remember(layout, tensors, frozenset(exact.watched), found)
            return found

    def _asked(self, args: tuple, kwargs: dict) -> Exact:
        """What the asker says of a call; what it says beside that is kept."""
        assert self._asker is not None
        said = decode(self._asker.signature(args, kwargs))
        if len(said.exact) != 1:
            raise GraphError("the signature of one call was asked for, and is not in the answer")
        with self._lock:
            self._take(said)
        return said.exact[0]

    # -- a layout not seen before ----------------------------------------------------------------

    def _find_out(
        self, layout: Any, tensors: list, args: tuple, kwargs: dict
    ) -> tuple[_Kin, tuple[Family, Point] | None, Signature | None]:
        """(what is known of its kin, its family, the signature if no exact pass is needed)"""
        family = family_of(args, kwargs)
        kin = self._kin.setdefault(family[0], _Kin()) if family else _Kin()
        known = self._known.get(layout)
        if known is not None:  # another thread may have been faster
            found = self._remembered(layout, tensors)
            if found is not None:
                return kin, family, found
            kin.watched |= known.watched
        found = self._derive(kin, *family, tensors) if family else None
        if found is not None:
            self._remember(layout, tensors, kin.watched, found)
        return kin, family, found

    def _remember(
        self, layout: Any, tensors: list, watched: frozenset[int], signature: Signature
    ) -> None:
        known = self._known.get(layout)
        if known is None or known.watched != watched:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            known = self._known[layout] = _Known(watched)
        if len(known.signatures) >= REMEMBERED:
            known.signatures.clear()
        known.signatures[_kinds(tensors, watched)] = signature

    def _derive(
        self, kin: _Kin, family: Family, point: Point, tensors: list[torch.Tensor]
    ) -> Signature | None:
        region = self._region(kin, family, point, tensors)
        if region is None:
            return None
        formulas = region.find(point)
        if formulas is None and self._asker is None:
            formulas = region.reach(point)
        if formulas is None:
            return None

        def row(index: int) -> Row:
            found = formulas.row(index, point)
            return exact().rows[index] if found is None else found

        @cache
        def exact() -> Table:
            with self._turn:
                table = region.probe(point)
            if table is None:
                raise LookupError(f"no pass succeeds at batch and length {point}")
            return table

        return Signature(formulas.like, row, self.rules)

    def _learn(
        self,
        kin: _Kin,
        family: tuple[Family, Point] | None,
        tensors: list[torch.Tensor],
        args: tuple,
        kwargs: dict,
    ) -> Signature:
        table = self._passes.must(args, kwargs)
        kin.watched |= self._mattering(kin, table, tensors, args, kwargs)
        region = self._region(kin, *family, tensors) if family else None
        if family and region:
            region.add(family[1], table)
        return Signature(table, table.rows.__getitem__, self.rules)

    def _region(
        self, kin: _Kin, family: Family, point: Point, tensors: list[torch.Tensor]
    ) -> Region | None:
        """The region of a call; None where its numbers are of no kind that could be made again."""
        kinds = {number: kind_of(tensors[number]) for number in sorted(kin.watched)}
        if any(isinstance(kind, bytes) for kind in kinds.values()):
            return None
        floor = 1 if point[0] == 1 else 2, 1 if point[1] == 1 else 2
        return self._open(kin, family, floor, kinds, _first_integer(tensors))  # type: ignore[arg-type]

    def _open(
        self, kin: _Kin, family: Family, floor: Point, kinds: dict[int, str], fill: int
    ) -> Region:
        key = (floor, tuple(kinds.items()))
        if key not in kin.regions:

            def probe(at: Point) -> Table | None:
                given = family.inputs(at, kinds, fill)
                if self._asker is not None:
                    return self._asked(*at_hand(*given)).table
                return self._passes.try_(*given)

            kin.regions[key] = Region(probe, floor, fill)
        return kin.regions[key]

    def _mattering(
        self, kin: _Kin, table: Table, tensors: list[torch.Tensor], args: tuple, kwargs: dict
    ) -> frozenset[int]:
        """The inputs whose numbers decide what the pass looks like."""
        looked = frozenset().union(*[look.inputs for look in table.looks])
        if not any(isinstance(kind_of(tensors[number]), bytes) for number in looked):
            return looked  # masks are cheap to watch
        if table.looks not in kin.idle:
            numbers = range(len(table.looks))
            idle = [n for n in numbers if self._is_idle(table, n, args, kwargs)]
            kin.idle[table.looks] = frozenset(idle)
        idle = kin.idle[table.looks]
        rest = [look.inputs for n, look in enumerate(table.looks) if n not in idle]
        return frozenset().union(*rest)

    def _is_idle(self, table: Table, number: int, args: tuple, kwargs: dict) -> bool:
        """Whether the pass is the same when this look comes out the other way."""
        if not table.looks[number].truth:
            return False
        other = self._passes.try_(args, kwargs, number)
        return other is not None and other.rows == table.rows and other.looks == table.looks


def _kind(family: Family, kin: _Kin) -> Kind:
    areas = [_area(*item) for item in kin.regions.items()]
    return Kind(family, tuple(sorted(kin.watched)), areas)


def _near(point: Point) -> list[Point]:
    """Sizes at which a second pass tells most: longer, else shorter; of one token, more rows."""
    batch, length = point
    if length > 1:
        return [(batch, length + 11), (batch, max(2, length // 2))]
    return [(batch + 3, 1)] if batch > 1 else []


def _area(key: tuple[Point, tuple], region: Region) -> Area:
    floor, kinds = key
    spans = [Span(box.formulas, box.low, box.high) for box in region.known()]
    return Area(floor, kinds, region.fill, spans)


def _kinds(tensors: list[torch.Tensor], watched: frozenset[int]) -> tuple[str | bytes, ...]:
    """What the numbers of the watched inputs are like."""
    if not watched:
        return ()
    return tuple([kind_of(tensors[number]) for number in sorted(watched)])


def _first_integer(tensors: list[torch.Tensor]) -> int:
    """A token id that is certain to be valid."""
    for tensor in tensors:
        if not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
            return int(tensor.reshape(-1)[0])
    return 0
