"""Rooms: the values that sessions keep on this worker, by session, request and name.

    uses = rooms.lent(job, submit)         # by `Const.key`; made again where this worker is new
    drawn = draw(..., uses=uses)
    rooms.leave(job, submit, drawn.kept)   # all of them at once, when the request has run

A room is memory, and its log is durable: the requests of the session, in the ledger and the folder.
A worker that has not got a room, because the one before it died, draws again what the values that
are still wanted were made by, in order (`_replayed`), and nothing else. After every so much time of
drawing the values are written down (`snapshots`), from where the log is then gone through. So a
request finds either every value it needs, as it was, or fails by name (`SessionLostError`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from weft.errors import (
    FailedRunError,
    LimitError,
    NotReachedError,
    SessionLostError,
    WeftError,
)
from weft.run.price import short
from weft.service.jobs.life import Job
from weft.service.jobs.usage import settings_for
from weft.service.store.interface import Ledger, Objects
from weft.service.store.requests import submit_of
from weft.settings import Settings
from weft.wire.messages import ErrorReport, Kept, Seat, Submit, decode

from . import snapshots

LEAST = 256
"""Bytes that a value counts for at least: what holds it."""
WRITE = 0.25
"""The part of `run_seconds` that drawing a session's requests may take before its values are
written down."""
LOOK = 1.0
"""Seconds between looks at which sessions are over."""
LOG = logging.getLogger("weft.worker")

Values = Mapping[str, torch.Tensor]
Again = Callable[[Job, Submit, Values], Values]
"""Draws a request of the log once more: what it keeps."""


@dataclass
class Room:
    """The values of one session of an owner; `lost` says why those of a request could not be made
    again."""

    owner: str
    values: dict[Kept, torch.Tensor] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)
    begun: float = 0.0
    """When the request in hand began."""
    spent: float = 0.0
    """Seconds that requests took since the values were written down."""

    @property
    def bytes(self) -> int:
        return _bytes(self.values.values())


class Rooms:
    """See the module's text. `again` draws a request of the log."""

    def __init__(
        self,
        ledger: Ledger,
        objects: Objects,
        settings: Settings,
        again: Again,
        device: torch.device | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._ledger = ledger
        self._objects = objects
        self._settings = settings
        self._again = again
        self._device = device
        self._clock = clock
        self._rooms: dict[str, Room] = {}
        self._looked = 0.0

    def __len__(self) -> int:
        return len(self._rooms)

    def lent(self, job: Job, submit: Submit) -> dict[str, torch.Tensor]:
        """The values that stand for constants of this request."""
        seat = submit.seat
        if seat is None:
            return {}
        room = self._rooms.get(seat.id)
        if room is None:
            room = self._rooms[seat.id] = self._replayed(job, seat)
        room.begun = time.monotonic()
        return {key: self._value(room, job, seat, kept) for key, kept in seat.uses.items()}

    def leave(self, job: Job, submit: Submit, kept: Values) -> None:
        """The request has run: what it keeps is here from now on, what it drops is not.

        Raises `LimitError` where that would be too much; then nothing has changed.
        """
        seat = submit.seat
        if seat is None:
            return
        room = self._rooms[seat.id]
        gone = {one: room.values[one] for one in seat.drops if one in room.values}
        added = {Kept(number=seat.number, name=name): value for name, value in kept.items()}
        size = room.bytes + _bytes(added.values()) - _bytes(gone.values())
        settings = settings_for(self._settings, job.limits)
        limit = settings.session_bytes
        if added and size > limit:
            raise LimitError(
                f"with this block the session would keep {short(size, 1024, 'B')}; the server's "
                f"session_bytes is {short(limit, 1024, 'B')} (bytes of the values that one "
                "session keeps on the server)",
                fix="hold less: let go of variables (del h), or keep slices",
            )
        more = size - room.bytes if added else 0
        if more > 0:
            self._check_owner(job.owner, more, settings)
            self._check_all(more)
        for one in gone:
            del room.values[one]
        room.values |= added
        self._write_down(room, seat)

    def _write_down(self, room: Room, seat: Seat) -> None:
        """Makes a snapshot, if making the values again would take long by now."""
        room.spent += time.monotonic() - room.begun
        if room.spent >= WRITE * self._settings.run_seconds and not room.lost:
            try:
                snapshots.write(self._objects, seat.id, seat.number, room.values)
            except Exception:
                LOG.exception("the values of session %s cannot be written down", seat.id)
            room.spent = 0.0

    def _check_owner(self, owner: str, more: int, settings: Settings) -> None:
        """Refuses what would be too much of one owner's sessions together: others want room."""
        limit = settings.key_session_bytes or settings.all_session_bytes // 2
        held = self._held(limit - more, owner)
        if held + more > limit:
            raise LimitError(
                f"with this block the sessions of this key would keep "
                f"{short(held + more, 1024, 'B')} on the worker of this model; the limit "
                f"key_session_bytes is {short(limit, 1024, 'B')} (bytes of the values that all "
                "sessions of one key keep there)",
                fix="hold less: let go of variables (del h), keep slices, or end other sessions; "
                f"what one that was left behind holds is free after {settings.session_seconds:g} "
                "seconds",
            )

    def _held(self, most: int, owner: str | None = None) -> int:
        """Bytes of the rooms of an owner (None: of all). Where they are more than so many, those of
        sessions that are over by now do not count."""

        def held() -> int:
            rooms = self._rooms.values()
            return sum([room.bytes for room in rooms if owner in (None, room.owner)])

        found = held()
        if found > most:
            self._forget(self._clock())
            found = held()
        return found

    def _check_all(self, more: int) -> None:
        """Refuses what would be too much of all sessions together."""
        limit = self._settings.all_session_bytes
        held = self._held(limit - more)
        if held + more > limit:
            raise LimitError(
                f"the sessions on this worker would keep {short(held + more, 1024, 'B')}; the "
                f"server's all_session_bytes is {short(limit, 1024, 'B')} (bytes of the values "
                "that all sessions together keep on the worker of one model)",
                fix="hold less, or try again when others have ended theirs",
            )

    def sweep(self, now: float) -> None:
        """Forgets the rooms of sessions that are over. Called often; looks from time to time."""
        if not self._rooms or 0 <= now - self._looked < LOOK:
            return
        self._forget(now)

    def _forget(self, now: float) -> None:
        self._looked = now
        for id in list(self._rooms):
            session = self._ledger.session(id)
            if session is None or session.over(now):
                del self._rooms[id]

    # -- what is not here ------------------------------------------------------------------------

    def _value(self, room: Room, job: Job, seat: Seat, kept: Kept) -> torch.Tensor:
        found = room.values.get(kept)
        if found is not None:
            return found
        if kept.number in room.lost:
            raise _lost(kept.number, room.lost[kept.number])
        maker = self._ledger.find(job.owner, f"{seat.id}-{kept.number}")
        if maker is None:
            raise _lost(kept.number, "its job is not kept any more")
        if maker.state != "done":
            raise FailedRunError(
                f"it needs a value of request {kept.number} of the session, which "
                f"{'was cancelled' if maker.state == 'cancelled' else 'failed'}: {_why(maker)}",
                fix="mend the cause and run that block again",
            )
        try:
            submit_of(self._objects, maker)
        except KeyError:
            raise _lost(kept.number, "its request is not kept any more") from None
        raise NotReachedError(
            f"it needs a value of request {kept.number} of the session, which that did not reach "
            "(a stop came first), or which was dropped",
            fix="move the stop below what is needed",
        )

    def _replayed(self, job: Job, seat: Seat) -> Room:
        """A room with all that is still wanted before a request, made again from the log."""
        since, values = snapshots.latest(self._objects, seat.id, seat.number, self._device)
        log = dict(self._log(job, seat, since + 1))
        kept = _alive(log, set(values)) | set(seat.uses.values())
        wanted = sorted(_wanted(log, kept))
        room = Room(job.owner, values)
        if wanted:
            LOG.info("session %s: %d requests are drawn again", seat.id, len(wanted))
        last = {one: number for number in wanted for one in _uses(log[number][1])}
        until = time.monotonic() + self._settings.run_seconds
        for number in wanted:
            if time.monotonic() > until:
                limit = f"{self._settings.run_seconds:g} s (run_seconds)"
                room.lost[number] = f"to make all of them again takes longer than {limit}"
                continue
            self._draw_again(room, *log[number])
            _thin(room, kept, last, number)
        _thin(room, kept, last, seat.number)
        return room

    def _log(
        self, job: Job, seat: Seat, first: int = 1
    ) -> Iterable[tuple[int, tuple[Job, Submit]]]:
        """The requests before this one that have run, by number."""
        for number in range(first, seat.number):
            maker = self._ledger.find(job.owner, f"{seat.id}-{number}")
            if maker is not None and maker.state == "done":
                try:
                    yield number, (maker, submit_of(self._objects, maker))
                except KeyError:
                    continue  # `_value` says so, to whom it concerns

    def _draw_again(self, room: Room, maker: Job, submit: Submit) -> None:
        """Puts back what a request has kept; or notes why it cannot be made again."""
        assert submit.seat is not None
        number = submit.seat.number
        try:
            uses = {key: room.values[one] for key, one in submit.seat.uses.items()}
            kept = self._again(maker, submit, uses)
        except KeyError:
            room.lost[number] = "what it was made of is not kept any more"
        except WeftError as error:
            if getattr(error, "retire", False):
                raise
            room.lost[number] = f"it failed this time: {error.message}"
        else:
            room.values |= {Kept(number=number, name=name): value for name, value in kept.items()}


Log = Mapping[int, tuple[Job, Submit]]


def _uses(submit: Submit) -> set[Kept]:
    return set(submit.seat.uses.values()) if submit.seat is not None else set()


def _thin(room: Room, kept: set[Kept], last: Mapping[Kept, int], number: int) -> None:
    """Drops what is neither kept nor used after a request."""
    needed = [one for one in room.values if one in kept or last.get(one, 0) > number]
    room.values = {one: room.values[one] for one in needed}


def _alive(log: Log, before: set[Kept]) -> set[Kept]:
    """What is left of what was there before, and of what was kept since, and not dropped."""
    alive = set(before)
    for number in sorted(log):
        its = log[number][1].seat
        if its is not None:
            alive |= {Kept(number=number, name=name) for name in its.keeps}
            alive -= set(its.drops)
    return alive


def _wanted(log: Log, kept: set[Kept]) -> set[int]:
    """The requests whose values are kept, and those that they were made of."""
    todo = [one.number for one in kept]
    wanted: set[int] = set()
    while todo:
        number = todo.pop()
        if number in log and number not in wanted:
            wanted.add(number)
            todo += [one.number for one in _uses(log[number][1])]
    return wanted


def _bytes(values: Iterable[torch.Tensor]) -> int:
    """What values take; one that is empty takes something, too."""
    return sum([max(value.untyped_storage().nbytes(), LEAST) for value in values])


def _why(job: Job) -> str:
    if job.error is None:
        return "no reason is known"
    return decode(job.error, ErrorReport, "json").message


def _lost(number: int, why: str) -> SessionLostError:
    return SessionLostError(
        f"the worker of the session was lost with its values, and request {number} of the session "
        f"cannot be run again: {why}",
        fix="begin the session again; what was saved is there",
    )
