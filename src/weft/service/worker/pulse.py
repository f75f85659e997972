"""The pulse of one job while it is drawn: its claim is kept, its followers hear of it.

A thread beside the one that draws (`Beats`, one for all jobs of a worker) renews the lease, learns
that the job is to be cancelled or was given to another worker, writes down logs and progress. It is
the watchdog, too: it fails a job that goes on far beyond its time, which only happens inside a
single operation, and then ends the process (`die`), as a thread inside an operation cannot be
stopped.

    with Pulse(ledger, job, settings, ring=bells.gateway.ring) as pulse:
        draw(..., on_log=pulse.log, on_value=pulse.value, cancelled=pulse.cancelled)
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from itertools import groupby
from types import TracebackType

from weft.errors import TimeLimitError
from weft.service.jobs.life import Failed, Job
from weft.service.store.interface import Ledger, LostClaimError
from weft.settings import Settings
from weft.wire.messages import LogEvent, ProgressEvent, ValueEvent, encode
from weft.wire.reports import report_of

LOOK = 0.2
"""How long a cancellation may go unnoticed."""
GATHER = 0.03
"""What is logged within this time after another log travels as one event."""
PROGRESS = 0.2
"""Progress is told so often at most."""
IDLE = 5.0
"""Seconds without a job after which a thread that stays between jobs goes, too."""
OVERTIME, GRACE = 1.5, 2.0
"""The time after which a job is beyond its time, of that time and in seconds on top."""

LOG = logging.getLogger("weft.worker")


class Beats:
    """The thread that gives the pulses their beats. It is there while any of them is; with `stays`
    also between jobs that come one after another, until `close()`: to start a thread and to wait
    for its end takes a short job as long as all else that is done around it.
    """

    def __init__(self) -> None:
        self.stays = False
        self._lock = threading.Lock()
        self._pulses: set[Pulse] = set()
        self._wake = threading.Event()
        self._over = threading.Event()  # of the thread that is there
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Gives the next beat soon."""
        self._wake.set()

    def join(self, pulse: Pulse) -> None:
        with self._lock:
            self._pulses.add(pulse)
            if self._thread is None:
                self._wake, self._over = threading.Event(), threading.Event()
                own = self._wake, self._over
                self._thread = threading.Thread(
                    target=self._run, args=own, name="pulse", daemon=True
                )
                self._thread.start()

    def leave(self, pulse: Pulse) -> None:
        """With the last one the thread has ended, too, if it does not stay."""
        with self._lock:
            self._pulses.discard(pulse)
            goes = not (self._pulses or self.stays)
        if goes:
            self.close()

    def close(self) -> None:
        """Ends the thread, if it has nothing to do any more. A later pulse starts a new one."""
        with self._lock:
            if self._pulses or self._thread is None:
                return
            thread, self._thread = self._thread, None
            self._over.set()
            self._wake.set()
        thread.join()

    def _run(self, wake: threading.Event, over: threading.Event) -> None:
        latest = time.monotonic()  # when there was a pulse
        while True:
            wake.wait(LOOK)
            wake.clear()
            if over.is_set():
                return
            now = time.monotonic()
            with self._lock:
                pulses = list(self._pulses)
                latest = now if pulses else latest
                if now - latest > IDLE:
                    self._thread = None
                    return
            for pulse in pulses:
                pulse.beat()
            if over.wait(GATHER):
                return


class Pulse:
    """See the module's text. `cancelling` and `lost` say why `cancelled()` is true."""

    def __init__(
        self,
        ledger: Ledger,
        job: Job,
        settings: Settings,
        *,
        ring: Callable[[], None],
        die: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.time,
        beats: Beats | None = None,
    ) -> None:
        self.cancelling = False
        self.lost = False
        self._ledger = ledger
        self._job = job
        self._token = job.token or ""
        self._settings = settings
        self._ring = ring
        self._die = die
        self._clock = clock
        self._begun = self._renewed = clock()
        self._latest = max(OVERTIME * settings.run_seconds, settings.run_seconds + GRACE)
        self._lock = threading.Lock()
        self._said: list[str | ValueEvent] = []  # lines and values, in order
        self._progress: tuple[int, int] | None = None
        self._told = self._begun  # when progress was told last
        self._beats = beats or Beats()
        self._beating = threading.Lock()
        self._over = False
        self._looked = time.monotonic()

    # -- what the drawing thread calls ---------------------------------------------------------

    def cancelled(self) -> bool:
        """Whether to leave the job: it is to be cancelled, or another worker has it."""
        return self.cancelling or self.lost

    def log(self, text: str) -> None:
        self._say(text)

    def value(self, event: ValueEvent) -> None:
        self._say(event)

    def _say(self, what: str | ValueEvent) -> None:
        with self._lock:
            self._said.append(what)
        self._beats.wake()

    def progress(self, done: int, total: int) -> None:
        self._progress = done, total

    def __enter__(self) -> Pulse:
        self._beats.join(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    def end(self) -> None:
        """Ends it, if it has not ended: whatever was said is written down when this returns."""
        with self._beating:
            over, self._over = self._over, True
        if not over:
            self._beats.leave(self)
            self._guarded(self._write_said)

    # -- the thread ----------------------------------------------------------------------------

    def beat(self) -> None:
        """Writes down what was said; every `LOOK` seconds it looks after the job as well."""
        with self._beating:
            if self._over:
                return
            try:
                self._guarded(self._write_said)
                if time.monotonic() - self._looked >= LOOK:
                    self._guarded(self._turn)
                    self._looked = time.monotonic()
            except Exception:
                LOG.exception("the pulse of job %s missed a beat", self._job.id)

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            if not self.lost:
                act()
        except LostClaimError:
            self.lost = True

    def _turn(self) -> None:
        now = self._clock()
        self._write_progress(now)
        self._keep_claim(now)
        if now - self._begun > self._latest:
            self._give_up(now)

    def _keep_claim(self, now: float) -> None:
        lease = self._settings.lease_seconds
        if now - self._renewed >= lease / 3:
            self.cancelling |= not self._ledger.renew(self._job.id, self._token, now + lease)
            self._renewed = now
            return
        job = self._ledger.job(self._job.id)
        if job is None or job.token != self._token:
            raise LostClaimError
        self.cancelling |= job.cancelling

    def _write_said(self) -> None:
        with self._lock:
            said, self._said = self._said, []
        for is_text, run in groupby(said, lambda one: isinstance(one, str)):
            if is_text:
                self._note("log", encode(LogEvent(text="\n".join(run)), "json"))  # type: ignore[arg-type]
                continue
            for event in run:
                self._note("value", encode(event, "json"))  # type: ignore[arg-type]

    def _write_progress(self, now: float) -> None:
        if self._progress is None or now - self._told < PROGRESS:
            return
        (done, total), self._progress, self._told = self._progress, None, now
        self._note("progress", encode(ProgressEvent(done=done, total=total), "json"))

    def _note(self, kind: str, data: bytes) -> None:
        self._ledger.note(self._job.id, self._token, kind, data)
        self._ring()

    def _give_up(self, now: float) -> None:
        limit = self._settings.run_seconds
        error = TimeLimitError(
            f"the job ran longer than {limit:g} s, which is the server's limit for one job "
            "(run_seconds), inside a single operation",
            fix="ask for less at once",
        )
        report = encode(report_of(error, self._job.id), "json")
        self._ledger.step(self._job.id, Failed(report), now, self._token)
        self.lost = True
        if self._die is not None:
            self._die()
