"""The decode loop of one model, which generations of different users join and leave.

    decode = Decode(net, stepping, tokenizer)
    ticket = decode.join(entry)             # None: it has to run by itself
    while decode.turn():
        for ticket in decode.left():
            ticket.found                    # Drawn, or the error that is this job's alone

Each job has its own graph, sampler, seed, limits and interpreter (`run.rolling`), and is told
nothing of the others. Where the model itself fails in a step, memory most of all, `turn` raises
`LoopLostError`: all that were in the loop have come to nothing, and begin anew somewhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from torch import nn

from weft.run.guests import Guest
from weft.run.rolling import Boarder, Rolling, calls_modules, may_board
from weft.run.rows import leaves_of
from weft.run.weights import weights_of

from .draw import BoundedLog, LostDeviceError, RunWatch, brought, constants_of, understood
from .generation import decoders
from .kept import Kept
from .party import Entry, Found
from .stepping import Stepping
from .telling import Streaming


class LoopLostError(Exception):
    """A step failed in the model: its cause is why. The loop is empty now."""


class Ticket:
    """A job in the loop. `found` is what became of it, once it has left; `batch` with how many it
    shared a forward at most, `seconds` its part of the time of its forwards."""

    def __init__(self, entry: Entry, boarder: Boarder, watch: RunWatch) -> None:
        self.entry = entry
        self.boarder = boarder
        self.watch = watch
        self.found: Found = None

    @property
    def batch(self) -> int:
        return self.boarder.shared

    @property
    def seconds(self) -> float:
        return self.boarder.seconds


class Decode:
    """See the module's text."""

    def __init__(self, net: nn.Module, stepping: Stepping, tokenizer: Any = None) -> None:
        self._net = net
        self._stepping = stepping
        self._tokenizer = tokenizer
        self._rolling: Rolling | None = None
        self._tickets: dict[Boarder, Ticket] = {}
        self._left: list[Ticket] = []
        self._paused = 0.0

    def __len__(self) -> int:
        """How many jobs are in the loop."""
        return len(self._tickets)

    @property
    def tickets(self) -> list[Ticket]:
        """Those under way."""
        return list(self._tickets.values())

    def pause(self, seconds: float) -> None:
        """Somebody else had the model for so long: that is not the time of those in the loop."""
        self._paused += seconds

    def join(self, entry: Entry) -> Ticket | None:
        """Takes a generation into the loop; it runs with the next turns. None: it has to run by
        itself, if only to say what is wrong with it."""
        try:
            ticket = self._boards(entry)
        except Exception:  # noqa: BLE001 - it meets the same error when it runs by itself
            return None
        if ticket is None:
            return None
        if self._rolling is None:
            self._rolling = Rolling(self._net, self._stepping)
        rolling, spent, paused = self._rolling, self._rolling.spent, self._paused
        guest = ticket.boarder.guest
        ticket.watch.others = lambda: (
            max(0.0, rolling.spent - spent - guest.spent) + self._paused - paused
        )
        self._tickets[ticket.boarder] = ticket
        kept = Kept.of(self._net).job(self._net) if calls_modules(guest.plan) else nullcontext()
        with kept:
            rolling.join(ticket.boarder)
        self._collect()
        return ticket

    def _boards(self, entry: Entry) -> Ticket | None:
        opened = entry.opened
        if opened.alone or opened.sampling is None:
            return None
        watch = RunWatch(opened.graph, entry.limits, entry.on_progress, entry.cancelled)
        guest = Guest(
            self._net,
            opened.graph,
            constants_of(opened),
            strict=entry.strict,
            on_log=BoundedLog(entry.on_log, entry.limits.log_bytes),
            on_value=Streaming(opened.graph, entry.on_value, entry.limits),
            overwritten=entry.overwritten,
            watch=watch,
        )
        each: Sequence[Any] = ()
        try:
            device = weights_of(self._net).device or "cpu"
            calls = [call.to(device) for call in opened.calls]
            each = [*decoders(self._net, calls, opened.sampling, self._tokenizer)]
            sites = {s: leaves_of(guest.plan, s) for s in guest.plan.sites if s.port != "result"}
            used = {site.invoke for site in guest.plan.sites}
            mine = {invoke: each[invoke] for invoke in used}
            if used and may_board(guest.plan) and self._stepping.boards(mine, sites, self._net):
                return Ticket(entry, Boarder(guest, each, watch.look), watch)
        except BaseException:
            guest.close()
            raise
        guest.close()
        return None

    def turn(self) -> bool:
        """One forward; False where nobody is in the loop. Raises `LoopLostError`, and what ends
        the use of the model: `kept.SpoiltError`, `LostDeviceError`."""
        rolling = self._rolling
        if rolling is None or not self._tickets:
            return False
        try:
            with Kept.of(self._net).job(self._net):
                going = rolling.turn()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            meant = understood(error)
            if len(self._tickets) == 1 and not getattr(meant, "retire", False):
                self._its_own(meant)  # nobody else's rows were in the step
                return True
            self.close()
            if isinstance(meant, LostDeviceError) or getattr(meant, "retire", False):
                raise meant from None
            raise LoopLostError from error
        self._collect()
        return going

    def _its_own(self, error: BaseException) -> None:
        """A step of the only job in the loop failed."""
        (ticket,) = self._tickets.values()
        self.close()
        ticket.found = error
        self._left.append(ticket)

    def left(self) -> list[Ticket]:
        """Those that came to their end since this was asked last."""
        left, self._left = self._left, []
        return left

    def _collect(self) -> None:
        assert self._rolling is not None
        for boarder in self._rolling.left():
            ticket = self._tickets.pop(boarder)
            ticket.found = _found(ticket)
            self._left.append(ticket)

    def close(self) -> None:
        """Ends the loop; those in it come to nothing."""
        rolling, self._rolling = self._rolling, None
        if rolling is not None:
            rolling.close()
        for ticket in self._tickets.values():
            ticket.boarder.guest.close()
        self._tickets.clear()


def _found(ticket: Ticket) -> Found:
    guest = ticket.boarder.guest
    try:
        results = guest.end()
        return brought(ticket.entry.opened.graph, results.saved, results.ended)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - it goes to its owner
        return understood(error)
    finally:
        guest.close()
        for decoder in ticket.boarder.decoders:
            decoder.close()
