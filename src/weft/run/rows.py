"""One forward for several invokes: each keeps its own rows, padded on the right.

A causal model cannot see what stands to the right, so no mask is needed and the call is of the kind
that each invoke has alone. What is handed out at a site is a private copy of the invoke's rows and
positions, with the strides that they have alone; edits are written back to exactly these. Nothing
that one invoke holds can reach a neighbour's memory.

Which invokes may share a forward, and where their rows lie in each site, is not decided here: a
`Merger` is asked (`engine.merging`), and what it does not offer runs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple, Protocol

import torch

from weft.graph.node import Fill, Skip
from weft.graph.site import Leaf, Site

from .hooks import Drive, find
from .narrow import Head, Narrow, narrow
from .part import ModuleCall, Part
from .steps import Plan
from .structure import at, replaced
from .trunk import Growth, Rows
from .turns import passes, reaches

Dims = tuple[tuple["str | int", ...], ...]
"""Of each dimension its factors: `B` (rows), `S` (positions), and numbers."""


class Piece(NamedTuple):
    """Where the rows of one invoke lie in a tensor of a shared forward.

    `rows` and `length` are the invoke's own, `batch` and `width` those of the forward; `shape` and
    `stride` are what the tensor has where the invoke runs alone. Its positions begin at `start`.
    """

    dims: Dims
    rows: tuple[int, int]
    length: int
    batch: int
    width: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int = 0

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """A private copy of the invoke's part."""
        part, shape = self._part(whole), self.shape
        if part.shape != shape:
            part = part.reshape(shape)
        make = _maker(shape, self.stride)
        if make is None:
            return part.clone(memory_format=torch.contiguous_format)
        return make(shape, self.stride, dtype=whole.dtype, device=whole.device).copy_(part)

    def put(self, whole: torch.Tensor, value: torch.Tensor) -> None:
        """Writes the invoke's part."""
        part = self._part(whole)
        part.copy_(value if value.shape == part.shape else value.reshape(part.shape))

    def _part(self, whole: torch.Tensor) -> torch.Tensor:
        """A view of `whole`, with a dimension for each factor."""
        sizes = _sizes(self.dims, self.batch, self.width)
        view = whole if len(sizes) == whole.dim() else _split(whole, self.dims, sizes)
        if view.shape != sizes:
            for size, got in zip(sizes, view.shape, strict=True):
                if size not in (got, -1):
                    raise ValueError(f"a tensor of {list(whole.shape)} is not of the sizes {sizes}")
        return view[_index(self.dims, self.rows, self.start, self.start + self.length)]


@lru_cache(maxsize=1 << 12)
def _sizes(dims: Dims, batch: int, width: int) -> tuple[int, ...]:
    """The size of each factor; -1 where a dimension is everybody's."""
    named: dict[str | int, int] = {"B": batch, "S": width}
    return tuple([named.get(f, f) for factors in dims for f in factors or (-1,)])  # type: ignore[misc]


@lru_cache(maxsize=1 << 12)
def _index(dims: Dims, rows: tuple[int, int], start: int, stop: int) -> tuple[slice, ...]:
    """An invoke's part, in a view with a dimension for each factor."""
    own = {"B": slice(*rows), "S": slice(start, stop)}
    return tuple([own.get(f, slice(None)) for factors in dims for f in factors or (-1,)])  # type: ignore[call-overload]


@lru_cache(maxsize=1 << 12)
def _maker(shape: tuple[int, ...], stride: tuple[int, ...]) -> Callable[..., torch.Tensor] | None:
    """What makes a tensor with these strides; None where they are those of any new one."""
    if torch.empty(shape, device="meta").stride() == stride:
        return None
    extent = 1 + sum([(n - 1) * s for n, s in zip(shape, stride, strict=True)])
    return torch.empty_strided if extent == prod(shape) else _zeros_strided


def _split(whole: torch.Tensor, dims: Dims, sizes: tuple[int, ...]) -> torch.Tensor:
    """`whole` with a dimension for each factor; splitting one is always a view."""
    place = 0
    for factors in dims:
        count = max(len(factors), 1)
        if count > 1:
            whole = whole.unflatten(place, sizes[place : place + count])
        place += count
    return whole


def _zeros_strided(shape: Any, stride: Any, **options: Any) -> torch.Tensor:
    """As `empty_strided`, and what lies between its elements holds nobody's old numbers."""
    extent = 1 + sum([(n - 1) * s for n, s in zip(shape, stride, strict=True)])
    return torch.zeros(extent, **options).as_strided(shape, stride)


