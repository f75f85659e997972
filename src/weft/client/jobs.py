"""Jobs: sending one, following its events, asking how it is, leaving it.

    info = run(server, send(talk, parcel, body))             # acknowledged: it is durable now
    for event in each(server, events(talk, info.id)): ...    # to its end, whatever breaks between

All are steps of a conversation (`effects`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import quote

from weft.errors import MessageError, ServerAwayError
from weft.wire.messages import (
    FINAL,
    EndEvent,
    Event,
    JobInfo,
    JobList,
    Keep,
    LogEvent,
    Missing,
    MissingQuery,
    ProgressEvent,
    StateEvent,
    ValueEvent,
    decode,
)

from .core import EVENTS, MSGPACK, MissingError, Patience, Talk
from .effects import Broken, Give, More, Pieces, Shut, Steps
from .events import Message, Parser
from .progress import bar
from .travel import Parcel, constant_file

LARGE = 1 << 20
"""Bytes of a body from which it is sent in pieces."""
TRIES = 3
"""How often constants that are missing are sent before that is a mistake of somebody's."""
INLINE_BYTES = 65_536
"""A result of up to so many bytes may come with the last event."""
EVENT_SECONDS = 30.0
"""How long an event stream may be silent before it counts as broken."""
WAIT_SECONDS = 20.0
"""How long one request waits for a job to end."""

T = TypeVar("T")

_KINDS: dict[str, Any] = {
    "state": StateEvent,
    "log": LogEvent,
    "value": ValueEvent,
    "progress": ProgressEvent,
    "end": EndEvent,
}


def send(
    talk: Talk,
    parcel: Parcel,
    body: bytes,
    graph: str | None = None,
    told: Callable[[JobInfo], None] | None = None,
) -> Steps[JobInfo]:
    """Submits a job (`body` is its `Submit`); constants that are not there go before it.

    `told` hears when it is acknowledged. Where its graph is only named, `graph` is its hash; raises
    `MissingError` if that is not known.
    """
    info = yield from _supplied(talk, parcel, lambda: _submit(talk, body), graph)
    if told is not None:
        told(info)
    return info


def follow(
    talk: Talk,
    parcel: Parcel,
    body: bytes,
    graph: str | None = None,
    told: Callable[[JobInfo], None] | None = None,
) -> Steps[EndEvent]:
    """Submits a job and gives its events, to its end; a small result comes with that.

    `told` hears when the job is acknowledged; `graph` is as in `send`. Where whoever waits gives up
    (Ctrl-C, a cancelled task, an error of his own while he hears of an event), the job is
    cancelled.
    """
    accepted: list[JobInfo] = []

    def accept(info: JobInfo) -> None:
        accepted.append(info)
        if told is not None:
            told(info)

    def stream() -> Steps[EndEvent]:
        return _stream(talk, _Following(talk, submit=body, accept=accept))

    try:
        return (yield from _supplied(talk, parcel, stream, graph))
    except (Exception, KeyboardInterrupt, asyncio.CancelledError) as error:
        if accepted and not isinstance(error, ServerAwayError):
            yield from _try_cancel(talk, accepted[0].id)
        raise


def events(talk: Talk, job: str, after: int = 0) -> Steps[JobInfo]:
    """Gives `(number, event)` of each event after number `after`; returns the job at its end."""
    return (yield from _stream(talk, _Following(talk, job=job, last=after))).job


def path_of(job: str, rest: str = "") -> str:
    return f"/api/jobs/{quote(job, safe='')}{rest}"


def info(talk: Talk, job: str) -> Steps[JobInfo]:
    """How the job is."""
    return (yield from talk.ask("GET", path_of(job), JobInfo))


def wait(talk: Talk, job: str, seconds: float) -> Steps[JobInfo]:
    """How the job is when it is over, or after some time."""
    until = talk.server.clock() + seconds
    while True:
        left = max(0.0, min(until - talk.server.clock(), WAIT_SECONDS))
        found = yield from talk.ask("GET", path_of(job, f"?wait={left:.3f}"), JobInfo)
        if found.state in FINAL or talk.server.clock() >= until:
            return found


def listed(talk: Talk, limit: int, before: str | None = None) -> Steps[JobList]:
    """Jobs of one's own, newest first."""
    older = "" if before is None else f"&before={quote(before, safe='')}"
    return (yield from talk.ask("GET", f"/api/jobs?limit={limit}{older}", JobList))


def keep(talk: Talk, job: str, seconds: float) -> Steps[JobInfo]:
    """Keeps it for so many seconds after its end."""
    return (yield from talk.ask("POST", path_of(job, "/keep"), JobInfo, Keep(seconds=seconds)))


def cancel(talk: Talk, job: str) -> Steps[JobInfo]:
    return (yield from talk.ask("POST", path_of(job, "/cancel"), JobInfo))


