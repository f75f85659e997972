"""Hostile bytes on a connection: what is no request, never ends, or ends in two places."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest

from tests.service.gate import ANN, House, bearer, frame, live, submit_of
from tests.service.hostile import (
    FORBIDDEN,
    KEYED,
    attacked,
    connected,
    exchange,
    exchanged,
    read_all,
    send_for_ever,
    works,
)
from tests.service.processes import until
from weft.service.gateway import bodies, protocol
from weft.wire import frames
from weft.wire.messages import ErrorReport, decode, encode

house = pytest.fixture(attacked)


@pytest.fixture
def url(house: House) -> Iterator[str]:
    """The house over real HTTP; whatever was done to it, it answers afterwards."""
    with live(house) as url:
        yield url
        with httpx.Client(base_url=url, headers=bearer(), timeout=60) as client:
            works(house, client.request)


def test_two_keys_are_none(house: House, url: str) -> None:
    twice = f"Authorization: Bearer {ANN}\r\nAuthorization: Bearer weft_other\r\n".encode()
    reply = exchange(url, b"GET", "/api/jobs", twice)
    assert reply.startswith(b"HTTP/1.1 401")


def refusal(reply: bytes) -> ErrorReport:
    """The report in a reply with a status of 400 and more."""
    head, _, body = reply.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.1 4\d\d ", head), reply[:200]
    report = decode(body, ErrorReport, "json")
    assert b"weft-request-id: " + (report.request_id or "-").encode() in head.lower()
    assert not FORBIDDEN.search(reply.decode("latin-1"))
    return report


def test_a_body_is_refused_before_it_is_sent(house: House, url: str) -> None:
    reply = exchange(url, b"POST", "/api/jobs", KEYED + b"Content-Length: 99999999999\r\n")
    assert reply.startswith(b"HTTP/1.1 413")
    assert b"body_bytes" in reply
    assert b"connection: close" in reply.lower()
    assert house.stored() == []


def test_an_endless_body_is_cut_off(house: House, url: str) -> None:
    with connected(url) as line:
        head = b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\n" + KEYED
        line.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        sent = send_for_ever(line, b"%x\r\n%s\r\n" % (4096, bytes(4096)))
        reply = read_all(line)
    assert sent < 100_000_000  # what the kernel's buffers took, not what we could send
    assert reply == b"" or reply.startswith(b"HTTP/1.1 413")
    assert house.stored() == []


def test_a_body_that_ends_early_leaves_nothing(house: House, url: str) -> None:
    data = encode(submit_of())
    length = b"Content-Length: %d\r\n" % (len(data) + 10)
    reply = exchange(url, b"POST", "/api/jobs", KEYED + length, data, half=True)
    assert not reply.startswith(b"HTTP/1.1 2")
    assert house.stored() == []


def test_an_upload_that_ends_early_leaves_nothing(house: House, url: str) -> None:
    data = frames.write({"x": frame(*range(100))})
    path = f"/api/constants/{frames.digest(frame(*range(100)))}"
    keyed = f"Authorization: Bearer {ANN}\r\nContent-Type: application/octet-stream\r\n".encode()
    length = b"Content-Length: %d\r\n" % len(data)
    reply = exchange(url, b"PUT", path, keyed + length, data[:-1], half=True)
    assert not reply.startswith(b"HTTP/1.1 2")
    assert house.stored() == []
    assert exchange(url, b"PUT", path, keyed + length, data).startswith(b"HTTP/1.1 201")


def test_a_body_that_stands_still_is_given_up(
    house: House, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "IDLE_SECONDS", 0.2)
    reply = exchange(url, b"POST", "/api/jobs", KEYED + b"Content-Length: 1000\r\n", b"half of it")
    assert reply.startswith(b"HTTP/1.1 408")
    assert refusal(reply).message == "the body stopped coming"
    assert b"connection: close" in reply.lower()
    assert house.stored() == []


@pytest.mark.parametrize(
    "begun", [b"", b"GET /a", b"GET /api/jobs HTTP/1.1\r\nHost: localhost\r\nX"]
)
def test_a_head_that_does_not_come_is_given_up(
    url: str, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    reply = exchanged(url, begun)
    assert reply.startswith(b"HTTP/1.1 408")
    assert refusal(reply).code == "message"


def test_a_head_that_comes_in_drops_is_given_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each drop is in time; all of them together are not."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.5)
    with connected(url) as line:
        line.sendall(b"GET /api/hello HTTP/1.1\r\nHost: localhost\r\n")
        assert send_for_ever(line, b"X: y\r\n", pause=0.02, most=1_200) < 1_200


# -- too many connections --------------------------------------------------------------------------


def limited(monkeypatch: pytest.MonkeyPatch, house: House, **limits: int) -> None:
    settings = replace(house.app.gateway.settings, **limits)
    monkeypatch.setattr(house.app.gateway, "settings", settings)


@pytest.mark.parametrize("limit", ["connections", "address_connections"])
def test_a_connection_too_many_is_turned_away_and_the_others_go_on(
    house: House, url: str, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    limited(monkeypatch, house, **{limit: 3})
    monkeypatch.setattr(protocol, "is_near", lambda address: False)
    asked = b"GET /api/hello HTTP/1.1\r\nHost: localhost\r\n"
    lines = [connected(url) for _ in range(3)]
    try:
        for line in lines:
            line.sendall(asked)  # the head is on its way
        until(lambda: house.app.gateway.connected() == 3)
        reply = exchange(url, b"GET", "/api/jobs", KEYED)
        assert reply.startswith(b"HTTP/1.1 503") and b"retry-after: 5" in reply.lower()
        assert f"{limit}: 3".encode() in reply and b"connection: close" in reply.lower()
        until(lambda: house.app.gateway.connected() == 3)
        for line in lines:
            line.sendall(b"Connection: close\r\n\r\n")
            assert read_all(line).startswith(b"HTTP/1.1 200")
    finally:
        for line in lines:
            line.close()
    until(lambda: house.app.gateway.connected() == 0)
    assert exchange(url, b"GET", "/api/jobs", KEYED).startswith(b"HTTP/1.1 200")
    house.app.gateway.tallies.flush()
    told = {one.labels: one.value for one in house.ledger.tallies() if "refusals" in one.name}
    assert told == {(("limit", limit),): 1.0}


def test_one_too_many_that_says_nothing_is_hung_up(
    house: House, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, house, connections=1)
    monkeypatch.setattr(protocol, "AWAY_SECONDS", 0.1)
    with connected(url), connected(url) as line:
        assert read_all(line).startswith(b"HTTP/1.1 408")


def test_twice_too_many_are_hung_up_at_once(
    house: House, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, house, connections=1)
    monkeypatch.setattr(protocol, "AWAY_SECONDS", 60.0)
    with connected(url), connected(url):
        until(lambda: house.app.gateway.connected() == 2)
        with connected(url) as line:
            assert read_all(line) == b""
        assert house.app.gateway.connected() == 2


def test_of_this_machine_all_may_come_from_one_address(
    house: House, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy on it stands for many."""
    limited(monkeypatch, house, address_connections=1)
    with connected(url), connected(url):
        assert exchange(url, b"GET", "/api/jobs", KEYED).startswith(b"HTTP/1.1 200")


