"""Hostile requests: what they are made of, and what must be true after each of them."""

from __future__ import annotations

import pickle
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec

from tests.service.gate import ANN, MSGPACK, House, submit_of
from weft.settings import Settings
from weft.wire.messages import ErrorReport, decode, encode

JSON = {"Content-Type": "application/json"}
BYTES = {"Content-Type": "application/octet-stream"}
KEYED = f"Authorization: Bearer {ANN}\r\nContent-Type: application/msgpack\r\n".encode()
FORBIDDEN = re.compile(r"Traceback|site-packages|\.py\b|/src/|/home/|/tmp/|0x[0-9a-f]{8}")
"""What no stranger may read."""


def attacked() -> Iterator[House]:
    """A house with low limits; whatever was done to it, it works afterwards."""
    house = House(Settings(body_bytes=100_000, constant_bytes=10_000, nodes=1_000))
    yield house
    if not house.app.gateway.closing:
        works(house, house.ask)


def works(house: House, ask: Callable[..., httpx.Response]) -> None:
    """A good job goes its way."""
    content = encode(submit_of(request_id="afterwards"))
    reply = ask("POST", "/api/jobs", content=content, headers=MSGPACK)
    assert reply.status_code == 201, reply.text
    result = house.do()
    assert ask("GET", f"/api/jobs/{reply.json()['id']}/result").content == result


def refused(house: House, reply: httpx.Response, *statuses: int) -> ErrorReport:
    """The report of a refusal that left nothing behind."""
    assert reply.status_code in statuses, (reply.status_code, reply.text)
    assert reply.headers["content-type"] == "application/json"
    report = decode(reply.content, ErrorReport, "json")
    assert report.code
    assert report.message
    assert report.request_id == reply.headers["weft-request-id"]
    assert not FORBIDDEN.search(reply.text), reply.text
    assert house.stored() == []
    assert house.ledger.next_question() is None
    return report


def post(house: House, content: Any, path: str = "/api/jobs", **headers: str) -> httpx.Response:
    return house.ask("POST", path, content=content, headers=MSGPACK | headers)


def raw(**changes: Any) -> dict[str, Any]:
    """A good submission as plain data, changed."""
    return msgspec.to_builtins(submit_of(), builtin_types=(bytes,)) | changes


def packed(**changes: Any) -> bytes:
    return msgspec.msgpack.encode(raw(**changes))


class Boom:
    """What a pickle would do to who opens it."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        return exec, ("raise SystemExit('opened')",)


PICKLE = pickle.dumps(Boom())


# -- what only a socket can send -------------------------------------------------------------------


def connected(url: str) -> socket.socket:
    place = urlsplit(url)
    assert place.hostname is not None
    return socket.create_connection((place.hostname, place.port or 80), timeout=60)


def exchange(
    url: str, method: bytes, path: str, headers: bytes, body: bytes = b"", *, half: bool = False
) -> bytes:
    """Sends a request as it is and reads to the end."""
    head = b"%s %s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n" % (method, path.encode())
    return exchanged(url, head + headers + b"\r\n" + body, half=half)


def exchanged(url: str, data: bytes, *, half: bool = False) -> bytes:
    """Sends bytes as they are and reads to the end; `half`: and says that no more will come."""
    with connected(url) as line:
        with suppress(OSError):  # the server may have hung up already
            line.sendall(data)
            if half:
                line.shutdown(socket.SHUT_WR)
        return read_all(line)


def read_all(line: socket.socket) -> bytes:
    found = b""
    try:
        while piece := line.recv(65_536):
            found += piece
    except ConnectionResetError:
        return found
    return found


def send_for_ever(
    line: socket.socket, piece: bytes, pause: float = 0.0, most: int = 1_000_000_000
) -> int:
    """Bytes sent until the other side closed, or `most` are sent."""
    sent = 0
    try:
        while sent < most:
            line.sendall(piece)
            sent += len(piece)
            time.sleep(pause)
    except (ConnectionResetError, BrokenPipeError):
        return sent
    return sent