@dataclass(frozen=True)
class Lot:
    """Invokes that share a forward, its call, and their pieces at each of their sites.

    `linked`: an edit of one needs a value of another. `growth`: how the rows change on the way,
    where those of equal inputs share a trunk; the call then has fewer. `narrow`: what is asked of
    its last module, where that is little.
    """

    invokes: tuple[int, ...]
    call: ModuleCall
    pieces: Mapping[tuple[Site, Leaf], Piece]
    linked: bool = True
    growth: Growth | None = None
    narrow: Narrow | None = None


class Merger(Protocol):
    """Says which invokes may share a forward."""

    def keys(
        self, calls: Sequence[ModuleCall], module: torch.nn.Module
    ) -> Sequence[Hashable | None]:
        """For each call: those of equal keys may share a forward; None runs alone."""
        ...

    def order(self, calls: Sequence[ModuleCall]) -> Callable[[Site], int]:
        """Tells when a site fires, in forwards of its key."""
        ...

    def lot(
        self,
        invokes: Sequence[int],
        calls: Sequence[ModuleCall],
        leaves: Mapping[Site, Sequence[Leaf]],
        edited: Collection[Site],
        module: torch.nn.Module,
    ) -> tuple[Lot | None, set[int]]:
        """The forward for these invokes, at whose sites these leaves are used, some of them
        `edited`, and those invokes that must run alone after all. No lot of fewer than two."""
        ...


class SharedPart(Part):
    """The forward of a lot."""

    def __init__(self, whole: Drive, lot: Lot) -> None:
        super().__init__(whole, lot.invokes, *lot.call)
        self._pieces = lot.pieces
        self._linked = lot.linked
        self._rows = None if lot.growth is None else Rows(lot.growth)
        self._head = None if lot.narrow is None else Head(lot.narrow, lot.pieces)
        self._there: dict[tuple[str, str, int], list[Site]] = {}
        for site in self._left:
            self._there.setdefault((site.path, site.port, site.call), []).append(site)

    def sites(self) -> list[Site]:
        further = [] if self._rows is None else self._rows.sites()
        if self._head is not None:
            further.append(self._head.begin)
        unnamed = [s for s in further if (s.path, s.port, s.call) not in self._there]
        return [*[sites[0] for sites in self._there.values()], *unnamed]

    def become(self, site: Site, structure: Any) -> Any:
        """Lets each invoke see and change its rows; who needs another's comes after it."""
        interpreter = self.interpreter
        if self._rows is not None:
            structure = self._rows.become(site, structure)
        if self._head is not None and site == self._head.begin:
            return self._head.given(structure)
        waiting = self._there.pop((site.path, site.port, site.call), [])
        standing = Standing(structure)
        if not self._linked:
            self.open.difference_update(waiting)
            for one in waiting:
                self._one(one, standing)
            return standing.result()
        while waiting:
            free = [one for one in waiting if not interpreter.is_blocked(one)]
            one = free[0] if free else waiting[0]  # the interpreter says why it cannot
            waiting.remove(one)
            self.open.discard(one)
            self._one(one, standing)
        return standing.result()

    def _one(self, site: Site, standing: Standing) -> None:
        plan = self.interpreter.plan
        own = standing.structure
        for leaf in leaves_of(plan, site):
            whole = standing.whole(leaf)
            narrowed = None if self._head is None else self._head.cut(site, whole)
            part = self._pieces[site, leaf].cut(whole) if narrowed is None else narrowed
            own = replaced(own, leaf, part)
        new = self.interpreter.fire(site, own)
        for leaf, in_place in changed_leaves(plan, site).items():
            standing.change(leaf, self._pieces[site, leaf], at(new, leaf), in_place)


class Standing:
    """What stands at one place of the model, while one after another sees and changes its rows.

    A fill changes the model's own tensor, which others of the model may share; a write rebinds the
    site only, so it goes into a copy, one for all who write. A fill is in both.
    """

    def __init__(self, structure: Any) -> None:
        self.structure = structure
        self._written: dict[Leaf, torch.Tensor] = {}

    def whole(self, leaf: Leaf) -> torch.Tensor:
        """The tensor at a leaf, with all that was changed so far."""
        return self._written[leaf] if leaf in self._written else at(self.structure, leaf)

    def change(self, leaf: Leaf, piece: Piece, value: torch.Tensor, in_place: bool) -> None:
        """Puts the rows of one invoke."""
        own = at(self.structure, leaf)
        if in_place:
            piece.put(own, value)
        elif leaf not in self._written:
            self._written[leaf] = own.clone()
        if leaf in self._written:
            piece.put(self._written[leaf], value)

    def result(self) -> Any:
        """What the structure has become."""
        structure = self.structure
        for leaf, whole in self._written.items():
            structure = replaced(structure, leaf, whole)
        return structure


