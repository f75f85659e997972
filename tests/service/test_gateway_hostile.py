"""Hostile messages over HTTP: each is refused with a reason, and leaves nothing in the store.

What a graph does wrong is refused by the checker (`tests/engine`); here is what HTTP, the messages
and the grammar let a stranger try.
"""

from __future__ import annotations

import gzip
import json
import logging
import pickle
import re
import socket
import struct
import zlib
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

from tests.service.gate import ANN, IDS, MSGPACK, PRINT, House, frame, live, submit_of
from weft.graph.frame import Frame
from weft.graph.node import Call, Const, Graph, Name, Ref, Save, Seq
from weft.service.gateway.server import JsonLines
from weft.settings import Settings
from weft.wire import frames
from weft.wire.messages import MissingQuery, TokensQuery, encode

JSON = {"Content-Type": "application/json"}
BYTES = {"Content-Type": "application/octet-stream"}
FORBIDDEN = re.compile(r"Traceback|site-packages|\.py\"|/src/|0x[0-9a-f]{8}")


@pytest.fixture
def house() -> House:
    return House(Settings(body_bytes=100_000, constant_bytes=10_000, nodes=1_000))


def refused(house: House, reply: Any, *statuses: int) -> dict[str, Any]:
    """The report of a refusal that left nothing behind."""
    assert reply.status_code in statuses, (reply.status_code, reply.text)
    report = reply.json()
    assert report["code"]
    assert report["message"]
    assert report["request_id"] == reply.headers["weft-request-id"]
    assert not FORBIDDEN.search(reply.text)
    assert house.stored() == []
    assert house.ledger.next_question() is None
    return report


def post(house: House, content: Any, path: str = "/api/jobs", **headers: str) -> Any:
    return house.ask("POST", path, content=content, headers=MSGPACK | headers)


def raw(**changes: Any) -> dict[str, Any]:
    """A good submission as plain data, changed."""
    return msgspec.to_builtins(submit_of(), builtin_types=(bytes,)) | changes


def packed(**changes: Any) -> bytes:
    return msgspec.msgpack.encode(raw(**changes))


def nested(depth: int, opening: bytes, inner: bytes, closing: bytes = b"") -> bytes:
    return opening * depth + inner + closing * depth


