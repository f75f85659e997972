"""A job's notes as server-sent events: any number of followers, each from where it left off.

Nothing is kept for a follower: it reads the job's notes from the store, after the last one that it
has. It looks whenever the gateway's bell rings, and every `POLL_SECONDS` besides.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping

from weft.service.jobs.life import FINAL, Job
from weft.service.store.interface import Note
from weft.service.store.said import info_of
from weft.wire.messages import EndEvent, JobInfo, encode

from .bodies import Stream
from .state import Gateway

MEDIA = "text/event-stream"
POLL_SECONDS = 0.5
BEAT_SECONDS = 10.0
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


async def follow(
    gateway: Gateway, id: str, after: int = 0, first: bytes = b""
) -> AsyncGenerator[bytes, None]:
    """The events of a job after number `after`, up to its end."""
    if first:
        yield first
    beat = time.monotonic() + BEAT_SECONDS
    with gateway.watch.attend():
        while not gateway.closing:
            turn = gateway.watch.turn()
            job, notes = await gateway.off(look, gateway, id, after)
            for note in notes:
                after = note.seq
                yield message(note.kind, note.data, note.seq)
                if note.kind == "end":
                    return
            if job is None:
                return
            if job.state in FINAL and not notes:  # it resumed beyond the end: say so once more
                yield message("end", encode(EndEvent(job=info(gateway, job)), "json"))
                return
            if notes:
                continue
            if time.monotonic() >= beat:
                beat = time.monotonic() + BEAT_SECONDS
                yield BEAT
            await turn.over(POLL_SECONDS)


def look(gateway: Gateway, id: str, after: int) -> tuple[Job | None, list[Note]]:
    """The job before its notes: one that is over has all of them."""
    return gateway.ledger.job(id), gateway.ledger.notes(id, after, PAGE)


def info(gateway: Gateway, job: Job) -> JobInfo:
    """A job as its owner sees it. Blocks where it waits: its place in the queue is counted."""
    ahead = gateway.ledger.ahead(job.id) if job.state in ("received", "queued") else None
    return info_of(job, ahead=ahead, keep_seconds=gateway.settings.keep_seconds)
