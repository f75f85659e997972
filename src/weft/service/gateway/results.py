"""Results: a file that lies ready, whole, in parts (`Range`), or some of its saves (`?name=`)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncGenerator, Iterable, Iterator
from typing import Annotated

from msgspec import Meta, Struct
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from weft.errors import MessageError, NoSuchError, NotFinishedError
from weft.service.jobs.life import Job
from weft.service.store.interface import Objects
from weft.wire.messages import ErrorReport, decode
from weft.wire.reports import error_of
from weft.wire.results import selection

from .bodies import Stream
from .errors import Refused, trusted
from .jobs import own
from .state import Gateway, Visit

MEDIA = "application/octet-stream"
_RANGE = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{1,18})?|-([0-9]{1,18}))")
AT_ONCE = 1 << 20
"""Bytes that are read while the request is looked at; more is read while it is sent."""
Span = tuple[int, int]
"""From, up to."""


class NameQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`name`: only this save; may be repeated."""

    name: Annotated[tuple[Annotated[str, Meta(max_length=4096)], ...], Meta(max_length=1024)] = ()


def result(gateway: Gateway, visit: Visit) -> Response:
    query = visit.query
    assert isinstance(query, NameQuery)
    job = _ready(gateway, visit)
    size = gateway.objects.size(f"results/{job.id}")
    if size is None:
        raise Refused(NoSuchError(f"the result of job {job.id} is not there any more"), 410)
    if query.name:
        return _part(gateway, visit, job, query.name)
    headers = _headers(job, f'"{job.result_sha256}"')
    return served(gateway, visit.request, f"results/{job.id}", [(0, size)], b"", headers)


def _ready(gateway: Gateway, visit: Visit) -> Job:
    """The job, which has a result; else why it has none."""
    job = own(gateway, visit)
    if job.state == "done":
        return job
    if job.error is not None and job.ended is not None:
        with trusted():
            report = decode(job.error, ErrorReport, "json")
        raise Refused(error_of(report), 409)
    raise NotFinishedError(
        f"job {job.id} is {job.state}; it has no result yet",
        fix=f"wait for it: GET /api/jobs/{job.id}?wait=30, or follow its events",
    )


def _headers(job: Job, tag: str) -> dict[str, str]:
    return {
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Content-Disposition": f'attachment; filename="{job.id}.safetensors"',
        "ETag": tag,
    }


def _part(gateway: Gateway, visit: Visit, job: Job, names: tuple[str, ...]) -> Response:
    """Some of the saves, as a result file of their own."""
    source = f"results/{job.id}"

    def open_range(start: int, end: int) -> bytes:
        return b"".join(gateway.objects.stream(source, start, end))

    with trusted():
        begin, spans = selection(open_range, names)
    chosen = hashlib.sha256(repr(sorted(set(names))).encode()).hexdigest()
    headers = _headers(job, f'"{job.result_sha256}-{chosen[:16]}"')
    return served(gateway, visit.request, source, spans, begin, headers)


# -- ranges ---------------------------------------------------------------------------------------


def served(
    gateway: Gateway,
    request: Request,
    source: str,
    spans: list[Span],
    begin: bytes,
    headers: dict[str, str],
) -> Response:
    """`begin`, then these spans of an object, as one file of which a range may be asked."""
    if headers["ETag"] in _listed(request.headers.get("if-none-match", "")):
        return Response(status_code=304, headers=headers)
    size = len(begin) + sum(end - start for start, end in spans)
    part = wanted(request.headers, size, headers["ETag"])
    start, end = part or (0, size)
    headers = {**headers, "Content-Length": str(end - start)}
    if part:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    rest = cut(spans, start - len(begin), end - len(begin))
    pieces = _pieces(gateway.objects, source, begin[start:end], rest)
    status = 206 if part else 200
    if end - start <= AT_ONCE:
        return Response(b"".join(pieces), status, headers, MEDIA)
    return Stream(_on_threads(gateway, pieces), status, headers, MEDIA)


def _pieces(objects: Objects, source: str, begin: bytes, spans: Iterable[Span]) -> Iterator[bytes]:
    if begin:
        yield begin
    for start, end in spans:
        yield from objects.stream(source, start, end)


async def _on_threads(gateway: Gateway, pieces: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
    while piece := await gateway.off(_next, pieces):
        yield piece


def _next(pieces: Iterator[bytes]) -> bytes:
    return next(pieces, b"")


def cut(spans: Iterable[Span], start: int, end: int) -> Iterator[Span]:
    """What of the spans lies between two places of their sequence."""
    at = 0
    for first, last in spans:
        low, high = max(start - at, 0), min(end - at, last - first)
        if low < high:
            yield first + low, first + high
        at += last - first


def wanted(headers: Headers, size: int, tag: str) -> Span | None:
    """The range that is asked for. None: all of it, as for what is not one range of bytes."""
    found = _RANGE.fullmatch(",".join(headers.getlist("range")).strip())
    if found is None or headers.get("if-range", tag) != tag:
        return None
    first, last, tail = found.groups()
    if tail is not None:
        start, end = max(size - int(tail), 0), size
    else:
        start, end = int(first), size if last is None else int(last) + 1
        if end <= start and last is not None:
            return None
    if start >= size:
        error = MessageError(f"there is nothing at byte {start}: the file has {size}")
        raise Refused(error, 416, {"Content-Range": f"bytes */{size}"})
    return start, min(end, size)


def _listed(tags: str) -> set[str]:
    return {tag.strip().removeprefix("W/") for tag in tags.split(",")}
