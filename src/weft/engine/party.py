"""Jobs of different users, drawn through one forward of the model.

    found = draw_together(net, [Entry(opened, limits, told), ...], merger)
    found[0]          # Drawn, the error that is this job's alone, or None: it has to run by itself

Each job has an interpreter, limits and rows of its own (`run.guests`), and is told nothing of the
others. What it says on its way is held back until its forward is over, so that a forward that has
to be run again says nothing twice. Where the model itself fails on the batch, memory most of all,
the batch is cut in two, and again, until it passes or one job is left, which then runs by itself.

The model is afterwards as it was (`kept`); one that is not cannot be blamed on any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weft.families.call import ModelCall
from weft.run.guests import Guest
from weft.run.hooks import normal_mode
from weft.run.invokes import is_plain
from weft.run.part import ModuleCall
from weft.run.party import Party, Seat
from weft.run.rows import in_step, leaves_of
from weft.run.structure import mapped
from weft.run.weights import weights_of
from weft.signatures.later import Overwritten
from weft.wire.messages import Limits, ValueEvent

from .draw import BoundedLog, Drawn, LostDeviceError, RunWatch, brought, constants_of, understood
from .kept import Kept
from .merging import Merger
from .merging import is_plain as is_tokens
from .opened import Opened
from .telling import Streaming

Found = Drawn | BaseException | None
"""What became of a job. None: it did not take part, and has to run by itself."""


@dataclass(frozen=True, eq=False)
class Entry:
    """A job that may share a forward; fields as the arguments of `draw.draw`."""

    opened: Opened
    limits: Limits
    overwritten: Overwritten | None = None
    strict: bool = True
    on_log: Callable[[str], None] | None = None
    on_value: Callable[[ValueEvent], None] | None = None
    on_progress: Callable[[int, int], None] | None = None
    cancelled: Callable[[], bool] | None = None


def draw_together(net: nn.Module, entries: Sequence[Entry], merger: Merger) -> list[Found]:
    """Draws jobs through one forward, or as few as it takes. Raises what ends the use of the model:
    `kept.SpoiltError`, `LostDeviceError`; then none of them has come to an end."""
    if len(entries) < 2:
        return [None] * len(entries)
    try:
        return _drawn(net, entries, merger)
    except _PassFailedError:
        half = len(entries) // 2
        parts = entries[:half], entries[half:]
        return [found for part in parts for found in draw_together(net, part, merger)]


class _PassFailedError(Exception):
    """The model itself could not run the batch."""


def _drawn(net: nn.Module, entries: Sequence[Entry], merger: Merger) -> list[Found]:
    found: list[Found] = [None] * len(entries)
    if not merger.allows(net):
        return found
    comers = {n: one for n, entry in enumerate(entries) if (one := _comer(net, entry, merger))}
    try:
        call, pieces = merger.seats([(one.calls, one.leaves) for one in comers.values()], net)
        each = zip(comers.items(), pieces, strict=True)
        seats = {n: Seat(one.guest, mine) for (n, one), mine in each if mine is not None}
        if call is None or len(seats) < 2:
            return found
        with Kept.of(net).job(net), normal_mode(), torch.no_grad():
            for n in seats:
                comers[n].begin([seat.guest for seat in seats.values()])
            ended = _run(net, [*seats.values()], call)
        for n in seats:
            found[n] = comers[n].found(ended)
        return found
    finally:
        for one in comers.values():
            one.guest.close()


def _run(net: nn.Module, seats: list[Any], call: ModuleCall) -> Any:
    party = Party(net, seats, call)
    try:
        party.run()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        meant = understood(error)
        if isinstance(meant, LostDeviceError):
            raise meant from None
        raise _PassFailedError from error
    return party.ended


def _comer(net: nn.Module, entry: Entry, merger: Merger) -> _Comer | None:
    """The job as one that may share; None for one that has to run by itself, if only to say what is
    wrong with it."""
    try:
        one = _Comer(net, entry, merger)
    except Exception:  # noqa: BLE001 - it meets the same error when it runs by itself
        return None
    if one.may_share(net, merger):
        return one
    one.guest.close()
    return None


class _Comer:
    """A job on its way to a seat."""

    def __init__(self, net: nn.Module, entry: Entry, merger: Merger) -> None:
        self._entry = entry
        self._said: list[tuple[Callable[[Any], None], Any]] = []
        opened = entry.opened
        device = weights_of(net).device or torch.device("cpu")
        self.calls = [_on(device, call) for call in opened.calls]
        self._watch = RunWatch(opened.graph, entry.limits, entry.on_progress, entry.cancelled)
        self.guest = Guest(
            net,
            opened.graph,
            constants_of(opened),
            strict=entry.strict,
            on_log=BoundedLog(self._later(entry.on_log), entry.limits.log_bytes),
            on_value=Streaming(opened.graph, self._later(entry.on_value), entry.limits),
            overwritten=entry.overwritten,
            watch=self._watch,
        )
        plan = self.guest.plan
        self.leaves = {site: leaves_of(plan, site) for site in plan.sites}

    def may_share(self, net: nn.Module, merger: Merger) -> bool:
        """Whether its graph means the same in a forward that is shared."""
        plan = self.guest.plan
        if not self.leaves or not is_plain(plan) or self._entry.opened.alone:
            return False
        if len({site.invoke for site in self.leaves}) == 1:
            return all(map(is_tokens, self.calls))
        return in_step(plan, self.calls, merger, net)

    def _later(self, say: Callable[[Any], None] | None) -> Callable[[Any], None] | None:
        """Says it when the forward is over."""
        return None if say is None else lambda what: self._said.append((say, what))

    def begin(self, guests: Sequence[Guest]) -> None:
        """The time that others take in their own operations is not this one's."""
        self._watch.others = lambda: sum([one.spent for one in guests]) - self.guest.spent
        self.guest.begin()

    def found(self, ended: Any) -> Found:
        """What became of it; what it had to say is said."""
        try:
            results = self.guest.end(ended)
            return brought(self._entry.opened.graph, results.saved, results.ended)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - it goes to its owner
            return understood(error)
        finally:
            self.guest.close()
            for say, what in self._said:
                say(what)


def _on(device: torch.device, call: ModelCall) -> ModuleCall:
    return mapped((call.args, dict(call.kwargs)), lambda tensor: tensor.to(device))
