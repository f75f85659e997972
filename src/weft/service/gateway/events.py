"""A job's notes as server-sent events: any number of followers, each from where it left off.

Nothing is kept for a follower: it reads the job's notes from the store, after the last one that it
has. It looks when its job has a new note (`watch`), and every `BEAT_SECONDS` besides.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import NamedTuple

import msgspec
from starlette.requests import Request

from weft.errors import MessageError
from weft.service.jobs.life import FINAL, Job
from weft.service.store.interface import Ledger, Note, Objects
from weft.wire.messages import EndEvent, JobInfo, StateEvent, decode, encode

from .bodies import Stream
from .errors import trusted
from .state import Gateway
from .waiting import WAITS, Waiting
from .watch import Follow

MEDIA = "text/event-stream"
BEAT_SECONDS = 10.0
LOAD_SECONDS = 0.5
"""How often a load is looked at, for those whose job waits for it."""
INLINE_BYTES = 65_536
"""A result of more bytes is fetched by a request of its own."""
BEAT = b": still here\n\n"
PAGE = 500
"""Notes read at once."""
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def stream(events: AsyncGenerator[bytes, None], headers: Mapping[str, str] = {}) -> Stream:
    return Stream(events, 200, {**HEADERS, **headers}, MEDIA)


def message(event: str, data: bytes, seq: int | None = None) -> bytes:
    """One event. JSON as we write it has no line breaks; what has some is still one event."""
    head = b"" if seq is None else b"id: %d\n" % seq
    lines = b"".join(b"data: %s\n" % line for line in data.splitlines() or [b""])
    return b"%sevent: %s\n%s\n" % (head, event.encode(), lines)


def inline_bytes(request: Request) -> int:
    """How large a result may be that comes inside the last event. Raises `MessageError`."""
    asked = request.headers.get("weft-inline", "0")
    if not re.fullmatch(r"[0-9]{1,9}", asked):
        raise MessageError("Weft-Inline is a number of bytes")
    return min(int(asked), INLINE_BYTES)


async def follow(
    gateway: Gateway, id: str, after: int = 0, first: bytes = b"", inline: int = 0
) -> AsyncGenerator[bytes, None]:
    """The events of a job after number `after`, up to its end.

    A result of at most `inline` bytes comes with the last of them.
    """
    if first:
        yield first
    beat, told_last = time.monotonic() + BEAT_SECONDS, b""
    with gateway.watch.attend(id) as waiter:
        while True:
            closing = gateway.closing  # asked before it looks: what there is by then is told
            waiter.clear()
            news = waiter.brought()
            if news is None or closing:
                news = await gateway.off(look, gateway, id, after, inline)
            after = news.after
            waiter.has(after, inline)
            if news.loads:
                news, told_last = news._replace(data=_changed(news.data, told_last)), news.data
            if news.data or time.monotonic() >= beat:
                beat = time.monotonic() + BEAT_SECONDS
                yield news.data or BEAT
            if news.over or (closing and not news.more):
                return
            if not news.more:
                pause = max(0.0, beat - time.monotonic())
                await waiter.over(min(pause, LOAD_SECONDS) if news.loads else pause)


def _changed(data: bytes, before: bytes) -> bytes:
    return b"" if data == before else data


class News(NamedTuple):
    """Events, the number of the last of them, whether it was the last of all, or more are there.

    With `loads` the job may wait for its model: how far the load is, which is no note of the job,
    will be looked at in a moment.
    """

    data: bytes
    after: int
    over: bool = False
    more: bool = False
    loads: bool = False


def ask(
    ledger: Ledger, objects: Objects, jobs: Collection[str], follows: Sequence[Follow]
) -> tuple[Mapping[str, int], list[News | None]]:
    """`watch.Ask`, of a store. Blocks."""
    latest = ledger.latest(jobs)
    late = [latest.get(one.job, 0) > one.after for one in follows]
    each = zip(follows, late, strict=True)
    return latest, [_fresh(ledger, objects, *one) if is_late else None for one, is_late in each]


def _fresh(ledger: Ledger, objects: Objects, id: str, after: int, inline: int) -> News | None:
    notes = ledger.notes(id, after, PAGE)
    return told(_with_result(objects, id, notes, inline)) if notes else None


def look(gateway: Gateway, id: str, after: int, inline: int = 0) -> News:
    """What is new about a job since event number `after`. Blocks."""
    ledger, objects = gateway.ledger, gateway.objects
    if (news := _fresh(ledger, objects, id, after, inline)) is not None:
        return news
    job = gateway.ledger.job(id)
    if job is None:
        return News(b"", after, over=True)
    if job.state not in FINAL:
        load = Waiting(gateway).load(job)
        data = b"" if load is None else message("progress", encode(load, "json"))
        return News(data, after, loads=load is not None)
    if (news := _fresh(ledger, objects, id, after, inline)) is not None:
        return news  # of an end between the two looks
    end = encode(EndEvent(job=info(gateway, job)), "json")  # it resumed beyond the end: once more
    return News(message("end", end), after, over=True)


def _with_result(objects: Objects, id: str, notes: list[Note], inline: int) -> list[Note]:
    """The notes; the end of a job with its result in it, where that is wanted and small."""
    last = notes[-1]
    if not inline or last.kind != "end":
        return notes
    with trusted():
        end = decode(last.data, EndEvent, "json")
    if end.job.result is None or end.job.result.bytes > inline:
        return notes
    try:
        result = objects.get(f"results/{id}")
    except KeyError:  # deleted meanwhile: who fetches it is told so
        return notes
    data = encode(msgspec.structs.replace(end, result=result), "json")
    return [*notes[:-1], msgspec.structs.replace(last, data=data)]


def told(notes: Sequence[Note]) -> News:
    data = b"".join([message(note.kind, note.data, note.seq) for note in notes])
    last = notes[-1]
    over, more = last.kind == "end", len(notes) == PAGE
    return News(data, last.seq, over=over, more=more, loads=_waits(last))


def _waits(last: Note) -> bool:
    """Whether the job waited when it said so: then it may wait for its model."""
    if last.kind != "state":
        return False
    with trusted():
        return decode(last.data, StateEvent, "json").state in WAITS


def info(gateway: Gateway, job: Job) -> JobInfo:
    """A job as its owner sees it. Blocks."""
    return Waiting(gateway).info(job)