def delete(talk: Talk, job: str) -> Steps[None]:
    yield from talk.call("DELETE", path_of(job))


def _try_cancel(talk: Talk, job: str) -> Steps[None]:
    """Says once that nobody waits any more; the user is not kept waiting for that."""
    try:
        yield from talk.once("POST", path_of(job, "/cancel"), seconds=2.0)
    except Broken:
        return


# -- constants -----------------------------------------------------------------------------------


def _supplied(
    talk: Talk, parcel: Parcel, steps: Callable[[], Steps[T]], graph: str | None = None
) -> Steps[T]:
    """The steps, with the constants there that they need."""
    holds = talk.server.holds
    unknown = [digest for digest in parcel.large if digest not in holds]
    if unknown:
        yield from _upload(talk, parcel, (yield from _missing(talk, unknown)))
        holds.update(unknown)
    for _ in range(TRIES):
        try:
            return (yield from steps())
        except MissingError as error:
            lost = error.digests
            if lost == (graph,):
                raise
        yield from _upload(talk, parcel, lost)
    raise MessageError("the server keeps losing the constants of this request")


def _missing(talk: Talk, digests: list[str]) -> Steps[tuple[str, ...]]:
    query = MissingQuery(digests=tuple(digests))
    return (yield from talk.ask("POST", "/api/constants/missing", Missing, query)).digests


def _upload(talk: Talk, parcel: Parcel, digests: tuple[str, ...]) -> Steps[None]:
    for digest in digests:
        if digest not in parcel.large:
            raise MessageError("the server misses a constant that this request does not have")
        data = constant_file(parcel.large[digest])
        with bar(talk.server.settings, "upload", len(data)) as moved:
            body = Pieces(data, moved) if len(data) >= LARGE else data
            headers = {"content-type": "application/octet-stream"}
            yield from talk.call("PUT", f"/api/constants/{digest}", body, headers)


def _submit(talk: Talk, body: bytes) -> Steps[JobInfo]:
    return (yield from talk.ask("POST", "/api/jobs", JobInfo, body))


# -- events --------------------------------------------------------------------------------------


class _Following:
    """A stream of events that may break and go on: how to open it (again), and where it is."""

    def __init__(
        self,
        talk: Talk,
        *,
        job: str | None = None,
        last: int = 0,
        submit: bytes = b"",
        accept: Callable[[JobInfo], None] | None = None,
    ) -> None:
        self.talk = talk
        self.job = job
        self.last = last
        self.submit = submit
        self.accept = accept

    def open(self) -> Steps[Any]:
        """Opens the stream: by submitting the job, or where it broke off."""
        headers = {"accept": EVENTS}
        method, path, body = "POST", "/api/jobs", self.submit
        if self.job is None:
            headers["content-type"] = MSGPACK
        else:
            method, path, body = "GET", path_of(self.job, "/events"), b""
        if self.submit:
            headers["weft-inline"] = str(INLINE_BYTES)
        if self.last:
            headers["last-event-id"] = str(self.last)
        steps = self.talk.call(
            method, path, body, headers, job=self.job, stream=True, seconds=EVENT_SECONDS
        )
        return (yield from steps)

    def event(self, message: Message) -> Event | None:
        """The event of a message; None for what was there before, or is not known."""
        if message.event == "accepted":
            found = decode(message.data.encode(), JobInfo, "json")
            self.job = found.id
            if self.accept is not None:
                self.accept(found)
            return None
        number = message.id
        if number is None and message.event == "progress":  # of a load: no note of the job's own
            return decode(message.data.encode(), ProgressEvent, "json")
        if number is None and message.event == "end":  # said once more to who comes after it
            number = self.last + 1
        if number is None or number <= self.last or message.event not in _KINDS:
            return None  # a newer server may say more
        self.last = number
        return decode(message.data.encode(), _KINDS[message.event], "json")


def _stream(talk: Talk, following: _Following) -> Steps[EndEvent]:
    """Gives each event once, over as many connections as it takes."""
    patience = Patience(talk)
    while True:
        try:
            yield from following.open()
            ended = yield from _read(talk, following, patience)
            if ended is not None:
                return ended
        except Broken as why:
            yield from patience.broken(why, following.job)


def _read(talk: Talk, following: _Following, patience: Patience) -> Steps[EndEvent | None]:
    """Gives the events of one connection. None: it ended before the job did."""
    parser = Parser()
    while piece := (yield More()):
        patience.reset()
        talk.traffic.down += len(piece)
        for message in parser.feed(piece):
            event = following.event(message)
            if event is None:
                continue
            yield Give((following.last, event))
            if isinstance(event, EndEvent):
                with suppress(Broken):  # the stream's own end: then the connection can be kept
                    yield More()
                yield Shut()
                return event
    yield Shut()
    raise Broken("the stream of events ended early")
