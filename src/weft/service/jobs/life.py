"""The life of a job: a table of states and events with no fallback. Pure: no clock, no socket.

    received --Priced--> queued --Leased--> running --Finished--> done
        |                 | ^                  |---Failed-------> failed
        |                 | |                  |---Stopped------> cancelled
        |                 | +------Lost--------|  (fewer than `attempts` so far; else failed)
        +-----Refused-----+--> failed

`Cancel` ends a job that waits at once, and marks one that runs (its worker then says `Stopped`).

    step(job, Priced(...), now) -> Change(job, commands)

An event that the table does not have for a state raises `IllegalStepError`, with the job's history.
What is to be done about a step is data too: `commands`, which the store and its callers carry out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

STATES = ("received", "queued", "running", "done", "failed", "cancelled")
FINAL = frozenset({"done", "failed", "cancelled"})

STAGES = {"received": "price", "queued": "queue", "running": "run"}
"""What the time spent in a state is called."""

HISTORY = 20
"""How many events a job remembers."""


class Job(Struct, frozen=True, kw_only=True):
    """A job at rest. `error` and `price` are wire messages as JSON: nothing here reads them.

    `names` are what it saves, `stages` seconds by stage, `token` the claim of who has it now.
    Objects: `submits/<id>` is the request as it came, `results/<id>` the result file.
    """

    id: str
    owner: str
    request_id: str
    asked: str = ""  # the id of the HTTP request that submitted it, in the log and for its owner
    digest: str = ""  # of the request, so that another one under the same id is seen
    request_bytes: int = 0  # of its object
    model: str
    created: float
    state: str = "received"
    look: bool = False
    weight: float = 1.0  # of its key, in the queue
    limits: dict[str, float] = {}  # settings that are others for its key
    nodes: int = 0  # of its graph: what pricing it counts
    lane: str = ""  # jobs of one lane may share a forward or a decode loop; "": it runs alone
    tokens: int = 0  # rows x positions of its inputs
    peak: int = 0  # bytes that it needs beside the model's weights
    weights: int = 0  # bytes that it may tell of the model's weights
    used: float | None = None  # seconds of the accelerator; None: as long as it ran
    cancelling: bool = False
    attempts: int = 0  # how often a worker began it
    pricings: int = 0  # how often the checker began it
    holder: str | None = None
    token: str | None = None
    until: float | None = None
    since: float = 0.0  # when the state began
    price: bytes | None = None
    cost: float = 0.0
    error: bytes | None = None  # why it ended; while it is `cancelling`, why it is to end
    result_bytes: int | None = None
    result_sha256: str | None = None
    names: tuple[str, ...] = ()
    batch: int = 1  # how many jobs shared its forwards; its owner learns whether any did
    constants: tuple[str, ...] = ()  # digests, so that they are kept while it waits
    session: str = ""  # the session that it belongs to
    after: str | None = None  # the job of that session before it: it waits until that one is over
    stages: dict[str, float] = {}
    ended: float | None = None
    keep: float | None = None  # seconds after its end; None: as long as the server keeps any
    history: tuple[str, ...] = ()  # the last events, for messages


# -- events --------------------------------------------------------------------------------------


class Priced(Struct, frozen=True, kw_only=True, tag=True):
    price: bytes
    cost: float
    names: tuple[str, ...]
    lane: str = ""
    tokens: int = 0
    peak: int = 0
    weights: int = 0


class Refused(Struct, frozen=True, tag=True):
    """The checker will not have it, or its key has nothing left when its turn comes."""

    error: bytes


class Leased(Struct, frozen=True, tag=True):
    """Somebody claims it: the checker a received job, a worker a queued one."""

    holder: str
    token: str
    until: float


class Lost(Struct, frozen=True, tag=True):
    """Who had it died, or was silent for too long. `error` is what it fails with, if it fails."""

    attempts: int  # how many are allowed
    error: bytes


class Finished(Struct, frozen=True, kw_only=True, tag=True):
    """`seconds` are its own of the accelerator, without those in which it waited for others."""

    result_bytes: int
    result_sha256: str
    names: tuple[str, ...]
    seconds: float | None = None
    batch: int = 1


class Failed(Struct, frozen=True, tag=True):
    """`seconds` as in `Finished`."""

    error: bytes
    seconds: float | None = None
    batch: int = 1


class Cancel(Struct, frozen=True, tag=True):
    """The owner wants no more of it."""

    error: bytes


class Stopped(Struct, frozen=True, tag=True):
    """Its worker left it because it is to be cancelled. `seconds` as in `Finished`."""

    error: bytes
    seconds: float | None = None


Event = Priced | Refused | Leased | Lost | Finished | Failed | Cancel | Stopped


# -- commands ------------------------------------------------------------------------------------


class Note(Struct, frozen=True, tag=True):
    """Tell those who follow the job: its new state, or that it is over.

    Only an end is rung for: a state on the way is seen with the next news, or a moment later.
    """

    kind: Literal["state", "end"]


class Ring(Struct, frozen=True, tag=True):
    """Wake a process that has something to do now; `worker` is the one of the job's model."""

    who: Literal["gateway", "checker", "worker"]


class DropSubmit(Struct, frozen=True, tag=True):
    """Nobody needs the request any more: `submits/<id>` may go."""


