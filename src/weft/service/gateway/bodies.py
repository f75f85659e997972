"""Bytes in and out: bounded before they are read, in the form that the headers say.

A body over the limit is refused at its Content-Length, before a byte of it is read; one that does
not say its length is counted while it comes, and cut off. Compressed bodies are refused: what they
would become cannot be bounded without unpacking them.
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack, aclosing, asynccontextmanager
from functools import cache
from typing import IO, Any, NamedTuple, NoReturn, TypeVar

import msgspec
from msgspec import Struct
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from weft.errors import LimitError, MessageError
from weft.wire.messages import decode, encode

from .errors import Refused
from .state import Gateway, Visit, limits_for

T = TypeVar("T")

FORMS = {"application/msgpack": "msgpack", "application/json": "json"}
MEDIA = {form: media for media, form in FORMS.items()}
IDLE_SECONDS = 30.0
"""How long a body may stand still before it is given up."""
JSON_BYTES = 8 << 20
"""Bytes of a message in JSON: it is for people, and costs far more than msgpack to read."""
LARGE = 1 << 20
"""Messages from this size on are read one at a time: in memory they are many times as long. Of one
that is still coming no more than so many bytes are held."""
_DIGITS = {
    int: re.compile("[0-9]{1,19}"),
    float: re.compile(r"[0-9]{1,19}(\.[0-9]{1,40})?(e[+-]?[0-9]{1,3})?"),
}
"""What a parameter with such a default may look like."""


class Bound(NamedTuple):
    """The most bytes that a body may have."""

    limit: int
    name: str
    fix: str | None = None


def check_length(request: Request, bound: Bound) -> None:
    """Refuses a body that says it is too long."""
    given = request.headers.getlist("content-length")
    if not given:
        return
    if len(given) > 1 or not (given[0].isascii() and given[0].isdigit()) or len(given[0]) > 19:
        raise Refused(MessageError("this is not a valid Content-Length"), 400)
    if int(given[0]) > bound.limit:
        _too_large(given[0], bound)


def _too_large(size: str, bound: Bound) -> NoReturn:
    text = f"the body has {size} bytes; the limit {bound.name} is {bound.limit}"
    raise Refused(LimitError(text, fix=bound.fix), 413, limit=bound.name)


def check_plain(request: Request) -> None:
    """Refuses a compressed body."""
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        error = MessageError(
            f"a body with Content-Encoding {coding[:40]!r} is not taken", fix="send it as it is"
        )
        raise Refused(error, 415)


async def pieces(request: Request, bound: Bound) -> AsyncIterator[bytes]:
    """The body as it comes, counted."""
    check_plain(request)
    check_length(request, bound)
    seen = 0
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                piece = await anext(stream, None)
        except TimeoutError:
            raise Refused(MessageError("the body stopped coming"), 408) from None
        if piece is None:
            return
        seen += len(piece)
        if seen > bound.limit:
            _too_large(f"more than {bound.limit}", bound)
        yield piece


async def taken(gateway: Gateway, visit: Visit, work: Callable[..., T], *args: Any) -> T:
    """Takes the message of a request in, and does `work` with it on a thread."""
    form = form_of(visit.request)
    bound = Bound(limits_for(gateway, visit.key).body_bytes, "body_bytes")
    if form == "json" and bound.limit > JSON_BYTES:
        bound = Bound(JSON_BYTES, "of JSON", "send it as application/msgpack")
    async with held(gateway, visit.request, bound) as data:
        return await gateway.off(work, gateway, visit.owner, data, form, *args)


@asynccontextmanager
async def held(gateway: Gateway, request: Request, bound: Bound) -> AsyncIterator[bytes]:
    """The whole body. Large ones lie in a file while they come, and are here one at a time: so many
    at once take no more memory than one."""
    parts: list[bytes] = []
    size = 0
    with ExitStack() as stack:
        file: IO[bytes] | None = None
        async for piece in pieces(request, bound):
            parts.append(piece)
            size += len(piece)
            if size >= LARGE:
                file = file or stack.enter_context(tempfile.TemporaryFile(dir=gateway.scratch))
                await gateway.off(file.write, b"".join(parts))
                parts, size = [], 0
        rest = b"".join(parts)
        if file is None:
            yield rest
            return
        async with gateway.large:
            yield await gateway.off(_read_back, file, rest)


def _read_back(file: IO[bytes], rest: bytes) -> bytes:
    file.write(rest)
    file.seek(0)
    return file.read()


def form_of(request: Request) -> str:
    """The form of the body, from its Content-Type."""
    given = request.headers.getlist("content-type")
    media, _, options = (given[0] if len(given) == 1 else "").partition(";")
    form = FORMS.get(media.strip().lower())
    if form is None or options.strip().lower() not in ("", "charset=utf-8"):
        error = MessageError(
            "this Content-Type is not taken here", fix=f"send one of {', '.join(FORMS)}"
        )
        raise Refused(error, 415)
    return form


def read(data: bytes, kind: Any, form: str) -> Any:
    """The message in a body. Blocks for large ones.

    JSON comes from people: a name that stands twice in it is a slip, and is refused.
    """
    message = decode(data, kind, form)
    if form == "json":
        read_pairs(data)
    return message


def read_pairs(data: bytes) -> Any:
    """Any JSON, as plain data. Raises `MessageError`, also for a name that stands twice."""
    try:
        return json.loads(data, object_pairs_hook=_pairs, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"this is not JSON that can be read: {str(error)[:200]}") from None


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twin = next(name for name in found if sum(name == other for other, _ in pairs) > 1)
        raise ValueError(f"{twin[:60]!r} stands twice in one object")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


@cache
def _fields(kind: type[Struct]) -> dict[str, Any]:
    return {field.encode_name: field for field in msgspec.structs.fields(kind)}


def query_of(request: Request, kind: type[Struct]) -> Any:
    """The query parameters as a typed struct; unknown, repeated and unfit ones are refused."""
    known = _fields(kind)
    given: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        if name not in known:
            listed = ", ".join(known) or "none"
            raise MessageError(f"there is no parameter {name[:60]!r} here; there is {listed}")
        if isinstance(known[name].default, tuple):
            given[name] = (*given.get(name, ()), value)
        elif name in given:
            raise MessageError(f"the parameter {name!r} stands twice")
        else:
            _check_digits(name, value, known[name].default)
            given[name] = value
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise MessageError(f"a parameter does not fit: {error}") from None


def _check_digits(name: str, value: str, default: Any) -> None:
    """Numbers are written as in JSON, whole ones as such: ` 1`, `+1`, `1_0` and `nan` are none."""
    pattern = _DIGITS.get(type(default))
    if pattern is not None and not pattern.fullmatch(value):
        raise MessageError(f"the parameter {name!r} is a number in decimal digits")


class Stream(StreamingResponse):
    """A body made while it is sent. Its generator ends with it, also when the client goes away."""

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        media: str | None = None,
    ) -> None:
        super().__init__(pieces, status, headers, media)
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until all is sent or the client has gone, which one small task listens for."""
        task = asyncio.current_task()
        assert task is not None
        gone = asyncio.create_task(_gone(receive, task))
        try:
            async with aclosing(self._pieces):
                await self.stream_response(send)
        except asyncio.CancelledError:
            if not gone.done() or task.uncancel():  # somebody else wants an end of it
                raise
        finally:
            gone.cancel()