def test_who_waits_between_two_requests_is_not_given_up_for_the_second(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 2.0)
    with httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(3):
            assert client.get("/api/hello").status_code == 200
            time.sleep(1.2)


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_request_that_ends_in_two_places(house: House, url: str, version: bytes) -> None:
    """A good job in chunks, which somebody in between may read as two requests."""
    data = encode(submit_of())
    head = b"POST /api/jobs HTTP/%s\r\nHost: localhost\r\n" % version + KEYED
    length = b"Content-Length: 4\r\n" if version == b"1.1" else b""
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)
    reply = exchanged(url, head + length + b"Transfer-Encoding: chunked\r\n\r\n" + body)
    assert "in chunks" in refusal(reply).message
    assert house.stored() == []


_CHUNKS: dict[str, bytes] = {
    "a size that is none": b"zz\r\n",
    "a size below zero": b"-1\r\n",
    "a size of 80 bits": b"f" * 21 + b"\r\n",
    "a long extension": b"1;" + b"a" * 200_000 + b"\r\nx\r\n0\r\n\r\n",
    "long trailers": b"1\r\nx\r\n0\r\n" + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
    "no end of a chunk": b"1\r\nxx\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("chunks", _CHUNKS.values(), ids=_CHUNKS.keys())
def test_chunks_that_are_none(house: House, url: str, chunks: bytes) -> None:
    chunked = KEYED + b"Transfer-Encoding: chunked\r\n"
    reply = exchange(url, b"POST", "/api/jobs", chunked, chunks, half=True)
    assert refusal(reply).code == "message"
    assert house.stored() == []


def test_bytes_that_are_none_in_the_middle_of_an_answer(
    house: House, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever follows a job has no body to send; what is not one breaks off the answer."""
    path = f"/api/jobs/{house.job(request_id='followed')}/events"
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n".encode() + KEYED
    with connected(url) as line:
        line.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        found = b""
        while b"event: state" not in found:
            found += line.recv(65_536)
        line.sendall(b"zz\r\n")
        found += read_all(line)
    assert found.startswith(b"HTTP/1.1 200")
    assert found.count(b"HTTP/1.1") == 1
    assert not [record for record in caplog.records if record.exc_info]
    house.do()


@pytest.mark.parametrize(
    "target", ["http://evil.example/api/jobs", "http://127.0.0.1/api/jobs", "*", "evil.example:443"]
)
def test_a_target_that_is_no_path(house: House, url: str, target: str) -> None:
    """The server is nobody's proxy."""
    reply = exchange(url, b"CONNECT" if ":443" in target else b"GET", target, KEYED)
    assert refusal(reply).code == "no-such"


_WIRES: dict[str, bytes] = {
    "a huge header": b"X: " + b"a" * 200_000 + b"\r\n",
    "thousands of headers": b"".join(b"X-%d: %s\r\n" % (n, b"a" * 20) for n in range(10_000)),
    "a folded header": b"X: a\r\n b\r\n\tc\r\nX\r\n",
    "a header with a zero": b"X: a\x00b\r\n",
    "a header name with a space": b"X Y: 1\r\n",
    "two lengths": b"Content-Length: 1\r\nContent-Length: 2\r\n",
    "a length and chunks": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
    "an unknown transfer coding": b"Transfer-Encoding: gzip, chunked\r\n",
    "a second host": b"Host: evil.example\r\n",
}


@pytest.mark.parametrize("headers", _WIRES.values(), ids=_WIRES.keys())
def test_bytes_that_are_no_request(house: House, url: str, headers: bytes) -> None:
    reply = exchange(url, b"POST", "/api/jobs", KEYED + headers, b"0\r\n\r\n", half=True)
    assert house.stored() == []
    assert reply == b"" or refusal(reply).code == "message"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01" + bytes(200),
        b"SSH-2.0-x\r\n",
        b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ],
)
def test_other_protocols_on_the_port(house: House, url: str, data: bytes) -> None:
    reply = exchanged(url, data, half=True)
    assert reply == b"" or refusal(reply).code == "message"


def test_a_web_socket_is_not_opened(house: House, url: str) -> None:
    headers = (
        b"Upgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        b"Sec-WebSocket-Version: 13\r\n"
    )
    reply = exchange(url, b"GET", "/api/jobs/x/events", headers)
    assert reply.startswith(b"HTTP/1.1 401")
