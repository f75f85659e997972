"""`Underway`: the generations that a worker has in its decode loop, each with its job and pulse.

    underway = Underway(net, known, settings, hands)
    underway.take(job)                     # False: it has to run by itself
    while len(underway):
        underway.turn()                    # one step of all; those that are over are ended

A step that fails in the model itself loses the loop: all its jobs are given back as those of a
worker that died are, and begin again, each by itself.
"""

from __future__ import annotations

import logging
from typing import Protocol

from torch import nn

from weft.engine.draw import Drawn, overwritten_by
from weft.engine.known import Known
from weft.engine.opened import Opened
from weft.engine.party import Entry
from weft.engine.rolling import Decode, LoopLostError, Ticket
from weft.engine.stepping import sharer_of
from weft.errors import WeftError
from weft.service.jobs.life import Job
from weft.service.store.requests import limits_of
from weft.settings import Settings

from .mates import said
from .pulse import Pulse

LOG = logging.getLogger("weft.worker")


class Hands(Protocol):
    """What a worker does for a job, whichever way it is drawn."""

    def open(self, job: Job) -> tuple[Opened, bool]: ...
    def pulse(self, job: Job) -> Pulse: ...
    def ended(
        self, job: Job, pulse: Pulse, came: Drawn | BaseException, batch: int, seconds: float
    ) -> None: ...
    def lost(self, job: Job, pulse: Pulse) -> None: ...


class Underway:
    """See the module's text."""

    def __init__(self, net: nn.Module, known: Known, settings: Settings, hands: Hands) -> None:
        self._known = known
        self._settings = settings
        self._hands = hands
        self._jobs: dict[Ticket, tuple[Job, Pulse]] = {}
        stepping = sharer_of(known)
        self._decode = None if stepping is None else Decode(net, stepping, known.tokenizer)

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def room(self) -> int:
        """Positions of the shared cache that are not spoken for."""
        return self._settings.merge_positions - sum([job.tokens for job, _ in self._jobs.values()])

    @property
    def seats(self) -> int:
        """How many more jobs it takes."""
        return self._settings.merge_jobs - len(self)

    @property
    def full(self) -> bool:
        return self.room <= 0 or self.seats <= 0

    def pause(self, seconds: float) -> None:
        """The model was somebody else's for so long."""
        if self._decode is not None:
            self._decode.pause(seconds)

    def take(self, job: Job) -> bool:
        """Lets a job into the loop. False: it has to run by itself."""
        if self._decode is None:
            return False
        pulse = self._hands.pulse(job)
        with _Unless(pulse) as left:
            try:
                opened, strict = self._hands.open(job)
                entry = self._entry(job, pulse, opened, strict)
            except Exception as error:  # noqa: BLE001 - it comes out where it runs by itself
                LOG.info("job %s cannot share steps: %s", job.id, type(error).__name__)
                return False
            ticket = self._decode.join(entry)
            if ticket is None:
                return False
            left.stays = True
        self._jobs[ticket] = job, pulse
        self._end()
        return True

    def _entry(self, job: Job, pulse: Pulse, opened: Opened, strict: bool) -> Entry:
        told = overwritten_by(
            self._known, *opened.calls, graph=opened.graph, sampling=opened.sampling
        )
        return Entry(
            opened,
            limits_of(self._settings, job),
            told,
            strict,
            on_log=pulse.log,
            on_value=pulse.value,
            on_progress=pulse.progress,
            cancelled=pulse.cancelled,
        )

    def turn(self) -> None:
        """One step of all. Raises what ends the use of the model; then all are given back."""
        assert self._decode is not None
        try:
            self._decode.turn()
        except LoopLostError as error:
            LOG.warning("jobs that shared steps begin again: %s", error.__cause__)
            self.close()
        except WeftError:
            self.close()
            raise
        self._end()

    def _end(self) -> None:
        """Ends the jobs that have left the loop."""
        assert self._decode is not None
        for ticket in self._decode.left():
            job, pulse = self._jobs.pop(ticket)
            found = ticket.found
            assert found is not None
            came = found if isinstance(found, Drawn) else said(found)
            self._hands.ended(job, pulse, came, ticket.batch, ticket.seconds)

    def close(self) -> None:
        """Ends the loop; jobs that are under way are given back."""
        if self._decode is not None:
            self._decode.close()
        jobs, self._jobs = self._jobs, {}
        for job, pulse in jobs.values():
            self._hands.lost(job, pulse)


class _Unless:
    """Begins a pulse, and ends it unless it is to stay."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self.stays = False

    def __enter__(self) -> _Unless:
        self._pulse.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if not self.stays:
            self._pulse.end()
