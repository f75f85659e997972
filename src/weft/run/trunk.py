"""Rows that are the same up to their first edit, computed once.

Invokes of equal inputs need no rows of their own before they are edited: until then all of them are
the rows of the *trunk*. At a *station*, where a decoder layer begins or ends and all that the pass
goes on with is in its arguments or its result, the rows may change: invokes whose first edit comes
before the next station get copies of the trunk's, and rows that nobody needs any more are left out.

`schedule` decides, on numbers alone; `Rows` carries it out at the hooks of one pass. Which modules
are stations, and whether a model may be run so, is decided elsewhere (`engine.trunks`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weft.graph.site import Leaf, Site

from .structure import at, replaced

Key = tuple[str, str, int]
"""(path, port, call) of a site, whosever it is."""


@dataclass(frozen=True)
class Station:
    """A site at which rows may change, the `index`-th of its pass.

    `current` are the leaves that have the rows of the pass at this place, `first` those that have
    the rows it began with. Each row is a number of places of the first dimension.
    """

    key: Key
    index: int
    current: tuple[Leaf, ...]
    first: tuple[Leaf, ...] = ()


@dataclass(frozen=True)
class Need:
    """What an invoke needs: `rows`, in a `group` of equal inputs, up to its `last` site. `edited`
    is its first site that is changed; None where none is."""

    rows: int
    group: int
    edited: int | None
    last: int


@dataclass(frozen=True)
class Segment:
    """The rows between two stations: `owners` in order, and where the rows of each begin.

    `places` says which rows are an invoke's, its own or the trunk's; `sources` which of the rows
    that the pass began with each row came from.
    """

    owners: tuple[int, ...]
    starts: Mapping[int, int]
    size: int
    places: Mapping[int, tuple[int, int]]
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Growth:
    """How the rows of a pass change: `segments[n]` is in force after `n` stations.

    `moves` says, by number of a station, of which rows before it those after it are copies.
    """

    stations: tuple[Station, ...]
    segments: tuple[Segment, ...]
    moves: Mapping[int, tuple[int, ...]]

    @property
    def peak(self) -> int:
        """The most rows at once."""
        return max([segment.size for segment in self.segments])

    @property
    def cost(self) -> int:
        """Rows, summed over the segments."""
        return sum([segment.size for segment in self.segments])

    def segment(self, index: int) -> Segment:
        """The segment that the site with this index lies in."""
        passed = bisect_right([station.index for station in self.stations], index)
        return self.segments[min(passed, len(self.segments) - 1)]


def schedule(needs: Mapping[int, Need], stations: Sequence[Station]) -> Growth:
    """The rows of invokes, which do not repeat what their groups have in common.

    In each group the invoke that is edited last, or never, stays in the rows of the trunk.
    """
    places = [station.index for station in stations]
    forks = {
        one: None if need.edited is None else bisect_right(places, need.edited)
        for one, need in needs.items()
    }
    heirs = _heirs(needs, forks)
    segments: list[Segment] = []
    moves: dict[int, tuple[int, ...]] = {}
    for number in range(len(stations) + 1):
        begin = places[number - 1] if number else -1
        owner = {
            one: one if fork is not None and number >= fork else heirs[needs[one].group]
            for one, fork in forks.items()
        }
        alive = {owner[one] for one, need in needs.items() if need.last >= begin}
        if not alive:
            break
        before = segments[-1] if segments else None
        if before is not None and alive == set(before.owners):
            segments.append(_segment(before.owners, owner, needs, before.sources))
            continue
        kept = [] if before is None else [one for one in before.owners if one in alive]
        owners = (*kept, *sorted(alive.difference(kept)))
        sources: tuple[int, ...] | None = None
        if before is not None:
            move = _move(owners, before, needs, heirs)
            moves[number - 1] = move
            sources = tuple([before.sources[row] for row in move])
        segments.append(_segment(owners, owner, needs, sources))
    return Growth(tuple(stations), tuple(segments), moves)


def _heirs(needs: Mapping[int, Need], forks: Mapping[int, int | None]) -> dict[int, int]:
    """By group the invoke whose rows are the trunk's."""
    found: dict[int, int] = {}
    for one, need in needs.items():
        other = found.get(need.group)
        if other is None or _stays(forks[one]) > _stays(forks[other]):
            found[need.group] = one
    return found


def _stays(fork: int | None) -> float:
    return float("inf") if fork is None else fork


def _segment(
    owners: tuple[int, ...],
    owner: Mapping[int, int],
    needs: Mapping[int, Need],
    sources: tuple[int, ...] | None,
) -> Segment:
    starts, size = {}, 0
    for one in owners:
        starts[one] = size
        size += needs[one].rows
    places = {
        one: (starts[whose], starts[whose] + needs[one].rows)
        for one, whose in owner.items()
        if whose in starts
    }
    return Segment(owners, starts, size, places, sources or tuple(range(size)))


def _move(
    owners: Sequence[int], before: Segment, needs: Mapping[int, Need], heirs: Mapping[int, int]
) -> tuple[int, ...]:
    found: list[int] = []
    for one in owners:
        start = before.starts.get(one)
        if start is None:
            start = before.starts[heirs[needs[one].group]]
        found += range(start, start + needs[one].rows)
    return tuple(found)


class Rows:
    """The rows of one pass while it runs."""

    def __init__(self, growth: Growth) -> None:
        self._growth = growth
        self._numbers = {station.key: n for n, station in enumerate(growth.stations)}
        self._sources: tuple[int, ...] | None = None  # None: still the rows it began with
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def sites(self) -> list[Site]:
        """The stations at which something is to be done."""
        first = min(self._growth.moves, default=len(self._growth.stations))
        return [
            Site(*station.key)
            for number, station in enumerate(self._growth.stations)
            if number in self._growth.moves or (number > first and station.first)
        ]

    def become(self, site: Site, structure: Any) -> Any:
        """What the value at a site becomes, before anybody sees it."""
        number = self._numbers.get((site.path, site.port, site.call))
        if number is None:
            return structure
        station = self._growth.stations[number]
        move = self._growth.moves.get(number)
        if move is not None:
            size = self._growth.segments[number].size
            self._sources = self._growth.segments[number + 1].sources
            for leaf in station.current:
                structure = replaced(structure, leaf, _picked(at(structure, leaf), move, size))
            # Copies move on, and are not made again: what was edited in them stays.
            self._copies = {
                key: (first, _picked(copy, move, size))
                for key, (first, copy) in self._copies.items()
            }
        if self._sources is not None:
            for leaf in station.first:
                structure = replaced(structure, leaf, self._copy(at(structure, leaf)))
        return structure

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with the rows that the pass began with, as it is for those it has now.

        Layers are given the same tensor one after the other, and so they are here.
        """
        known = self._copies.get(id(tensor))
        if known is None:
            size = self._growth.segments[0].size
            assert self._sources is not None
            known = self._copies[id(tensor)] = tensor, _picked(tensor, self._sources, size)
        return known[1]


def _picked(tensor: torch.Tensor, rows: Sequence[int], size: int) -> torch.Tensor:
    """These of `size` rows, each of one place or more of the first dimension."""
    index = torch.tensor(rows, dtype=torch.int64, device=tensor.device)
    if tensor.shape[0] == size:
        return tensor.index_select(0, index)
    whole = tensor.unflatten(0, (size, tensor.shape[0] // size))
    return whole.index_select(0, index).flatten(0, 1)
