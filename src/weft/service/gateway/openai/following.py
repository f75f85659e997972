"""What becomes of a job, for a request that waits for it: tokens as they come, then its end."""

from __future__ import annotations

import struct
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from typing import NamedTuple

from weft.errors import CancelledError, NoSuchError
from weft.graph.node import Ref, Seq
from weft.service.jobs.life import FINAL, Cancel, IllegalStepError, Job
from weft.wire import frames
from weft.wire.messages import ErrorReport, ValueEvent, decode, encode
from weft.wire.reports import error_of, report_of
from weft.wire.results import decode_result, selection

from ..errors import Refused, trusted
from ..events import PAGE
from ..models import not_ready
from ..state import Gateway
from .jobs import IDS, Sent

BEAT_SECONDS = 10.0


class News(NamedTuple):
    """Ids that have come; or that the job is over."""

    ids: tuple[int, ...] = ()
    over: Job | None = None


async def followed(gateway: Gateway, sent: Sent) -> AsyncGenerator[News, None]:
    """The tokens that a job hands out, each once, and at last its end. Nothing: it is quiet."""
    after, told = 0, -1
    with gateway.watch.attend(sent.job.id) as waiter:
        while True:
            if gateway.closing:
                raise not_ready("the server is about to stop")
            waiter.clear()
            notes = await gateway.off(gateway.ledger.notes, sent.job.id, after, PAGE)
            ids: list[int] = []
            for note in notes:
                after = note.seq
                if note.kind == "value":
                    told, found = _token(note.data, sent.stream, told)
                    ids += found
            yield News(tuple(ids))
            if len(notes) == PAGE:
                continue
            job = await gateway.off(gateway.ledger.job, sent.job.id)
            if job is None:
                raise NoSuchError("the job was deleted while it was waited for")
            if job.state in FINAL:
                yield News(over=job)
                return
            await waiter.over(BEAT_SECONDS)


def _token(data: bytes, stream: int, told: int) -> tuple[int, list[int]]:
    """The number of a value, and the token that it is; a job that is begun anew repeats some."""
    with trusted():
        event = decode(data, ValueEvent, "json")
        if event.number <= told:
            return told, []
        if event.stream != stream:
            return event.number, []
        assert isinstance(event.value, Seq)
        (ref,) = event.value.items
        assert isinstance(ref, Ref)
        frame = frames.read(event.tensors)[0][str(ref.node)]
    return event.number, list(_numbers(frame.data))


def _numbers(data: bytes | memoryview) -> Iterator[int]:
    return (number for (number,) in struct.iter_unpack("<q", data))


def answer_of(gateway: Gateway, sent: Sent, job: Job) -> tuple[int, ...]:
    """The ids of the answer of a job that is over; the error that it ended with, raised. Blocks."""
    if job.state != "done":
        with trusted():
            report = decode(job.error or b"", ErrorReport, "json")
        raise Refused(error_of(report), 409 if job.state == "cancelled" else None)
    source = f"results/{job.id}"

    def open_range(start: int, end: int) -> bytes:
        return b"".join(gateway.objects.stream(source, start, end))

    try:
        with trusted():
            begin, spans = selection(open_range, (IDS,))
            file = b"".join([begin, *[open_range(start, end) for start, end in spans]])
            (frame,) = decode_result(file)[1].values()
    except KeyError:
        raise NoSuchError("the job's result was deleted while it was waited for") from None
    return tuple(_numbers(frame.data))[len(sent.ids) :]


def abandon(gateway: Gateway, sent: Sent, why: str) -> None:
    """Cancels a job that nobody waits for any more. Blocks."""
    error = report_of(CancelledError(f"job {sent.job.id} was cancelled: {why}"))
    with suppress(IllegalStepError, NoSuchError):
        gateway.ledger.step(sent.job.id, Cancel(encode(error, "json")), gateway.clock())
