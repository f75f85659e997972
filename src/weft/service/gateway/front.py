"""What every request passes: an id, Host and Origin, headers of safety, a log line, a last resort.

A plain ASGI layer. Nothing that goes wrong behind it reaches a client as anything but an
`ErrorReport` with the request's id, under which the log has the rest.
"""

from __future__ import annotations

import logging
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weft.errors import LimitError, MessageError, WeftError
from weft.service.store.database import is_full

from .auth import check_host, check_origin
from .bodies import answer
from .errors import Refused, mistake, no_room
from .openai.errors import refusal
from .state import Gateway

LOG = logging.getLogger("weft.gateway")
CLOSED_EARLY = 499
REFUSALS = frozenset({403, 413, 429})
"""Statuses that say that a key may not do something, or has used up what it may."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
FOR_LISTED = {
    "Access-Control-Allow-Methods": "GET, POST, PUT, DELETE",
    "Access-Control-Allow-Headers": (
        "Authorization, Content-Type, Last-Event-ID, Range, If-Range, If-None-Match, Weft-Protocol"
    ),
    "Access-Control-Max-Age": "600",
}
EXPOSED = "Weft-Request-Id, ETag, Content-Range, Location, Retry-After"


class Front:
    """The outermost layer of the app."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        passage = Passage(scope, receive, send)
        scope["weft"] = passage
        try:
            await self._pass(passage, scope)
        except ClientDisconnect:
            passage.status = CLOSED_EARLY
        except (Refused, WeftError) as error:
            await passage.refuse(error)
        except Exception as error:
            full = is_full(error)
            LOG.exception("the disk is full" if full else "unforeseen", extra=passage.fields())
            await passage.refuse(no_room() if full else mistake())
        finally:
            LOG.info("request", extra=passage.fields())
            await self._count(passage)

    async def _count(self, passage: Passage) -> None:
        """Puts a request to its owner's account."""
        gateway, refused = self._gateway, passage.status in REFUSALS
        due = gateway.tallies.add("weft_http_requests_total", *passage.labels)
        if passage.limit:
            gateway.tallies.add("weft_refusals_total", ("limit", passage.limit))
        if due:
            await gateway.off(gateway.tallies.flush)
        if passage.owner and gateway.meter.count(
            passage.owner, up=passage.up, down=passage.down, refusals=refused
        ):
            await gateway.off(gateway.meter.flush)

    async def _pass(self, passage: Passage, scope: Scope) -> None:
        headers, settings = Headers(scope=scope), self._gateway.settings
        check_end(scope, headers)
        check_host(headers, settings)
        passage.origin = check_origin(headers, settings)
        if passage.origin and scope["method"] == "OPTIONS":
            preflight = Response(status_code=204, headers=FOR_LISTED)
            await preflight(scope, passage.receive, passage.send)
            return
        await self._app(scope, passage.receive, passage.send)


class Passage:
    """One request on its way through: its id, who asks, how much was read, what was answered."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.id = secrets.token_hex(8)
        self.owner = ""
        self.origin: str | None = None
        self.status = 0
        self.route = ""  # as the table has it
        self.job = ""  # that it submitted
        self.limit = ""  # that was met
        self.up = self.down = 0  # bytes of bodies
        self._scope, self._receive, self._send = scope, receive, send
        self._unread = _has_long_body(Headers(scope=scope))
        self._begun = time.perf_counter()

    async def receive(self) -> Message:
        message = await self._receive()
        self.up += len(message.get("body", b""))
        if not message.get("more_body", False):
            self._unread = False
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._add(MutableHeaders(scope=message))
        self.down += len(message.get("body", b""))
        await self._send(message)

    def _add(self, headers: MutableHeaders) -> None:
        headers["Weft-Request-Id"] = self.id
        if self._scope["path"].startswith("/v1/"):
            headers["X-Request-Id"] = self.id  # where OpenAI's clients look for it
        for name, value in ALWAYS.items():
            headers.setdefault(name, value)
        if self._unread:  # what is still on its way is not waited for
            headers["Connection"] = "close"
        if self.origin is not None:
            headers["Access-Control-Allow-Origin"] = self.origin
            headers["Access-Control-Expose-Headers"] = EXPOSED
            headers.add_vary_header("Origin")

    async def refuse(self, error: Refused | WeftError) -> None:
        """Answers with an error; an answer that has begun is broken off, which the client sees."""
        if self.status:
            return
        refused = error if isinstance(error, Refused) else Refused(error)
        self.meets(refused)
        request = Request(self._scope)
        if self._scope["path"].startswith("/v1/"):
            response = refusal(refused, self.id)
        else:
            response = answer(request, refused.report(self.id), refused.status, refused.headers)
        await response(self._scope, self.receive, self.send)

    def meets(self, refused: Refused) -> None:
        """It is refused; for which limit, if for one, is counted."""
        if isinstance(refused.error, LimitError):
            self.limit = refused.limit or "other"

    @property
    def labels(self) -> tuple[tuple[str, str], ...]:
        """What it is counted under: of a few words, none of them made up by a stranger."""
        given = self._scope["method"]
        method = given if given in METHODS else "other"
        return ("route", self.route or "none"), ("method", method), ("status", str(self.status))

    def fields(self) -> dict[str, str | int | float]:
        """What the log says of it."""
        return {
            "request": self.id,
            "owner": self.owner,
            "method": self._scope["method"],
            "path": self._scope["path"],
            "status": self.status,
            **({"job": self.job} if self.job else {}),
            "ms": round((time.perf_counter() - self._begun) * 1000, 2),
        }


def check_end(scope: Scope, headers: Headers) -> None:
    """Refuses a request that may end elsewhere for somebody between the client and us: what one
    takes for its body, the other takes for the next request."""
    chunked = "transfer-encoding" in headers
    if chunked and ("content-length" in headers or scope["http_version"] == "1.0"):
        error = MessageError("a request in chunks is HTTP/1.1 and has no Content-Length")
        raise Refused(error, 400)


def _has_long_body(headers: Headers) -> bool:
    """Whether there is a body that may be too long to be read and thrown away."""
    length = headers.get("content-length", "0")
    short = length.isascii() and length.isdigit() and len(length) < 6
    return "transfer-encoding" in headers or not short
