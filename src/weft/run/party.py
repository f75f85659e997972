"""`Party`: one forward that several requests share, each a `Guest` with its own graph.

    party = Party(module, seats, call)          # who sits where: `engine.party`
    party.run()
    party.guests[0].end()

It is left as soon as no guest waits for anything. Only what the model itself raises comes out of
`run`, and then no guest has come to its end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import Module

from weft.graph.site import Site

from .guests import Guest, Pieces
from .hooks import Drive, normal_mode
from .part import ModuleCall
from .rows import Standing
from .singles import Taken
from .taken import Take
from .weights import weights_of

Place = tuple[str, str, int]
"""Path, port and call: a site, whosever it is."""


class Seat(NamedTuple):
    """A guest, and where its rows lie at each of its sites."""

    guest: Guest
    pieces: Pieces


class _NoPlan:
    skips: Mapping[Any, Any] = {}


class _Nobody:
    """In place of the one interpreter that other drives have: each guest has its own."""

    plan = _NoPlan
    given: Mapping[Any, Any] = {}

    def took(self, fired: list[Any]) -> None:
        """Nothing is taken behind the guests' backs."""


class Crowd(Drive):
    """A drive of many guests, each with an interpreter of its own."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.interpreter: Any = _Nobody()
        self.weights = weights_of(module)
        self.callers = set()
        self.told = None
        self.taken = Taken({})
        self.can_stop = True
        self.want_result = False
        self.error = None
        self.ended = None

    def quick(self) -> Mapping[Site, Take]:
        """None: what stands at a site is of several guests."""
        return {}


class Party(Crowd):
    """See the module's text."""

    def __init__(self, module: Module, seats: Sequence[Seat], call: ModuleCall) -> None:
        super().__init__(module)
        self._call = call
        self._seats = seats
        self._there: dict[Place, list[tuple[Seat, list[Site]]]] = {}
        for seat in seats:
            for site in seat.guest.sites:
                places = self._there.setdefault((site.path, site.port, site.call), [])
                if places and places[-1][0] is seat:
                    places[-1][1].append(site)
                else:
                    places.append((seat, [site]))
        self._first = {place: seats[0][1][0] for place, seats in self._there.items()}

    def run(self) -> None:
        """The forward, to where nothing is left to do."""
        if self.is_over():
            return
        args, kwargs = self._call
        with normal_mode(), torch.no_grad():
            self.forward(args, dict(kwargs), None)

    # -- as a drive --------------------------------------------------------------------------------

    def sites(self) -> list[Site]:
        return list(self._first.values())

    def is_over(self) -> bool:
        return all(seat.guest.finished for seat in self._seats)

    def become(self, site: Site, structure: Any) -> Any:
        standing = Standing(structure)
        for seat, sites in self._there.pop((site.path, site.port, site.call), ()):
            seat.guest.meet(sites, standing, seat.pieces)
        return standing.result()
