"""HTTP/1.1 as uvicorn speaks it, but for what is no request at all: that never reaches the app, and
is refused here in the form of every other refusal. So is a request whose head does not come, and
one on a connection too many."""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
from collections.abc import Mapping

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from weft.errors import LimitError, MessageError, WeftError
from weft.wire.messages import encode
from weft.wire.reports import report_of

from .bodies import MEDIA
from .front import ALWAYS
from .state import Gateway

HEAD_SECONDS = 30.0
"""How long the head of a request may take, from the connection or the first byte of it."""
AWAY_SECONDS = 5.0
"""When one who is turned away may come back."""


def is_near(address: str) -> bool:
    """Whether an address is this machine itself, where a proxy may stand for many."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


class Protocol(H11Protocol):
    """One connection."""

    _late: asyncio.TimerHandle | None = None
    _limit: str | None = None  # that this connection is beyond

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > 2 * self._gateway.settings.connections:
            transport.abort()  # so many are being turned away that nobody more is told why
            return
        self._limit = self._met()
        self._watch_head()

    def _met(self) -> str | None:
        """The limit of connections that this one is beyond."""
        settings = self._gateway.settings
        if len(self.connections) > settings.connections:
            return "connections"
        most, mine = settings.address_connections, self._address
        if not most or mine is None or is_near(mine):
            return None
        same = sum([one._address == mine for one in self.connections if isinstance(one, Protocol)])
        return "address_connections" if same > most else None

    @property
    def _gateway(self) -> Gateway:
        return self.config.app.gateway  # type: ignore[union-attr]

    @property
    def _address(self) -> str | None:
        return None if self.client is None else self.client[0]

    def data_received(self, data: bytes) -> None:
        if self._limit is not None:  # answered now, as who has not sent anything hears nothing
            self._turn_away(self._limit)
            return
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
            seconds = HEAD_SECONDS if self._limit is None else AWAY_SECONDS
            self._late = self.loop.call_later(seconds, self._give_up)

    def _unwatch_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._refuse(408, MessageError("the head of the request did not come"))

    def send_400_response(self, msg: str) -> None:
        said = "this is not an HTTP/1.1 request that can be read, or its head is too long"
        self._refuse(400, MessageError(said))

    def _turn_away(self, limit: str) -> None:
        gateway = self._gateway
        most = getattr(gateway.settings, limit)
        error = LimitError(
            f"the server has as many connections open as it may ({limit}: {most})",
            fix=f"come back in {AWAY_SECONDS:.0f} seconds; a client needs one connection for each "
            "job that it waits for",
        )
        gateway.tallies.add("weft_refusals_total", ("limit", limit))
        self._refuse(503, error, {"Retry-After": f"{AWAY_SECONDS:.0f}"})

    def _refuse(self, status: int, error: WeftError, more: Mapping[str, str] = {}) -> None:
        """Answers and hangs up; hangs up only, where an answer has begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            id = secrets.token_hex(8)
            body = encode(report_of(error, id), "json")
            headers = {
                **ALWAYS,
                **more,
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
