"""`Guest`: one request in a forward that it shares with strangers.

It has an interpreter of its own, with its own graph, constants, limits and lines, and it knows
nothing of the others. Whoever drives the forward tells it what stands at a site (`rows.Standing`),
and where its rows lie in that (`rows.Piece`):

    guest = Guest(module, graph, constants, overwritten=told, watch=watch)
    guest.begin()
    guest.fire(site, standing, pieces)                   # for each of its sites; never raises
    saved = guest.end().saved                            # raises what went wrong
    guest.close()

What it sees is a private copy of its rows; what it changes is written to exactly these. After
anything that goes wrong its graph is not run any further, what stands at the site stays as the
model made it, and the forward goes on for the others. Its error is raised by `end`, to its owner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch.nn import Module

from weft.graph.node import Graph
from weft.graph.site import Leaf, Site

from .hooks import Drive, Results
from .logs import OnValue
from .rows import Piece, Standing, changed_leaves, leaves_of
from .steps import Plan
from .structure import at, replaced
from .watch import Watch

Pieces = Mapping[tuple[Site, Leaf], Piece]


class Guest:
    """See the module's text.

    error: what went wrong, until `end` raises it. spent: seconds that its own graph took.
    """

    def __init__(
        self,
        module: Module,
        graph: Graph,
        constants: Mapping[str, torch.Tensor],
        *,
        strict: bool = True,
        on_log: Callable[[str], None] = print,
        on_value: OnValue | None = None,
        overwritten: Callable[[Site, Leaf], bool] | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._drive: Drive | None = Drive(
            graph, constants, module, strict, on_log, overwritten, watch, on_value=on_value
        )
        self.error: BaseException | None = None
        self.spent = 0.0

    @property
    def interpreter(self) -> Any:
        assert self._drive is not None, "this guest has left"
        return self._drive.interpreter

    @property
    def plan(self) -> Plan:
        return self.interpreter.plan

    @property
    def sites(self) -> Collection[Site]:
        """The sites that it waits for; none, once it has failed."""
        return () if self.error is not None else self.interpreter.sites.keys()

    @property
    def finished(self) -> bool:
        """Whether no site can matter to it any more."""
        return self.error is not None or self.interpreter.finished

    # -- what the forward tells it -----------------------------------------------------------------

    def begin(self) -> None:
        """Runs what needs no site. Never raises."""
        self.attempt(self.interpreter.begin)

    def meet(self, sites: Sequence[Site], standing: Standing, pieces: Pieces) -> None:
        """Changes what stands at a place of the model, where several of its invokes have a site.

        Who needs a value of another comes after it. Never raises.
        """
        waiting = list(sites)
        while waiting and self.error is None:
            free = [one for one in waiting if not self.interpreter.is_blocked(one)]
            one = free[0] if free else waiting[0]  # the interpreter says why it cannot
            waiting.remove(one)
            self.fire(one, standing, pieces)

    def fire(self, site: Site, standing: Standing, pieces: Pieces) -> None:
        """Changes the guest's rows of what stands at a site. Never raises."""
        changes = self.attempt(lambda: self._fired(site, standing, pieces))
        for leaf, value, in_place in changes or ():
            standing.change(leaf, pieces[site, leaf], value, in_place)

    def fire_alone(self, site: Site, structure: Any) -> Any:
        """What a structure becomes that has the guest's own rows and nothing else. Never raises."""
        done = self.attempt(lambda: [self.interpreter.fire(site, structure)])
        return structure if done is None else done[0]

    def attempt(self, act: Callable[[], Any]) -> Any:
        """Does something on the guest's behalf; None where that fails, and then it has failed."""
        if self.error is not None:
            return None
        begun = time.perf_counter()
        try:
            return act()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the guest's alone
            self.fail(error)
            return None
        finally:
            self.spent += time.perf_counter() - begun

    def fail(self, error: BaseException) -> None:
        """Ends the guest; the first error stays."""
        if self.error is None:
            self.error = error

    def _fired(
        self, site: Site, standing: Standing, pieces: Pieces
    ) -> list[tuple[Leaf, torch.Tensor, bool]]:
        """What is to be changed. Changes nothing itself: what fails half way would leave rows that
        nobody has made."""
        own = standing.structure
        for leaf in leaves_of(self.plan, site):
            own = replaced(own, leaf, pieces[site, leaf].cut(standing.whole(leaf)))
        new = self.interpreter.fire(site, own)
        return [
            (leaf, at(new, leaf).reshape(pieces[site, leaf].shape), in_place)
            for leaf, in_place in changed_leaves(self.plan, site).items()
        ]

    # -- its end -----------------------------------------------------------------------------------

    def end(self, ended: Site | None = None) -> Results:
        """What it saved. `ended`: where the forward was left. Raises what went wrong."""
        found = self.attempt(self.interpreter.end)
        if self.error is not None:
            raise self.error
        return Results(found, None, ended)

    def close(self) -> None:
        """Lets go of all that it holds. What it still had to say is said."""
        drive, self._drive = self._drive, None
        if drive is not None:
            drive.leave()
