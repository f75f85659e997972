"""A worker: one loaded model, and a loop that draws queued jobs through it, one after another or
several through one forward.

    worker = Worker(ledger, objects, bells, "tiny", net, known, settings)
    worker.run()                           # until `stop()`, from another thread

It trusts nothing but the store: a job is its row and the objects that the row names. Whoever is
killed here at any point leaves a claim that is taken back, and at most a result object that the
next worker finds.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, BinaryIO, cast

import torch
from msgspec.structs import replace
from torch import nn

from weft.engine.draw import Drawn, draw, overwritten_by
from weft.engine.kept import Kept
from weft.engine.known import Known
from weft.engine.merging import merger_of
from weft.engine.opened import Opened, open_submit
from weft.engine.stepping import sharer_of
from weft.engine.weights import refuse_other_weights
from weft.errors import CancelledError, ServerError, WeftError
from weft.graph.frame import Frame
from weft.run.weights import weights_of
from weft.service.jobs.life import Event, Failed, Finished, Job, Stopped
from weft.service.jobs.usage import settings_for
from weft.service.store.bells import Bells
from weft.service.store.database import is_full
from weft.service.store.interface import Ledger, Objects
from weft.service.store.life_signs import Sign
from weft.service.store.requests import constant, limits_of, submit_of
from weft.service.store.said import lost, still_held
from weft.settings import Settings
from weft.wire.messages import Limits, Manifest, Submit, encode
from weft.wire.reports import report_of, run_error
from weft.wire.results import write_result

from .batch import STEPS, Claims
from .mates import Mate, draw_mates
from .pulse import Beats, Pulse
from .rolling import Underway
from .rooms import Rooms
from .space import Spaces

POLL = 0.5
"""How long a lost ring may cost."""
IN_MEMORY = 8 << 20
"""Results up to so many bytes are put together in memory, larger ones in a file without a name."""

LOG = logging.getLogger("weft.worker")


class Worker:
    """See the module's text. `die` ends the process at once; without it nothing can."""

    def __init__(
        self,
        ledger: Ledger,
        objects: Objects,
        bells: Bells,
        model_id: str,
        net: nn.Module,
        known: Known,
        settings: Settings,
        *,
        holder: str | None = None,
        die: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._ledger = ledger
        self._objects = objects
        self._bells = bells
        self._bell = bells.worker(model_id)
        self._model = model_id
        self._net = net
        self._known = known
        self._settings = settings
        holder = holder or f"worker {model_id}"
        self._die = die
        self._clock = clock
        device = next((one.device for one in net.parameters()), torch.device("cpu"))
        self._spaces = Spaces(ledger, model_id, device, clock=clock)
        self._spaces.now()
        self._claims = Claims(ledger, model_id, holder, settings, clock, time.sleep, self._spaces)
        self._sign = Sign(ledger, f"worker {model_id}", clock)
        self._beats = Beats()
        self._stopping = False
        self.spoilt = False
        """A job has changed the model: whoever runs this has to load it anew."""
        self._underway = Underway(net, known, settings, self)
        self._debt = 0.0  # seconds that are the decode loop's before others have the model again
        device = weights_of(net).device
        self._rooms = Rooms(ledger, objects, settings, self._again, device, clock)
        self._learn_from_before()

    def _learn_from_before(self) -> None:
        """What the checker has found out about the model before this worker was there."""
        card = self._ledger.card(self._model)
        if card is not None and card.fingerprint == self._known.fingerprint and card.tables:
            self._known.signatures.add_bytes(card.tables)

    def run(self) -> None:
        """Draws what there is, and waits for more. Returns when the model is spoilt, too."""
        Kept.of(self._net).stays = self._die is not None  # in a process of its own
        self._beats.stays = True
        try:
            while not self.spoilt and (len(self._underway) or not self._stopping):
                self._sign.give()
                self._rooms.sweep(self._clock())
                if not self._turn():
                    self._bell.wait(POLL)
        finally:
            self._underway.close()
            self._beats.stays = False
            self._beats.close()

    def _turn(self) -> bool:
        """Something to do, if there is anything: new jobs, and a step of the generations under way.

        While there are such, others have the model for as long as they had it: what a job takes is
        the loop's before the next one.
        """
        jobs = [] if self._stopping else self._next()
        begun = time.perf_counter()
        if jobs and jobs[0].lane == STEPS:
            for job in jobs:
                if not self._underway.take(job):
                    self.do(job)
        elif jobs:
            (self.do_together if len(jobs) > 1 else self.do_first)(jobs)
            spent = time.perf_counter() - begun
            self._underway.pause(spent)
            self._debt += spent
        if not len(self._underway):
            self._debt = 0.0
            return bool(jobs)
        begun = time.perf_counter()
        try:
            self._underway.turn()
        except WeftError as error:  # the model must not be used any more; nobody is to blame
            LOG.warning("the model cannot be used any more: %s", error)
            self.spoilt = True
        self._debt = max(0.0, self._debt - (time.perf_counter() - begun))
        return True

    def _next(self) -> list[Job]:
        """Jobs to do now: of others than generations only as long as the loop is owed nothing."""
        if not self._debt:
            return self._claims.next()
        if self._underway.full:
            return []
        return self._claims.steps(self._underway.room, self._underway.seats)

    def stop(self) -> None:
        """Lets `run` return after the job in hand."""
        self._stopping = True
        self._bell.ring()

    def claim(self) -> Job | None:
        """The next job, if there is one."""
        return self._claims.one()

    def do_first(self, jobs: Sequence[Job]) -> None:
        self.do(jobs[0])

    def do(self, job: Job) -> None:
        """Draws one claimed job and says how it ended."""
        with self.pulse(job) as pulse:
            event = self._outcome(job, pulse, lambda: self._drawn(job, pulse))
        self._say(job, event, pulse)

    def do_together(self, jobs: Sequence[Job]) -> None:
        """Draws claimed jobs of one lane, through forwards that they share where they can."""
        with ExitStack() as stack:
            mates = [Mate(job, stack.enter_context(self.pulse(job))) for job in jobs]
            try:
                draw_mates(self._net, mates, self.open, self._known, self._settings)
            except WeftError as error:  # the model must not be used any more; nobody is to blame
                LOG.warning("jobs that shared a forward begin again: %s", error)
                self.spoilt = True
                for mate in mates:
                    self.lost(mate.job, mate.pulse)
                return
            shared = [mate for mate in mates if mate.came is not None]
            self._say_all([(mate.job, self._event_of(mate), mate.pulse) for mate in shared])
            for mate in mates:
                if mate.came is None:
                    event = self._outcome(mate.job, mate.pulse, partial(self._by_itself, mate))
                    mate.pulse.end()
                    self._say(mate.job, event, mate.pulse)

    def _event_of(self, mate: Mate) -> Event | None:
        assert mate.came is not None
        event = self._end_of(mate.job, mate.pulse, mate.came, mate.batch, mate.seconds)
        mate.pulse.end()
        return event

    def _by_itself(self, mate: Mate) -> Finished:
        return self._drawn(mate.job, mate.pulse)

    # -- as hands (`rolling.Hands`) ----------------------------------------------------------------

    def ended(
        self, job: Job, pulse: Pulse, came: Drawn | BaseException, batch: int, seconds: float
    ) -> None:
        """Says what came of a job that was drawn together with others."""
        event = self._end_of(job, pulse, came, batch, seconds)
        pulse.end()
        self._say(job, event, pulse)

    def _end_of(
        self, job: Job, pulse: Pulse, came: Drawn | BaseException, batch: int, seconds: float
    ) -> Event | None:
        def act() -> Finished:
            if isinstance(came, BaseException):
                raise came
            return self._finished(job, came)

        event = self._outcome(job, pulse, act)
        if isinstance(event, (Finished, Failed)):
            return replace(event, batch=batch, seconds=seconds)
        return replace(event, seconds=seconds) if isinstance(event, Stopped) else event

    def lost(self, job: Job, pulse: Pulse) -> None:
        """Gives a job back, as one of a worker that died: it begins again."""
        pulse.end()
        self._say(job, lost(job, self._settings.attempts), pulse)

    def pulse(self, job: Job) -> Pulse:
        """What keeps the claim on a job while it is drawn, and tells its followers."""
        settings = settings_for(self._settings, job.limits)
        ring = self._bells.gateway.ring
        die, clock, beats = self._die, self._clock, self._beats
        return Pulse(self._ledger, job, settings, ring=ring, die=die, clock=clock, beats=beats)

    def _say(self, job: Job, event: Event | None, pulse: Pulse) -> None:
        """Says how a job ended, if it is still this worker's."""
        self._say_all([(job, event, pulse)])

    def _say_all(self, ended: Sequence[tuple[Job, Event | None, Pulse]]) -> None:
        """The same of several jobs, at once."""
        mine = []
        for job, event, pulse in ended:
            if event is None or pulse.lost:
                LOG.info("job %s is another worker's now", job.id)
            else:
                mine.append((job.id, event, job.token))
        if not mine:
            return
        said = self._ledger.step_all(mine, self._clock())
        for (id, _, _), one in zip(mine, said, strict=True):
            if isinstance(one, Exception):
                LOG.info("job %s went on without this worker: %s", id, one)

    def _outcome(self, job: Job, pulse: Pulse, act: Callable[[], Finished]) -> Event | None:
        """What came of it, with the time that it took: it may have been claimed long before."""
        begun = time.perf_counter()
        event = self._came_of(job, pulse, act)
        return event and replace(event, seconds=time.perf_counter() - begun)

    def _came_of(
        self, job: Job, pulse: Pulse, act: Callable[[], Finished]
    ) -> Finished | Failed | Stopped | None:
        try:
            return act()
        except CancelledError as error:
            if not pulse.cancelling:
                return None
            return Stopped(encode(report_of(error, job.id), "json"))
        except WeftError as error:
            self.spoilt |= getattr(error, "retire", False)
            return Failed(encode(report_of(error, job.id), "json"))
        except Exception as cause:
            if not still_held(self._ledger, job):
                return None  # it is another's now, or over, and its request is gone
            LOG.exception("job %s failed in the server itself", job.id)
            error = _no_room() if is_full(cause) else _mistake()
            return Failed(encode(report_of(error, job.id), "json"))

    def open(self, job: Job) -> tuple[Opened, bool]:
        """A job's request, and whether it asks for the recorded shapes."""
        submit = submit_of(self._objects, job)
        fetch = partial(constant, self._objects, job.owner)
        opened = open_submit(submit, fetch, self._known)
        refuse_other_weights(self._net, submit.weights)
        return opened, submit.strict

    def _drawn(self, job: Job, pulse: Pulse) -> Finished:
        self._spaces.check(job)
        opened, strict = self.open(job)
        limits = limits_of(self._settings, job)
        if not job.session:
            return self._finished(job, self._draw(opened, strict, pulse, limits))
        submit = submit_of(self._objects, job)
        uses = self._rooms.lent(job, submit)
        drawn = self._draw(opened, strict, pulse, limits, uses)
        done = self._finished(job, drawn)
        self._rooms.leave(job, submit, drawn.kept)
        return done

    def _finished(self, job: Job, drawn: Drawn) -> Finished:
        size, digest = self._keep(job, drawn.manifest, drawn.frames)
        names = tuple(name for name, _ in drawn.manifest.saved)
        return Finished(result_bytes=size, result_sha256=digest, names=names)

    def _again(self, job: Job, submit: Submit, uses: Mapping[str, torch.Tensor]) -> Any:
        """Draws a request of a session's log once more, in silence: what it keeps."""
        opened = open_submit(submit, partial(constant, self._objects, job.owner), self._known)
        limits = limits_of(self._settings, job)
        return self._draw(opened, submit.strict, None, limits, uses).kept

    def _draw(
        self,
        opened: Opened,
        strict: bool,
        pulse: Pulse | None,
        limits: Limits,
        uses: Mapping[str, torch.Tensor] | None = None,
    ) -> Drawn:
        """Raises `WeftError` only: what torch or the model raised is a `RunError`."""
        told = overwritten_by(
            self._known, *opened.calls, graph=opened.graph, sampling=opened.sampling
        )
        try:
            return draw(
                self._net,
                opened,
                overwritten=told,
                merger=merger_of(self._known),
                sharer=sharer_of(self._known),
                tokenizer=self._known.tokenizer,
                limits=limits,
                strict=strict,
                on_log=None if pulse is None else pulse.log,
                on_value=None if pulse is None else pulse.value,
                on_progress=None if pulse is None else pulse.progress,
                cancelled=None if pulse is None else pulse.cancelled,
                uses=uses,
            )
        except WeftError:
            raise
        except Exception as error:
            raise run_error(error, line=getattr(error, "weft_line", None)) from error

    def _keep(self, job: Job, manifest: Manifest, saved: dict[str, Frame]) -> tuple[int, str]:
        """Stores the result; where a worker before this one had done so, that one stays."""
        name = f"results/{job.id}"
        with tempfile.SpooledTemporaryFile(IN_MEMORY) as file:
            size, digest = write_result(cast(BinaryIO, file), manifest, saved)
            file.seek(0)
            if self._objects.put(name, cast(BinaryIO, file), durable=False):
                return size, digest
        return measure(self._objects, name)


def _mistake() -> ServerError:
    return ServerError("the server made a mistake while it ran the job")


def _no_room() -> ServerError:
    return ServerError(
        "the server has no room on its disk for what the job saved",
        fix="send it again later, and tell its operator",
    )


def measure(objects: Objects, name: str) -> tuple[int, str]:
    """Size and SHA-256 of an object that is there."""
    seen, size = hashlib.sha256(), 0
    for piece in objects.stream(name):
        seen.update(piece)
        size += len(piece)
    return size, seen.hexdigest()
