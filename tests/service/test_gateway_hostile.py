"""Hostile messages over HTTP: each is refused with a reason, and leaves nothing in the store.

What a graph does wrong is refused by the checker (`tests/engine`); here is what the messages and
the grammar let a stranger try. `test_gateway_hostile_http` has what HTTP does.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import struct
import threading
import time
import zlib
from typing import Any

import msgspec
import pytest

from tests.service.gate import ANN, IDS, PRINT, House, frame, submit_of
from tests.service.hostile import BYTES, JSON, PICKLE, attacked, packed, post, raw, refused
from weft.errors import MessageError
from weft.graph.frame import Frame
from weft.graph.node import Call, Const, Graph, Name, Ref, Save, Seq
from weft.service.gateway import accept, bodies
from weft.wire import frames
from weft.wire.messages import LanguageInputs, MissingQuery, encode

house = pytest.fixture(attacked)


def nested(depth: int, opening: bytes, inner: bytes, closing: bytes = b"") -> bytes:
    return opening * depth + inner + closing * depth


def graph_with(*nodes: Any, **changes: Any) -> dict[str, Any]:
    """A graph of these raw nodes."""
    return {"nodes": list(nodes), **changes}


# -- messages ------------------------------------------------------------------------------------

_UNREADABLE: dict[str, bytes] = {
    "nothing": b"",
    "a pickle": PICKLE,
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
    "deep maps": nested(30_000, b"\x81\xa1a", b"\xc0"),
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


GOOD = encode(submit_of(frame(1)), "json").decode()


def test_what_is_changed_in_these_tests_is_good() -> None:
    assert post(House(), packed()).status_code == 201
    assert House().ask("POST", "/api/jobs", content=GOOD, headers=JSON).status_code == 201


@pytest.mark.parametrize(
    ("name", "twin"),
    [("model", '"model":"tiny",'), ("model", '"\\u006dodel":"other",'), ("c0", '"c0":"0",')],
)
def test_a_name_that_stands_twice(house: House, name: str, twin: str) -> None:
    """Who checks the first and who takes the second must not be two."""
    twice = GOOD.replace(f'"{name}":', f'{twin}"{name}":', 1)
    report = refused(house, house.ask("POST", "/api/jobs", content=twice, headers=JSON), 400)
    assert report.message.endswith(f"'{name}' stands twice in one object")


def test_json_is_for_people(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory it is thirty times as long."""
    monkeypatch.setattr(bodies, "JSON_BYTES", 5_000)
    reply = house.ask("POST", "/api/jobs", content="[" * 5_001, headers=JSON)
    report = refused(house, reply, 413)
    assert report.message == "the body has 5001 bytes; the limit of JSON is 5000"
    assert report.fix == "send it as application/msgpack"
    assert post(House(), packed(), Accept="application/json").status_code == 201


def test_large_messages_are_read_one_at_a_time(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, most, counting = 0, 0, threading.Lock()

    def read(*args: Any) -> Any:
        nonlocal at_once, most
        with counting:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.1)
        with counting:
            at_once -= 1
        raise MessageError("enough")

    async def many() -> None:
        asks = (house._ask("POST", "/api/jobs", ANN, content=GOOD, headers=JSON) for _ in range(8))
        assert {reply.status_code for reply in await asyncio.gather(*asks)} == {400}

    monkeypatch.setattr(accept, "read", read)
    asyncio.run(many())
    assert most > 1
    monkeypatch.setattr(bodies, "LARGE", len(GOOD))
    most = 0
    asyncio.run(many())
    assert most == 1


def test_another_protocol_is_refused_whatever_else_is_new(house: House) -> None:
    report = refused(house, post(house, packed(protocol=2, fields_of_tomorrow=1)), 400)
    assert report.code == "version-mismatch"
    report = refused(house, post(house, packed(protocol=-1)), 400)
    assert report.code == "version-mismatch"


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
    assert refused(house, post(house, encode(message)), 400, 422).code in ("graph", "message")


def test_a_graph_of_too_many_nodes(house: House) -> None:
    nodes = tuple(Const(key="c0", shape=(1,), dtype="uint8") for _ in range(1_001))
    report = refused(house, post(house, encode(submit_of(graph=Graph(nodes=nodes)))), 413)
    assert report.code == "limit"
    assert "nodes is 1000" in report.message


# -- tensors and constants ------------------------------------------------------------------------


def header(text: str, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + data


def entry(dtype: str = "U8", shape: Any = (1,), offsets: Any = (0, 1)) -> str:
    return json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


_FILES: dict[str, bytes] = {
    "nothing": b"",
    "a pickle": PICKLE,
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
    assert "constant_bytes is 10000" in report.message


def test_a_forged_constant(house: House) -> None:
    wanted = frames.digest(frame(1))
    tensors = frames.write({"input_ids": IDS, wanted: frame(2)})
    report = refused(house, post(house, encode(submit_of(frame(1), tensors=tensors))), 400)
    assert "another digest" in report.message


def test_a_constant_that_nobody_asked_for(house: House) -> None:
    tensors = frames.write({"input_ids": IDS, frames.digest(frame(2)): frame(2)})
    refused(house, post(house, encode(submit_of(tensors=tensors))), 400)


_NAMES = ["../../x", "attention_mask", "__class__", "", "in.0"]
_NUMBERED = ["0.input_ids", "1.input_ids", "01.input_ids", "\u0661.input_ids", "9" * 30 + ".x"]


@pytest.mark.parametrize("name", [*_NAMES, *_NUMBERED])
def test_an_input_that_nobody_asked_for(house: House, name: str) -> None:
    tensors = frames.write({"input_ids": IDS, name: frame(2)})
    refused(house, post(house, encode(submit_of(tensors=tensors))), 400)


def test_an_input_that_is_missing(house: House) -> None:
    refused(house, post(house, encode(submit_of(tensors=b""))), 400)
    further = (LanguageInputs(given=("input_ids",)),)
    refused(house, post(house, encode(submit_of(further=further))), 400)
    refused(house, post(house, encode(submit_of(further=further * 512))), 400)


@pytest.mark.parametrize("constants", [{"other": "0" * 64}, {"c0": "0" * 64, "c1": "0" * 64}, {}])
def test_constants_that_are_not_the_graphs(house: House, constants: dict[str, str]) -> None:
    message = submit_of(frame(1), send=False, constants=constants)
    assert refused(house, post(house, encode(message)), 422).code == "graph"


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
    refused(house, post(house, PICKLE, f"/api/{path}"), 400)


def test_a_question_about_a_long_path(house: House) -> None:
    query = {"model": "tiny", "fingerprint": PRINT, "path": "a" * 50_000, "layouts": []}
    refused(house, post(house, msgspec.msgpack.encode(query), "/api/apply"), 400)


def test_numbers_that_are_none_reach_no_job(house: House) -> None:
    """A float NaN where the grammar has its own name for one."""
    nan = struct.pack(">Bd", 0xCB, float("nan"))
    data = encode(submit_of()).replace(b"\xa8protocol\x01", b"\xa8protocol" + nan)
    refused(house, post(house, data), 400)