class Boom:
    """What a pickle would do to who opens it."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        return exec, ("raise SystemExit('opened')",)


def graph_with(*nodes: Any, **changes: Any) -> dict[str, Any]:
    """A graph of these raw nodes."""
    return {"nodes": list(nodes), **changes}


# -- messages ------------------------------------------------------------------------------------

_UNREADABLE: dict[str, bytes] = {
    "nothing": b"",
    "a pickle": pickle.dumps(Boom()),
    "a pickle of a message": pickle.dumps(raw()),
    "zlib": zlib.compress(packed()),
    "random bytes": bytes(range(256)),
    "a cut message": packed()[:-5],
    "a message and more": packed() + b"\x00",
    "JSON as msgpack": encode(submit_of(), "json"),
    "an array of fields": msgspec.msgpack.encode(list(raw().values())),
    "a number": b"\x07",
    "a map of numbers": b"\x81\x01\x02",
    "a huge map that is not there": b"\xdf\xff\xff\xff\xff",
    "a huge array that is not there": b"\xdd\xff\xff\xff\xff",
    "a huge text that is not there": b"\xdb\xff\xff\xff\xff",
    "an extension type": b"\xc7\x05\x63hello",
    "a timestamp as the model": packed(model=msgspec.msgpack.Ext(-1, b"\0\0\0\0")),
    "deep arrays": nested(50_000, b"\x91", b"\xc0"),
    "deep maps": nested(50_000, b"\x81\xa1a", b"\xc0"),
    "a text that is no text": b"\x81\xa5model\xa2\xff\xfe",
    "an unknown field": packed(trust_remote_code=True),
    "a dunder field": packed(__class__="os"),
    "a field missing": msgspec.msgpack.encode({"protocol": 1}),
    "a wrong type": packed(strict="yes"),
    "a number for a text": packed(model=7),
    "no fingerprint": packed(fingerprint="nope"),
    "an empty request id": packed(request_id=""),
    "a path as request id": packed(request_id="../../etc/passwd"),
    "a line in the request id": packed(request_id="a\r\nX-Evil: 1"),
    "a long request id": packed(request_id="a" * 65),
    "an empty model": packed(model=""),
    "a long model": packed(model="m" * 201),
    "no protocol": msgspec.msgpack.encode({k: v for k, v in raw().items() if k != "protocol"}),
    "a protocol that is a text": packed(protocol="1"),
    "a protocol beyond 64 bits": packed()[:1] + b"\xa8protocol\xcf" + b"\xff" * 8,
    "an unknown kind of inputs": packed(inputs={"type": "urls", "given": ["http://a"]}),
    "an unknown input": packed(inputs={"type": "language", "given": ["generate"]}),
    "an unknown option": packed(
        inputs={"type": "language", "given": ["input_ids"], "options": {"custom_generate": "x"}}
    ),
    "a path as digest": packed(constants={"c0": "../../bob/" + "0" * 54}),
    "an upper case digest": packed(constants={"c0": "A" * 64}),
    "an unknown kind of node": packed(graph=graph_with({"kind": "exec", "code": "1"})),
    "a node without a kind": packed(graph=graph_with({"op": "Tensor.mul"})),
    "an unknown field of a node": packed(
        graph=graph_with({"kind": "param", "path": "layer.weight", "write": True})
    ),
    "an object as argument": packed(
        graph=graph_with({"kind": "call", "op": "Tensor.mul", "args": [{"__class__": "x"}]})
    ),
    "an unknown tag of an argument": packed(
        graph=graph_with({"kind": "call", "op": "Tensor.mul", "args": [["import", "os"]]})
    ),
    "a message of another kind": encode(MissingQuery(digests=())),
}


@pytest.mark.parametrize("data", _UNREADABLE.values(), ids=_UNREADABLE.keys())
def test_an_unreadable_submission(house: House, data: bytes) -> None:
    refused(house, post(house, data), 400)


_TEXTS: dict[str, str | bytes] = {
    "not JSON": "{'model': 1}",
    "NaN": '{"protocol": NaN}',
    "Infinity": '{"protocol": Infinity}',
    "a number beyond all": '{"protocol": 1e999}',
    "a number of a million digits": '{"protocol": ' + "9" * 50_000 + "}",
    "a field twice": '{"protocol": 1, "protocol": 2}',
    "a field twice, spelled differently": '{"protocol": 1, "\\u0070rotocol": 1}',
    "a constant twice": json.dumps({"constants": {}})[:-2] + '"a": "0", "a": "1"}}',
    "deep arrays": "[" * 50_000 + "]" * 50_000,
    "deep objects": '{"a":' * 15_000 + "1" + "}" * 15_000,
    "half a character": b'{"model": "\\ud800"}',
    "bytes that are no text": b'{"model": "\xff\xfe"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a zero byte": b'{"model": "\x00"}',
    "no base64": json.dumps({"tensors": "***"}),
    "null": "null",
    "two documents": "{}{}",
}


@pytest.mark.parametrize("data", _TEXTS.values(), ids=_TEXTS.keys())
def test_an_unreadable_text(house: House, data: str | bytes) -> None:
    refused(house, house.ask("POST", "/api/jobs", content=data, headers=JSON), 400)


def test_another_protocol_is_refused_whatever_else_is_new(house: House) -> None:
    report = refused(house, post(house, packed(protocol=2, fields_of_tomorrow=1)), 400)
    assert report["code"] == "version-mismatch"
    report = refused(house, post(house, packed(protocol=-1)), 400)
    assert report["code"] == "version-mismatch"


# -- graphs --------------------------------------------------------------------------------------

SAVE = Save(name="h", value=Ref(0))
CONST = Const(key="c0", shape=(1,), dtype="uint8")


def call(*args: Any, op: str = "Tensor.mul", **changes: Any) -> Call:
    return Call(op=op, args=args, **changes)


def deep(depth: int) -> Any:
    arg: Any = Ref(0)
    for _ in range(depth):
        arg = Seq("list", (arg,))
    return arg


_GRAPHS: dict[str, Graph] = {
    "a dunder walk": Graph(nodes=(CONST, call(Ref(0), op="Tensor.__class__.__subclasses__"))),
    "an operation that is not there": Graph(nodes=(CONST, call(Ref(0), op="os.system"))),
    "torch.load": Graph(nodes=(CONST, call("/etc/passwd", op="torch.load"))),
    "a reference to what comes later": Graph(nodes=(CONST, call(Ref(5)))),
    "a reference to itself": Graph(nodes=(CONST, call(Ref(1)))),
    "a reference before all": Graph(nodes=(CONST, call(Ref(-1)))),
    "a result that is not there": Graph(nodes=(CONST, call(Ref(0, 3)))),
    "deep arguments": Graph(nodes=(CONST, call(deep(200)))),
    "a size below zero": Graph(nodes=(Const(key="c0", shape=(-5,), dtype="uint8"),)),
    "an unknown dtype": Graph(nodes=(Const(key="c0", shape=(1,), dtype="object"),)),
    "a million results": Graph(nodes=(CONST, call(Ref(0), outs=10**6))),
    "an unknown name": Graph(nodes=(CONST, call(Ref(0), Name("import", "os")))),
    "a save twice": Graph(nodes=(CONST, SAVE, SAVE)),
    "a number beyond 64 bits": Graph(nodes=(CONST, call(Ref(0), 2**63))),
    "a line that is not there": Graph(nodes=(Const(key="c0", shape=(1,), dtype="uint8", at=9),)),
    "another version": Graph(nodes=(CONST, SAVE), version=99),
}


@pytest.mark.parametrize("graph", _GRAPHS.values(), ids=_GRAPHS.keys())
def test_a_graph_against_the_grammar(house: House, graph: Graph) -> None:
    message = submit_of(frame(1), graph=graph)
    assert refused(house, post(house, encode(message)), 400, 422)["code"] in ("graph", "message")


def test_a_graph_of_too_many_nodes(house: House) -> None:
    nodes = tuple(Const(key="c0", shape=(1,), dtype="uint8") for _ in range(1_001))
    report = refused(house, post(house, encode(submit_of(graph=Graph(nodes=nodes)))), 413)
    assert report["code"] == "limit"
    assert "nodes is 1000" in report["message"]


# -- tensors and constants ------------------------------------------------------------------------


def header(text: str, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + data


def entry(dtype: str = "U8", shape: Any = (1,), offsets: Any = (0, 1)) -> str:
    return json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


_FILES: dict[str, bytes] = {
    "nothing": b"",
    "a pickle": pickle.dumps(Boom()),
    "a torch file": b"PK\x03\x04" + bytes(60),
    "a header longer than the file": (2**62).to_bytes(8, "little") + b"{}",
    "a header of 2**64 bytes": b"\xff" * 8,
    "a shape longer than the data": header(entry(shape=(10**12,), offsets=(0, 10**12)), b"1"),
    "a shape that overflows": header(entry(shape=(2**62, 8), offsets=(0, 1)), b"1"),
    "a size below zero": header(entry(shape=(-1,)), b"1"),
    "offsets that overlap": header(
        '{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        '"y":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"1",
    ),
    "offsets beyond the end": header(entry(offsets=(5, 6)), b"1"),
    "an unknown dtype": header(entry(dtype="OBJECT"), b"1"),
    "a tensor twice": header(entry()[:-1] + "," + entry()[1:], b"1"),
    "a hole": header(entry(offsets=(1, 2)), b"12"),
    "more than it says": header(entry(), b"12"),
    "a float as a size": header(entry(shape=(1.0,)), b"1"),
    "deep JSON": header("[" * 20_000),
    "a bool that is none": header(entry(dtype="BOOL"), b"\x07"),
}


@pytest.mark.parametrize("data", _FILES.values(), ids=_FILES.keys())
def test_tensors_that_are_none(house: House, data: bytes) -> None:
    reply = post(house, packed(tensors=data))
    refused(house, reply, 400)


@pytest.mark.parametrize("data", _FILES.values(), ids=_FILES.keys())
def test_an_upload_that_is_none(house: House, data: bytes) -> None:
    digest = frames.digest(frame(49))
    reply = house.ask("PUT", f"/api/constants/{digest}", content=data, headers=BYTES)
    refused(house, reply, 400)


_ODD: dict[str, bytes] = {
    "two tensors": frames.write({"x": frame(1), "y": frame(2)}),
    "another name": frames.write({"../x": frame(1)}),
    "no tensor": frames.write({}),
    "metadata": frames.write({"x": frame(1)}, {"format": "pt"}),
    "another tensor": frames.write({"x": frame(2)}),
    "the same bytes as another dtype": frames.write({"x": Frame("bool", (1,), b"\x01")}),
    "the same bytes as another shape": frames.write({"x": Frame("uint8", (1, 1), b"\x01")}),
}


@pytest.mark.parametrize("data", _ODD.values(), ids=_ODD.keys())
def test_a_forged_upload(house: House, data: bytes) -> None:
    digest = frames.digest(frame(1))
    reply = house.ask("PUT", f"/api/constants/{digest}", content=data, headers=BYTES)
    refused(house, reply, 400)


@pytest.mark.parametrize(
    "digest", ["..", "%2e%2e%2fbob", "x" * 64, "0" * 63, "0" * 65, "A" * 64, "0" * 63 + "%00"]
)
def test_an_upload_under_no_digest(house: House, digest: str) -> None:
    data = frames.write({"x": frame(1)})
    reply = house.ask("PUT", f"/api/constants/{digest}", content=data, headers=BYTES)
    refused(house, reply, 400, 404)


def test_an_upload_beyond_the_limit(house: House) -> None:
    big = Frame("uint8", (10_001,), bytes(10_001))
    path = f"/api/constants/{frames.digest(big)}"
    reply = house.ask("PUT", path, content=frames.write({"x": big}), headers=BYTES)
    report = refused(house, reply, 413)
    assert "constant_bytes is 10000" in report["message"]


def test_a_forged_constant(house: House) -> None:
    wanted = frames.digest(frame(1))
    tensors = frames.write({"input_ids": IDS, wanted: frame(2)})
    report = refused(house, post(house, encode(submit_of(frame(1), tensors=tensors))), 400)
    assert "another digest" in report["message"]


def test_a_constant_that_nobody_asked_for(house: House) -> None:
    tensors = frames.write({"input_ids": IDS, frames.digest(frame(2)): frame(2)})
    refused(house, post(house, encode(submit_of(tensors=tensors))), 400)


@pytest.mark.parametrize("name", ["../../x", "attention_mask", "__class__", ""])
def test_an_input_that_nobody_asked_for(house: House, name: str) -> None:
    tensors = frames.write({"input_ids": IDS, name: frame(2)})
    refused(house, post(house, encode(submit_of(tensors=tensors))), 400)


def test_an_input_that_is_missing(house: House) -> None:
    refused(house, post(house, encode(submit_of(tensors=b""))), 400)


@pytest.mark.parametrize("constants", [{"other": "0" * 64}, {"c0": "0" * 64, "c1": "0" * 64}, {}])
def test_constants_that_are_not_the_graphs(house: House, constants: dict[str, str]) -> None:
    refused(house, post(house, encode(submit_of(frame(1), constants=constants))), 422, 400)


def test_a_constant_of_somebody_else(house: House) -> None:
    theirs = House()
    name = f"constants/bob/{frames.digest(frame(1))}"
    house.objects.put(name, frames.write({"x": frame(1)}))
    reply = post(house, encode(submit_of(frame(1), send=False)))
    assert (reply.status_code, reply.json()["missing"]) == (409, [frames.digest(frame(1))])
    assert house.stored() == [name]
    assert theirs.stored() == []


def test_a_question_about_too_many_constants(house: House) -> None:
    digests = tuple(f"{number:064x}" for number in range(2_000))
    reply = post(house, encode(MissingQuery(digests=digests)), "/api/constants/missing")
    refused(house, reply, 413)
    few = encode(MissingQuery(digests=digests[:1000]))
    assert post(house, few, "/api/constants/missing").status_code == 200


@pytest.mark.parametrize("path", ["signature", "apply", "tokens"])
def test_a_question_of_another_kind(house: House, path: str) -> None:
    refused(house, post(house, packed(), f"/api/{path}"), 400)
    refused(house, post(house, pickle.dumps(Boom()), f"/api/{path}"), 400)


def test_a_question_about_a_path_of_a_megabyte() -> None:
    house = House()
    query = {"model": "tiny", "fingerprint": PRINT, "path": "a" * 10**6, "layouts": []}
    refused(house, post(house, msgspec.msgpack.encode(query), "/api/apply"), 400)


# -- HTTP ----------------------------------------------------------------------------------------


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
    assert report["message"] == "the body has 100001 bytes; the limit body_bytes is 100000"


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "", "٣", "1 2", "9" * 30])
def test_a_length_that_is_none(house: House, length: str) -> None:
    reply = post(house, packed(), **{"Content-Length": length.encode().decode("latin-1")})
    refused(house, reply, 400)


def test_a_body_that_says_it_is_shorter_than_it_is(house: House) -> None:
    async def flood():
        for _ in range(10_000):
            yield bytes(10_000)

    reply = post(house, flood(), **{"Content-Length": "10"})
    report = refused(house, reply, 413)
    assert "more than 100000 bytes" in report["message"]


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
    assert refused(house, reply, 403)["code"] == "access"


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


def test_two_keys_are_none(house: House) -> None:
    twice = [("Authorization", f"Bearer {ANN}"), ("Authorization", "Bearer weft_other")]
    with live(house) as url:
        reply = exchange(url, b"GET", "/api/jobs", dict_of(twice))
    assert reply.startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("method", ["TRACE", "PROPFIND", "OPTIONS", "HEAD"])
def test_a_method_that_nobody_needs(house: House, method: str) -> None:
    assert house.ask(method, "/api/jobs").status_code == 405


# -- what only a socket can send -------------------------------------------------------------------


def dict_of(headers: list[tuple[str, str]]) -> bytes:
    return b"".join(f"{name}: {value}\r\n".encode() for name, value in headers)


def exchange(
    url: str, method: bytes, path: str, headers: bytes, body: bytes = b"", *, half: bool = False
) -> bytes:
    """Sends bytes as they are and reads to the end."""
    place = urlsplit(url)
    assert place.hostname is not None
    with socket.create_connection((place.hostname, place.port or 80), timeout=20) as line:
        head = b"%s %s HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n" % (
            method,
            path.encode(),
        )
        line.sendall(head + headers + b"\r\n" + body)
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


KEYED = f"Authorization: Bearer {ANN}\r\nContent-Type: application/msgpack\r\n".encode()


def test_a_body_is_refused_before_it_is_sent(house: House) -> None:
    with live(house) as url:
        reply = exchange(url, b"POST", "/api/jobs", KEYED + b"Content-Length: 99999999999\r\n")
    assert reply.startswith(b"HTTP/1.1 413")
    assert b"body_bytes" in reply
    assert b"connection: close" in reply.lower()
    assert house.stored() == []


def test_an_endless_body_is_cut_off(house: House) -> None:
    with live(house) as url:
        place = urlsplit(url)
        assert place.hostname is not None
        with socket.create_connection((place.hostname, place.port or 80), timeout=20) as line:
            head = b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\n" + KEYED
            line.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
            sent = send_for_ever(line, b"%x\r\n%s\r\n" % (4096, bytes(4096)))
            reply = read_all(line)
    assert sent < 100_000_000  # what the kernel's buffers took, not what we could send
    assert reply == b"" or reply.startswith(b"HTTP/1.1 413")
    assert house.stored() == []


def send_for_ever(line: socket.socket, piece: bytes) -> int:
    """Bytes sent until the other side closed."""
    sent = 0
    try:
        while sent < 1_000_000_000:
            line.sendall(piece)
            sent += len(piece)
    except (ConnectionResetError, BrokenPipeError):
        return sent
    return sent


def test_a_body_that_ends_early_leaves_nothing(house: House) -> None:
    data = encode(submit_of())
    with live(house) as url:
        length = b"Content-Length: %d\r\n" % (len(data) + 10)
        reply = exchange(url, b"POST", "/api/jobs", KEYED + length, data, half=True)
    assert not reply.startswith(b"HTTP/1.1 2")
    assert house.stored() == []


def test_an_upload_that_ends_early_leaves_nothing(house: House) -> None:
    data = frames.write({"x": frame(*range(100))})
    path = f"/api/constants/{frames.digest(frame(*range(100)))}"
    keyed = f"Authorization: Bearer {ANN}\r\nContent-Type: application/octet-stream\r\n".encode()
    with live(house) as url:
        length = b"Content-Length: %d\r\n" % len(data)
        reply = exchange(url, b"PUT", path, keyed + length, data[:-1], half=True)
        assert not reply.startswith(b"HTTP/1.1 2")
        assert house.stored() == []
        assert exchange(url, b"PUT", path, keyed + length, data).startswith(b"HTTP/1.1 201")


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
def test_bytes_that_are_no_request(house: House, headers: bytes) -> None:
    with live(house) as url:
        reply = exchange(url, b"POST", "/api/jobs", KEYED + headers, b"0\r\n\r\n", half=True)
        assert reply == b"" or re.match(rb"HTTP/1\.1 4\d\d", reply), reply[:200]
        assert exchange(url, b"GET", "/api/hello", b"").startswith(b"HTTP/1.1 200")
    assert house.stored() == []
    assert not FORBIDDEN.search(reply.decode("latin-1"))


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01" + bytes(200),
        b"SSH-2.0-x\r\n",
        b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ],
)
def test_other_protocols_on_the_port(house: House, data: bytes) -> None:
    with live(house) as url:
        place = urlsplit(url)
        assert place.hostname is not None
        with socket.create_connection((place.hostname, place.port or 80), timeout=20) as line:
            line.sendall(data)
            line.shutdown(socket.SHUT_WR)
            reply = read_all(line)
        assert b"HTTP/1.1 2" not in reply
        assert exchange(url, b"GET", "/api/hello", b"").startswith(b"HTTP/1.1 200")


def test_a_web_socket_is_not_opened(house: House) -> None:
    headers = (
        b"Upgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        b"Sec-WebSocket-Version: 13\r\n"
    )
    with live(house) as url:
        reply = exchange(url, b"GET", "/api/jobs/x/events", headers)
    assert reply.startswith(b"HTTP/1.1 401")


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


def test_numbers_that_are_none_reach_no_job(house: House) -> None:
    """A float NaN where the grammar has its own name for one."""
    nan = struct.pack(">Bd", 0xCB, float("nan"))
    data = encode(submit_of()).replace(b"\xa8protocol\x01", b"\xa8protocol" + nan)
    refused(house, post(house, data), 400)
