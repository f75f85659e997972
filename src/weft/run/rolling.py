"""`Rolling`: a decode loop that requests of different users join and leave between its steps.

    rolling = Rolling(module, sharer)
    boarder = Boarder(guest, decoders)      # one generation for each invoke of its graph
    rolling.join(boarder)
    while rolling.turn():                   # one forward, of whoever is there
        for boarder in rolling.left(): ...  # those that are over, or have failed
    rolling.close()

Whose rows are in a forward, and which tokens follow, the loop says (`families.decodings`), and
where they lie the sharer; each request has an interpreter, a sampler and a seed of its own
(`guests`). Those that need no further step leave; those that fail leave with their error, and
nobody else feels it. An error of the forward itself is raised: then all that were in the loop are
lost, and have to begin anew somewhere else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import Module

from weft.graph.node import Apply
from weft.graph.site import RESULT, Site

from .guests import Guest
from .hooks import normal_mode
from .joined import KINDS, Rows, Sharer, Turn
from .party import Crowd, Place
from .rows import Standing, leaves_of
from .steps import Plan
from .turns import levels


class Boarder:
    """A request in the loop. `seconds`: its part of the time of the forwards it was in; `shared`:
    with how many requests it shared one at most. `look` is asked before each of its forwards, and
    raises what ends it."""

    def __init__(
        self, guest: Guest, decoders: Sequence[Any], look: Callable[[], None] | None = None
    ) -> None:
        self.guest = guest
        self.decoders = decoders
        self.look = look or (lambda: None)
        self.seconds = 0.0
        self.shared = 1
        self.numbers: dict[int, int] = {}  # in the loop, of the invokes that are under way
        self._steps: dict[tuple[int, int], list[Site]] = {}
        self._last: dict[int, int] = {}
        self._results: dict[int, Site] = {}
        for site in guest.plan.sites:
            if site.port == RESULT:
                self._results[site.invoke] = site
            else:
                self._steps.setdefault((site.invoke, site.step), []).append(site)
                self._last[site.invoke] = max(self._last.get(site.invoke, -1), site.step)

    @property
    def over(self) -> bool:
        """Whether no forward can matter to it any more."""
        return self.guest.error is not None or not self.numbers

    def needs(self, invoke: int, step: int) -> bool:
        """Whether an invoke wants a step, or what comes of it."""
        return invoke in self._results or step <= self._last.get(invoke, -1)

    def ends(self, invoke: int, step: int) -> bool:
        """Whether a step is the last that an invoke needs."""
        if self.guest.error is not None or {invoke, None} & self.guest.interpreter.stopped:
            return True
        return not self.needs(invoke, step + 1)

    def sites(self, invoke: int, step: int) -> list[Site]:
        """The sites of a step that are still waited for; asked once."""
        there = self.guest.sites
        return [site for site in self._steps.pop((invoke, step), ()) if site in there]

    def end(self, invoke: int) -> None:
        """A generation is over: what it brings, and what it has left out."""
        self.numbers.pop(invoke, None)
        mine = [key for key in self._steps if key[0] == invoke]
        left = [site for key in mine for site in self._steps.pop(key)]
        guest = self.guest
        guest.attempt(lambda: guest.interpreter.leave_out(left))
        result = self._results.get(invoke)
        if result is not None and result in guest.sites:
            guest.fire_alone(result, self.decoders[invoke].result)


def may_board(plan: Plan) -> bool:
    """Whether a graph means the same in a loop with others: no generation of it waits for another,
    and it has only nodes that mean the same there."""
    if any(step is not None and step.kind not in KINDS for step in plan.steps):
        return False
    found = levels(plan)
    return len(found) == 1 and all(len(group) == 1 for group in found[0])


def calls_modules(plan: Plan) -> bool:
    """Whether a graph itself calls modules of the model, which may leave traces on them."""
    return any(step is not None and step.kind is Apply for step in plan.steps)


class Rolling(Crowd):
    """See the module's text. `spent`: seconds that all guests' own graphs took."""

    def __init__(self, module: Module, sharer: Sharer) -> None:
        super().__init__(module)
        self._sharer = sharer
        self._loop = sharer.loop(module)
        self._by_number: dict[int, tuple[Boarder, int]] = {}
        self._left: list[Boarder] = []
        self._turn: Turn | None = None
        self._there: dict[Place, list[tuple[Boarder, Site, Rows]]] = {}
        self._batch = 0
        self._stopped = 0
        self.spent = 0.0

    @property
    def boarders(self) -> list[Boarder]:
        """Those under way."""
        return list(dict.fromkeys([boarder for boarder, _ in self._by_number.values()]))

    def left(self) -> list[Boarder]:
        """Those that came to their end since this was asked last."""
        left, self._left = self._left, []
        return left

    def join(self, boarder: Boarder) -> None:
        """A request comes in; its prompts run with the next turns. Never raises."""
        with normal_mode(), torch.no_grad():
            boarder.guest.begin()
        if boarder.guest.error is None:
            for invoke in sorted({site.invoke for site in boarder.guest.plan.sites}):
                if boarder.needs(invoke, 0):
                    number = self._loop.add(boarder.decoders[invoke])
                    boarder.numbers[invoke] = number
                    self._by_number[number] = boarder, invoke
        self._let_go([boarder])

    def turn(self) -> bool:
        """One forward. False: there is nobody to run one for. Raises what the model raises."""
        self._look()
        turn = self._loop.turn()
        if turn is None:
            return False
        begun, spent = time.perf_counter(), self._guests_spent()
        with normal_mode(), torch.no_grad():
            self._begin(turn)
            output = self._forward(turn)
            self._take(turn, output)
        self._account(turn, time.perf_counter() - begun)
        self.spent += self._guests_spent() - spent
        self._end(turn)
        return True

    def leave(self, boarder: Boarder, error: BaseException) -> None:
        """A request goes, between two turns."""
        boarder.guest.fail(error)
        self._let_go([boarder])

    def close(self) -> None:
        """Ends the loop, and lets go of whatever is in it."""
        self._loop.close()
        for boarder in self.boarders:
            boarder.numbers.clear()
        self._by_number.clear()
        self._turn, self._there = None, {}

    # -- a turn ------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Who is cancelled, or beyond a limit, goes before the next forward."""
        for boarder in self.boarders:
            boarder.guest.attempt(boarder.look)
        self._let_go(self.boarders)

    def _begin(self, turn: Turn) -> None:
        self._turn, self._there = turn, {}
        self._batch = max(place.rows[1] for place in turn.places)
        for place in turn.places:
            boarder, invoke = self._by_number[place.number]
            for site in boarder.sites(invoke, place.step):
                there = self._there.setdefault((site.path, site.port, site.call), [])
                there.append((boarder, site, place))
        self._set_stop()

    def _set_stop(self) -> None:
        assert self._turn is not None
        places = [(self._by_number[place.number], place) for place in self._turn.places]
        self._stopped = self._stops()
        self.can_stop = all(boarder.ends(invoke, at.step) for (boarder, invoke), at in places)
        self.want_result = not self.can_stop

    def _stops(self) -> int:
        """How many stops and failures there have been among those of this turn."""
        assert self._turn is not None
        found = {self._by_number[place.number][0] for place in self._turn.places}
        return sum([len(b.guest.interpreter.stopped) + (b.guest.error is not None) for b in found])

    def _forward(self, turn: Turn) -> Any:
        args, kwargs = turn.call
        if not self._there:
            return None if self.can_stop else self.module(*args, **kwargs)
        return self.forward(args, dict(kwargs), None)

    def _take(self, turn: Turn, output: Any) -> None:
        if output is None:
            self._loop.drop()
            return
        ended = []
        for place in turn.places:
            boarder, invoke = self._by_number[place.number]
            if boarder.ends(invoke, place.step):
                ended.append(place.number)
        self._loop.took(output, ended)

    def _account(self, turn: Turn, seconds: float) -> None:
        count = len({id(self._by_number[place.number][0]) for place in turn.places})
        for place in turn.places:
            boarder, _ = self._by_number[place.number]
            boarder.shared = max(boarder.shared, count)
            boarder.seconds += seconds * (place.rows[1] - place.rows[0]) / self._batch

    def _guests_spent(self) -> float:
        return sum([boarder.guest.spent for boarder in self.boarders])

    def _end(self, turn: Turn) -> None:
        """Ends generations that are over, and lets those go that have none any more."""
        here = self._failed()
        for place in turn.places:
            if place.number not in self._by_number:
                continue
            boarder, invoke = self._by_number[place.number]
            here.append(boarder)
            if boarder.decoders[invoke].over:
                del self._by_number[place.number]
                boarder.end(invoke)
        self._turn, self._there = None, {}
        self._let_go(list(dict.fromkeys(here)))

    def _failed(self) -> list[Boarder]:
        """Those with a generation in which nothing could be drawn."""
        found = []
        for number, error in list(self._loop.errors.items()):
            del self._loop.errors[number]
            boarder, invoke = self._by_number.pop(number)
            boarder.numbers.pop(invoke, None)
            boarder.guest.fail(error)
            found.append(boarder)
        return found

    def _let_go(self, boarders: Sequence[Boarder]) -> None:
        for boarder in boarders:
            if not boarder.over or boarder in self._left:
                continue
            for number in boarder.numbers.values():
                self._loop.leave(number)
                self._by_number.pop(number, None)
            boarder.numbers.clear()
            self._left.append(boarder)

    # -- as a drive --------------------------------------------------------------------------------

    def sites(self) -> list[Site]:
        return [there[0][1] for there in self._there.values()]

    def is_over(self) -> bool:
        return self.can_stop and not self._there

    def become(self, site: Site, structure: Any) -> Any:
        assert self._turn is not None
        there = self._there.pop((site.path, site.port, site.call), ())
        if len(self._turn.places) == 1:  # its own rows and no others: as it is alone
            for boarder, one, _ in there:
                structure = boarder.guest.fire_alone(one, structure)
        else:
            standing = Standing(structure)
            for boarder, one, place in there:
                boarder.guest.fire(one, standing, self._pieces(boarder, one, place))
            structure = standing.result()
        if self._stops() != self._stopped:
            self._set_stop()
            self._keep_open()
        return structure

    def _pieces(self, boarder: Boarder, site: Site, place: Rows) -> Mapping[Any, Any]:
        guest, decoder = boarder.guest, boarder.decoders[site.invoke]
        if guest.error is not None:
            return {}
        piece, batch = self._sharer.piece, self._batch
        leaves = leaves_of(guest.plan, site)
        return {(site, leaf): piece(decoder, site, leaf, place, batch) for leaf in leaves}

    def _keep_open(self) -> None:
        """After a stop or a failure: sites that will not fire any more are not waited for."""
        for key, ones in list(self._there.items()):
            left = [one for one in ones if one[1] in one[0].guest.sites]
            if left:
                self._there[key] = left
            else:
                del self._there[key]