async def while_there(request: Request, waiting: Awaitable[T]) -> T:
    """What is waited for, as long as its client is there; `ClientDisconnect` when it has gone.
    For who has read the body, and whom nobody else watches (a `Stream` does that itself)."""
    task = asyncio.current_task()
    assert task is not None
    gone = asyncio.create_task(_gone(request.receive, task))
    try:
        return await waiting
    except asyncio.CancelledError:
        if not gone.done() or task.uncancel():  # somebody else wants an end of it
            raise
        raise ClientDisconnect from None
    finally:
        gone.cancel()


async def _gone(receive: Receive, task: asyncio.Task[Any]) -> None:
    """Ends the task when the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    task.cancel()


def preferred(request: Request) -> str:
    """The form of the answer: msgpack where Accept puts it first, else JSON."""
    best, form = 0.0, "json"
    for media, weight in accepted(request):
        if media in FORMS and weight > best:
            best, form = weight, FORMS[media]
    return form


def accepted(request: Request) -> list[tuple[str, float]]:
    """The media types in Accept with their weights."""
    parts = ",".join(request.headers.getlist("accept")).split(",")
    return [_weighted(part) for part in parts[:32] if part.strip()]


def _weighted(part: str) -> tuple[str, float]:
    media, *options = (piece.strip().lower() for piece in part.split(";"))
    weight = next((option[2:] for option in options if option.startswith("q=")), "1")
    try:
        return media, min(max(float(weight), 0.0), 1.0)
    except ValueError:
        return media, 0.0


def answer(
    request: Request,
    message: Struct,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A message as a response, in the form that the client prefers."""
    form = preferred(request)
    return Response(
        encode(message, form),
        status,
        media_type=MEDIA[form],
        headers={"Vary": "Accept", **(headers or {})},
    )