Command = Note | Ring | DropSubmit


class Change(Struct, frozen=True):
    """A job after a step, and what is to be done about it."""

    job: Job
    commands: tuple[Command, ...] = ()


class IllegalStepError(Exception):
    """An event that cannot happen to a job in its state: a mistake of ours, or a race lost."""

    def __init__(self, job: Job, event: Event) -> None:
        past = "; ".join(job.history) or "nothing yet"
        name = type(event).__name__
        super().__init__(f"job {job.id} is {job.state}: {name} cannot happen to it (past: {past})")
        self.job = job
        self.event = event


# -- steps ---------------------------------------------------------------------------------------

BEGIN: tuple[Command, ...] = (Note("state"), Ring("checker"))
"""What is to be done about a job that has just been submitted."""


def step(job: Job, event: Event, now: float) -> Change:
    """The job after an event. Raises `IllegalStepError`."""
    handler = TABLE.get((job.state, type(event)))
    if handler is None:
        raise IllegalStepError(job, event)
    change = handler(job, event, now)
    said = f"{now:.3f} {type(event).__name__} when {job.state}"
    history = (*job.history, said)[-HISTORY:]
    return Change(replace(change.job, history=history), change.commands)


def _claimed_for_pricing(job: Job, event: Leased, now: float) -> Change:
    if job.token is not None:
        raise IllegalStepError(job, event)
    return Change(_leased(job, event, pricings=job.pricings + 1))


def _begun(job: Job, event: Leased, now: float) -> Change:
    leased = _leased(job, event, attempts=job.attempts + 1)
    return Change(_moved(leased, "running", now), (Note("state"),))


def _priced(job: Job, event: Priced, now: float) -> Change:
    told = {name: getattr(event, name) for name in Priced.__struct_fields__}
    known = replace(_free(job), **told)
    commands = (Note("state"), Ring("worker"))
    return Change(_moved(known, "queued", now), commands)


def _pricing_lost(job: Job, event: Lost, now: float) -> Change:
    if job.token is None:
        raise IllegalStepError(job, event)
    if job.pricings >= event.attempts:
        return _over(job, "failed", event.error, now)
    return Change(_free(job), (Ring("checker"),))


def _run_lost(job: Job, event: Lost, now: float) -> Change:
    if job.cancelling:
        return _over(job, "cancelled", job.error, now)
    if job.attempts >= event.attempts:
        return _over(job, "failed", event.error, now)
    commands = (Note("state"), Ring("worker"))
    alone = replace(_free(job), lane="")  # whoever shared with it is not to be lost with it again
    return Change(_moved(alone, "queued", now), commands)


def _done(job: Job, event: Finished, now: float) -> Change:
    brought = replace(
        job,
        result_bytes=event.result_bytes,
        result_sha256=event.result_sha256,
        names=event.names,
        used=event.seconds,
        batch=event.batch,
    )
    return _over(brought, "done", None, now)


def _failed(job: Job, event: Refused | Failed, now: float) -> Change:
    known = replace(job, used=getattr(event, "seconds", None))
    return _over(known, "failed", event.error, now)


def _cancelled(job: Job, event: Cancel, now: float) -> Change:
    return _over(job, "cancelled", event.error, now)


def _to_be_cancelled(job: Job, event: Cancel, now: float) -> Change:
    error = job.error if job.cancelling else event.error
    return Change(replace(job, cancelling=True, error=error), (Ring("worker"),))


def _stopped(job: Job, event: Stopped, now: float) -> Change:
    if not job.cancelling:
        raise IllegalStepError(job, event)
    return _over(replace(job, used=event.seconds), "cancelled", event.error, now)


TABLE: dict[tuple[str, type], Callable[[Job, Any, float], Change]] = {
    ("received", Leased): _claimed_for_pricing,
    ("received", Priced): _priced,
    ("received", Refused): _failed,
    ("received", Lost): _pricing_lost,
    ("received", Cancel): _cancelled,
    ("queued", Leased): _begun,
    ("queued", Refused): _failed,
    ("queued", Cancel): _cancelled,
    ("running", Finished): _done,
    ("running", Failed): _failed,
    ("running", Lost): _run_lost,
    ("running", Cancel): _to_be_cancelled,
    ("running", Stopped): _stopped,
}


def _over(job: Job, state: str, error: bytes | None, now: float) -> Change:
    ended = replace(_free(job), error=error, cancelling=False, ended=now)
    drop = (Ring("worker"),) if job.session else (DropSubmit(),)  # the session's log has it
    return Change(_moved(ended, state, now), (Note("end"), *drop, Ring("gateway")))


def _moved(job: Job, state: str, now: float) -> Job:
    """In another state from now on; the time in the last one counts for its stage."""
    stage = STAGES[job.state]
    spent = max(0.0, now - max(job.since, job.created))
    stages = {**job.stages, stage: job.stages.get(stage, 0.0) + spent}
    return replace(job, state=state, since=now, stages=stages)


def _leased(job: Job, event: Leased, **counted: int) -> Job:
    return replace(job, holder=event.holder, token=event.token, until=event.until, **counted)


def _free(job: Job) -> Job:
    """Nobody has it."""
    return replace(job, holder=None, token=None, until=None)
