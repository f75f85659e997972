"""Hostile HTTP: requests that lie about themselves. Each is refused with a reason, and leaves
nothing in the store; what is in their messages is `test_gateway_hostile`,
what only a socket can send `test_gateway_hostile_socket`."""

from __future__ import annotations

import gzip
import json
import logging

import pytest

from tests.service.gate import ANN, MSGPACK, House, frame
from tests.service.hostile import (
    BYTES,
    JSON,
    attacked,
    packed,
    post,
    refused,
)
from weft.service.store.logs import JsonLines
from weft.wire import frames
from weft.wire.messages import TokensQuery, encode

house = pytest.fixture(attacked)


@pytest.mark.parametrize(
    "kind",
    [
        "application/x-python-pickle",
        "application/octet-stream",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "text/plain",
        "application/json; charset=utf-7",
        "application/msgpack, application/json",
        "application/jsonp",
        "",
    ],
)
def test_an_unknown_content_type(house: House, kind: str) -> None:
    refused(house, post(house, packed(), **{"Content-Type": kind}), 415)


def test_a_constant_is_sent_as_bytes_only(house: House) -> None:
    path = f"/api/constants/{frames.digest(frame(1))}"
    data = frames.write({"x": frame(1)})
    refused(house, house.ask("PUT", path, content=data, headers=JSON), 415)
    refused(house, house.ask("PUT", path, content=data), 415)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, identity", "x"])
def test_a_decompression_bomb(house: House, coding: str) -> None:
    bomb = gzip.compress(bytes(10_000_000))
    refused(house, post(house, bomb, **{"Content-Encoding": coding}), 415)
    path = f"/api/constants/{frames.digest(frame(1))}"
    headers = BYTES | {"Content-Encoding": coding}
    refused(house, house.ask("PUT", path, content=bomb, headers=headers), 415)


def test_a_body_that_says_it_is_too_long(house: House) -> None:
    reply = post(house, bytes(100_001))
    report = refused(house, reply, 413)
    assert report.message == "the body has 100001 bytes; the limit body_bytes is 100000"


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "", "٣", "1 2", "9" * 30])
def test_a_length_that_is_none(house: House, length: str) -> None:
    headers = MSGPACK | {"Content-Length": length.encode()}
    refused(house, house.ask("POST", "/api/jobs", content=packed(), headers=headers), 400)


def test_a_body_that_says_it_is_shorter_than_it_is(house: House) -> None:
    async def flood():
        for _ in range(10_000):
            yield bytes(10_000)

    reply = post(house, flood(), **{"Content-Length": "10"})
    report = refused(house, reply, 413)
    assert "more than 100000 bytes" in report.message


@pytest.mark.parametrize(
    "path",
    [
        "/api/jobs/../../etc/passwd",
        "/api/jobs/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/api/jobs/..%5c..%5cx",
        "/api/jobs/a%00b",
        "/api/jobs/" + "a" * 5_000,
        "/api/jobs/%ff%fe",
        "/api/jobs/a%0d%0aX-Evil:%201/result",
        "/api/jobs/*/result",
        "/api/jobs/x' OR '1'='1/events",
        "//api/jobs",
        "/api/jobs/",
        "/api//jobs",
        "/API/jobs",
        "/api/jobs;x=1",
    ],
)
def test_a_path_that_leads_elsewhere(house: House, path: str) -> None:
    refused(house, house.ask("GET", path), 404)


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=-1",
        "limit=1e2",
        "limit=nan",
        "limit=",
        "limit=١",
        "limit=1&limit=2",
        "before=../../x",
        "before=",
        "unknown=1",
        "key=weft_ann",
        "limit[]=1",
        "__proto__=1",
    ],
)
def test_a_parameter_that_does_not_fit(house: House, query: str) -> None:
    refused(house, house.ask("GET", f"/api/jobs?{query}"), 400)


@pytest.mark.parametrize("query", ["wait=nan", "wait=inf", "wait=-1", "wait=301", "wait=1&wait=1"])
def test_a_time_that_does_not_fit(house: House, query: str) -> None:
    refused(house, house.ask("GET", f"/api/jobs/x?{query}"), 400)


def test_a_key_in_the_address_is_no_key(house: House) -> None:
    refused(house, house.ask("GET", f"/api/jobs?key={ANN}", None), 401)


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil", "8.8.8.8"]
)
def test_a_rebound_name(house: House, host: str) -> None:
    reply = house.ask("POST", "/api/jobs", content=packed(), headers=MSGPACK | {"Host": host})
    assert refused(house, reply, 403).code == "access"


@pytest.mark.parametrize(
    "host", ["", "a b", "127.0.0.1:x", "127.0.0.1/..", "[::1", "user@localhost"]
)
def test_a_host_that_is_none(house: House, host: str) -> None:
    refused(house, house.ask("GET", "/api/hello", headers={"Host": host}), 400)


@pytest.mark.parametrize("origin", ["null", "https://evil.example", "http://127.0.0.1:1", ""])
def test_a_page_of_another_origin(house: House, origin: str) -> None:
    headers = MSGPACK | {"Origin": origin}
    reply = house.ask("POST", "/api/jobs", content=packed(), headers=headers)
    refused(house, reply, 403)
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("method", ["TRACE", "PROPFIND", "OPTIONS", "HEAD"])
def test_a_method_that_nobody_needs(house: House, method: str) -> None:
    assert house.ask(method, "/api/jobs").status_code == 405


def test_a_header_that_ends_up_in_an_answer_cannot_add_one(house: House) -> None:
    """Names from requests stand in messages, never in headers."""
    reply = house.ask("GET", "/api/jobs/x?a%0d%0aX-Evil:%201=1")
    assert "x-evil" not in reply.headers
    refused(house, reply, 400)


def test_texts_in_answers_are_bounded(house: House) -> None:
    long = "a" * 20_000
    for reply in (
        post(house, packed(model="m" * 200)),
        house.ask("GET", f"/api/jobs?{long}=1"),
        house.ask("GET", f"/api/card?model={long}"),
        post(house, packed(), **{"Weft-Protocol": long}),
        post(house, packed(), **{"Content-Encoding": long}),
        post(house, encode(TokensQuery(model="m" * 150)), "/api/tokens"),
    ):
        assert 400 <= reply.status_code < 500
        assert len(reply.content) < 2_000


def test_a_log_line_cannot_be_forged(house: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "weft.gateway")
    house.ask("GET", '/api/x%0a{"level":"error"}')
    lines = [JsonLines().format(record) for record in caplog.records]
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert json.loads(lines[0])["path"] == '/api/x\n{"level":"error"}'
    assert ANN not in lines[0]