def leaves_of(plan: Plan, site: Site) -> Sequence[Leaf]:
    """The leaves of a site that a graph uses."""
    there = plan.sites[site]
    if there.leaves is None:
        steps: list[Any] = [plan.steps[index] for index in there.steps]
        there.leaves = tuple(dict.fromkeys([step.node.leaf for step in steps]))
    return there.leaves


def changed_leaves(plan: Plan, site: Site) -> Mapping[Leaf, bool]:
    """The leaves of a site that a graph changes, and whether all of it is done in place."""
    there = plan.sites[site]
    if there.changes is None:
        found: dict[Leaf, bool] = {}
        for index in there.effects:
            step: Any = plan.steps[index]
            leaf = step.node.leaf
            found[leaf] = found.get(leaf, True) and step.kind is Fill
        there.changes = found
    return there.changes


def is_mixed(plan: Plan) -> bool:
    """Whether a tensor is both filled and rebound: then two tensors of the model change, and not
    alike."""
    for there in plan.sites.values():
        kinds: dict[Leaf, Any] = {}
        for index in there.effects:
            step: Any = plan.steps[index]
            if step.kind is Skip:
                continue
            if kinds.setdefault(step.node.leaf, step.kind) is not step.kind:
                return True
    return False


def in_step(
    plan: Plan, calls: Sequence[ModuleCall], merger: Merger, module: torch.nn.Module
) -> bool:
    """Whether one forward of all invokes is enough, as far as what they need of each other goes."""
    keys = merger.keys(calls, module)
    known = {number for number, key in enumerate(keys) if key is not None}
    if len(known) < len(keys):
        return False
    try:
        needs = reaches(plan, merger.order(calls), known)
    except LookupError:  # a site that does not fire: a run of its own says so
        return False
    return len(_levels(passes(plan), keys, needs)) <= 1


# -- which forwards there are ----------------------------------------------------------------------


def lots(
    plan: Plan,
    groups: list[list[int]],
    calls: Sequence[ModuleCall],
    merger: Merger,
    module: torch.nn.Module,
) -> list[list[int] | Lot]:
    """The forwards of a run, in order: lots, and groups of `turns.passes` that run by themselves.

    A group joins others where it can go in step with them: every value it takes from one of them
    comes at an earlier site, or at the same.
    """
    keys = merger.keys(calls, module)
    known = {number for number, key in enumerate(keys) if key is not None}
    try:
        needs = reaches(plan, merger.order(calls), known)
    except LookupError:  # a site that does not fire: the run says so
        return list(groups)
    found: list[list[int] | Lot] = []
    levels = _levels(groups, keys, needs)
    for (_, key), together in sorted(levels.items(), key=lambda item: item[0][0]):
        if key in keys and sum(map(len, together)) > 1:
            found += _lots_of(plan, together, calls, merger, module, needs)
        else:
            found += together
    return found


def _lots_of(
    plan: Plan,
    groups: list[list[int]],
    calls: Sequence[ModuleCall],
    merger: Merger,
    module: torch.nn.Module,
    needs: _Needs,
) -> list[list[int] | Lot]:
    invokes = [invoke for group in groups for invoke in group]
    leaves = {s: leaves_of(plan, s) for s in plan.sites if s.invoke in invokes}
    edited = [site for site in leaves if plan.sites[site].effects]
    lot, alone = merger.lot(invokes, calls, leaves, frozenset(edited), module)
    linked = any(needs[one].keys() & set(invokes) for one in invokes)
    if lot is None or (alone and linked):
        return list(groups)  # in their order, which is right for forwards of their own
    asked = narrow(plan, lot.pieces, merger.order(calls), lambda path: find(module, path))
    return [*[[one] for one in alone], replace(lot, linked=linked, narrow=asked)]


_Needs = Mapping[int, Mapping[int, bool]]
"""`turns.reaches`."""


def _levels(
    groups: list[list[int]], keys: Sequence[Hashable | None], needs: _Needs
) -> dict[tuple[int, Hashable], list[list[int]]]:
    """(level, key) -> groups that go in step. A level needs values of lower ones only."""
    level: dict[int, int] = {}
    found: dict[tuple[int, Hashable], list[list[int]]] = {}
    for number, group in enumerate(groups):
        key: Hashable = keys[group[0]]
        same = all(keys[one] == key for one in group)
        inside = all(ok for one in group for other, ok in needs[one].items() if other in group)
        if key is None or not same or not inside:
            key = ("alone", number)
        mine = 0
        for one in group:
            for other, in_step in needs[one].items():
                if other not in group:
                    joins = in_step and keys[other] == key
                    mine = max(mine, level[other] + (not joins))
        level.update(dict.fromkeys(group, mine))
        found.setdefault((mine, key), []).append(group)
    return found
