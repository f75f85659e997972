"""HTTP/1.1 as uvicorn speaks it, but for what is no request at all: that never reaches the app, and
is refused here in the form of every other refusal."""

from __future__ import annotations

import secrets

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from weft.errors import MessageError
from weft.wire.messages import encode
from weft.wire.reports import report_of

from .bodies import MEDIA
from .front import ALWAYS


class Protocol(H11Protocol):
    """One connection."""

    def send_400_response(self, msg: str) -> None:
        error = MessageError(
            "this is not an HTTP/1.1 request that can be read, or its head is too long"
        )
        id = secrets.token_hex(8)
        body = encode(report_of(error, id), "json")
        headers = ALWAYS | {
            "Content-Type": MEDIA["json"],
            "Content-Length": str(len(body)),
            "Weft-Request-Id": id,
            "Connection": "close",
        }
        self._answer(h11.Response(status_code=400, headers=list(headers.items())), body)

    def _answer(self, head: h11.Response, body: bytes) -> None:
        events = (head, h11.Data(data=body), h11.EndOfMessage())
        self.transport.write(b"".join([self.conn.send(event) or b"" for event in events]))
        self.transport.close()
