"""HTTP/1.1 as uvicorn speaks it, but for what is no request at all: that never reaches the app, and
is refused here in the form of every other refusal. So is a request whose head does not come."""

from __future__ import annotations

import asyncio
import secrets

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from weft.errors import MessageError
from weft.wire.messages import encode
from weft.wire.reports import report_of

from .bodies import MEDIA
from .front import ALWAYS

HEAD_SECONDS = 30.0
"""How long the head of a request may take, from the connection or the first byte of it."""


class Protocol(H11Protocol):
    """One connection."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch_head()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        """Counts the time while a head is on its way, however many pieces it comes in."""
        if self.conn.their_state is not h11.IDLE:
            self._unwatch_head()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _unwatch_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._refuse(408, "the head of the request did not come")

    def send_400_response(self, msg: str) -> None:
        self._refuse(
            400, "this is not an HTTP/1.1 request that can be read, or its head is too long"
        )

    def _refuse(self, status: int, message: str) -> None:
        """Answers and hangs up; hangs up only, where an answer has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            id = secrets.token_hex(8)
            body = encode(report_of(MessageError(message), id), "json")
            headers = ALWAYS | {
                "Content-Type": MEDIA["json"],
                "Content-Length": str(len(body)),
                "Weft-Request-Id": id,
                "Connection": "close",
            }
            self._send(h11.Response(status_code=status, headers=list(headers.items())), body)
        if self.cycle is not None:  # the app may be at work on it: it has nobody to answer now
            self.cycle.disconnected = True
        self.transport.close()

    def _send(self, head: h11.Response, body: bytes) -> None:
        events = (head, h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join([self.conn.send(event) or b"" for event in events]))
