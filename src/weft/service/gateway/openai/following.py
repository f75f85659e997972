"""What becomes of a job, for a request that waits for it: tokens as they come, then its end."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import NamedTuple

from weft.errors import LimitError, NoSuchError, WeftError
from weft.graph.frame import Frame
from weft.graph.node import Seq, refs
from weft.service.jobs.life import FINAL, Job
from weft.service.jobs.limits import whole
from weft.service.jobs.usage import until_tomorrow
from weft.service.store.interface import Note
from weft.wire import frames
from weft.wire.messages import ErrorReport, ValueEvent, decode
from weft.wire.reports import error_of
from weft.wire.results import decode_result, selection

from ..errors import Refused, trusted
from ..events import PAGE
from ..models import not_ready
from ..state import Gateway
from ..waiting import Waiting
from .jobs import IDS, MINE, Sent
from .scores import LAST, Score, is_begun, last_of, numbers, scores_of

BEAT_SECONDS = 10.0


class News(NamedTuple):
    """Ids that have come, with their scores if these were asked for; or that the job is over.
    `idle`: nothing has come for a while, and this is what to say of it."""

    ids: tuple[int, ...] = ()
    scores: tuple[Score, ...] = ()
    begun: tuple[Score, ...] = ()  # of the prompt
    over: Job | None = None
    idle: str = ""


class Answer(NamedTuple):
    """What a job that is over brought: all ids, and the score of the last one possible."""

    ids: tuple[int, ...]
    last: Score | None = None


async def followed(gateway: Gateway, sent: Sent) -> AsyncGenerator[News, None]:
    """The tokens that a job hands out, each once, and at last its end."""
    after, told, idle = 0, -1, ""
    with gateway.watch.attend(sent.job.id) as waiter:
        while True:
            closing = gateway.closing  # asked before it looks: what there is by then is told
            waiter.clear()
            job, notes = await gateway.off(_looked, gateway, sent.job.id, after)
            if job is None:
                raise NoSuchError("the job was deleted while it was waited for")
            found: list[list[Frame]] = []
            for note in notes:
                after = note.seq
                if note.kind == "value":
                    told, parts = _handed(note.data, sent.stream, told)
                    found += parts
            yield _news(found, idle)
            if len(notes) == PAGE:
                continue
            if job.state in FINAL:
                yield News(over=job)
                return
            if closing:
                raise not_ready("the server is about to stop")
            since = time.monotonic()
            await waiter.over(BEAT_SECONDS)
            late = time.monotonic() - since >= BEAT_SECONDS
            idle = await gateway.off(_idle, gateway, job) if late else ""


def _looked(gateway: Gateway, id: str, after: int) -> tuple[Job | None, list[Note]]:
    """The job, then its notes: those of one that is over are all there. Blocks."""
    job = gateway.ledger.job(id)
    return job, gateway.ledger.notes(id, after, PAGE)


def _idle(gateway: Gateway, job: Job) -> str:
    """What is said of a job that says nothing. Blocks."""
    load = Waiting(gateway).load(job)
    if load is None:
        return f"the job is {job.state}"
    return f"{job.model} is being loaded: {load.done} of {load.total} bytes"


def _news(found: list[list[Frame]], idle: str) -> News:
    begun = [one for parts in found if is_begun(parts) for one in scores_of(parts)]
    found = [parts for parts in found if not is_begun(parts)]
    ids = tuple([one for parts in found for one in numbers(parts[0])])
    scores = [one for parts in found if len(parts) > 1 for one in scores_of(parts)]
    return News(ids, tuple(scores), tuple(begun), idle=idle)


def _handed(data: bytes, stream: int, told: int) -> tuple[int, list[list[Frame]]]:
    """The number of a value, and its tensors; a job that is begun anew repeats some."""
    with trusted():
        event = decode(data, ValueEvent, "json")
        if event.number <= told:
            return told, []
        if event.stream != stream:
            return event.number, []
        assert isinstance(event.value, Seq)
        held = frames.read(event.tensors)[0]
        return event.number, [[held[str(ref.node)] for ref in refs(event.value)]]


def _refused(gateway: Gateway, job: Job, error: WeftError) -> Refused:
    """The error of a job as an answer. One that was priced, and refused for a limit when its turn
    came, may be sent again on the next day."""
    if job.state == "cancelled":
        return Refused(error, 409)
    if isinstance(error, LimitError) and job.price is not None and not job.attempts:
        again = whole(until_tomorrow(gateway.clock()))
        return Refused(error, 429, {"Retry-After": str(again)})
    return Refused(error)


def answer_of(gateway: Gateway, sent: Sent, job: Job, tops: int | None) -> Answer:
    """The answer of a job that is over; the error that it ended with, raised. Blocks."""
    if job.state != "done":
        with trusted():
            report = decode(job.error or b"", ErrorReport, "json")
        raise _refused(gateway, job, error_of(report))
    source, names = f"results/{job.id}", [name for name in job.names if name in MINE]

    def open_range(start: int, end: int) -> bytes:
        return b"".join(gateway.objects.stream(source, start, end))

    try:
        with trusted():
            begin, spans = selection(open_range, names)
            file = b"".join([begin, *[open_range(start, end) for start, end in spans]])
            manifest, held = decode_result(file)
    except KeyError:
        raise NoSuchError("the job's result was deleted while it was waited for") from None
    saved = {name: [held[str(ref.node)] for ref in refs(value)] for name, value in manifest.saved}
    ids = tuple(numbers(saved[IDS][0]))[len(sent.ids) :]
    last = last_of(ids[-1], saved[LAST][0], tops or 0) if LAST in saved and ids else None
    return Answer(ids, last)
