"""Messages: what was once sent keeps decoding; what arrives is a message or is refused."""

from __future__ import annotations

import json
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.goldens import FOLDER, FORMS, golden
from tests.wire.instances import INSTANCES
from weft.errors import MessageError, TravelError
from weft.graph.node import AnyNode, Ref, Seq
from weft.wire import messages
from weft.wire.messages import MESSAGES, Ask, Tell, decode, encode

ASKS = [name for name, kind in MESSAGES.items() if issubclass(kind, Ask)]
TELLS = [name for name, kind in MESSAGES.items() if issubclass(kind, Tell)]


def kind_of(name: str) -> Any:
    return MESSAGES[name.split("-")[0]]


# Golden files


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", INSTANCES)
def test_what_was_once_sent_keeps_its_meaning(name, form):
    assert decode(golden(name, form).read_bytes(), kind_of(name), form) == INSTANCES[name]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", INSTANCES)
def test_what_is_sent_today_is_understood(name, form):
    assert decode(encode(INSTANCES[name], form), kind_of(name), form) == INSTANCES[name]


def test_every_message_has_golden_files():
    files = {path.name for path in FOLDER.iterdir()}
    assert {name.split("-")[0] for name in INSTANCES} == set(MESSAGES)
    assert files == {f"{name}.{form}" for name in INSTANCES for form in FORMS}


def test_the_list_of_messages_is_whole():
    structs = {
        name
        for name, thing in vars(messages).items()
        if isinstance(thing, type) and issubclass(thing, (Ask, Tell))
    }
    assert structs - {"Ask", "Tell"} == set(MESSAGES)
    assert set(get_args(messages.Event)) <= set(MESSAGES.values())


@pytest.mark.parametrize("name", MESSAGES)
def test_golden_files_show_every_field(name):
    """A field at its default is not written, so a file that leaves it so would test nothing."""
    samples = [sample for key, sample in INSTANCES.items() if key.split("-")[0] == name]
    for field in msgspec.structs.fields(MESSAGES[name]):
        values = [getattr(sample, field.name) for sample in samples]
        if name != "Manifest" or field.name != "protocol":
            assert any(value != field.default for value in values), field.name


def test_the_golden_files_hold_every_node_kind():
    files = [golden(name, "json") for name in INSTANCES if name.split("-")[0] == "Submit"]
    graphs = [json.loads(file.read_text())["graph"] for file in files]
    kinds = {kind.__struct_config__.tag for kind in get_args(AnyNode)}
    assert {node["kind"] for graph in graphs for node in graph["nodes"]} == kinds


# Fields that nobody knows


def with_one_more(name: str) -> bytes:
    raw = msgspec.msgpack.decode(encode(INSTANCES[name]))
    return msgspec.msgpack.encode(raw | {"brand_new": 1})


@pytest.mark.parametrize("name", ASKS)
def test_an_option_that_nobody_reads_is_refused(name):
    with pytest.raises(MessageError, match="brand_new"):
        decode(with_one_more(name), MESSAGES[name])


@pytest.mark.parametrize("name", TELLS)
def test_a_newer_server_may_say_more(name):
    assert decode(with_one_more(name), MESSAGES[name]) == INSTANCES[name]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every object, and of every array that stands for one, in a graph as JSON."""
    found = []
    if isinstance(value, dict):
        found = [path] + [p for key in value for p in places(value[key], (*path, key))]
    elif isinstance(value, list):
        own = [path] if value and value[0] in ("ref", "seq", "map", "slice", "name") else []
        found = own + [p for n, item in enumerate(value) for p in places(item, (*path, n))]
    return found


SUBMIT = json.loads(encode(INSTANCES["Submit"], "json"))


@pytest.mark.parametrize("path", places(SUBMIT["graph"]), ids=str)
def test_no_part_of_a_graph_takes_a_field_that_nobody_reads(path):
    submit = json.loads(json.dumps(SUBMIT))
    part = submit["graph"]
    for key in path:
        part = part[key]
    if isinstance(part, dict):
        part["brand_new"] = 1
    else:
        part.append(1)
    with pytest.raises(MessageError):
        decode(json.dumps(submit).encode(), messages.Submit, "json")


# Hostile bytes

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


def only_refused(data: bytes, kind: Any, form: str) -> None:
    """Either it is a message, or `MessageError` says why not."""
    try:
        found = decode(data, kind, form)
    except MessageError as error:
        assert len(str(error)) < 2000
    else:
        assert isinstance(found, kind)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MESSAGES)
@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200))
def test_random_bytes_are_refused(name, form, data):
    only_refused(data, MESSAGES[name], form)


@pytest.mark.parametrize("name", ASKS)
@settings(max_examples=60, deadline=None)
@given(value=JSON, data=st.data())
def test_random_values_in_any_field_are_refused(name, value, data):
    raw = msgspec.to_builtins(INSTANCES[name])
    key = data.draw(st.sampled_from(sorted(raw)))
    text = json.dumps(raw | {key: value}).encode("utf-8", "surrogatepass")
    only_refused(text, MESSAGES[name], "json")


@pytest.mark.parametrize("name", ASKS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_message_with_a_byte_changed_or_cut_is_refused_or_read(name, data):
    whole = bytearray(encode(INSTANCES[name]))
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(whole)))
    only_refused(bytes(whole), MESSAGES[name], "msgpack")
    only_refused(bytes(whole[:end]), MESSAGES[name], "msgpack")


DEEP = {
    "msgpack arrays": (b"\x91" * 200_000, "msgpack"),
    "msgpack maps": (b"\x81\xa1a" * 200_000, "msgpack"),
    "msgpack in an unknown field": (b"\x81\xa1z" + b"\x91" * 200_000, "msgpack"),
    "msgpack in args": (b"\x81\xa4args" + b"\x91\x93\xa3seq\xa4list" * 200_000, "msgpack"),
    "JSON arrays": (b"[" * 200_000, "json"),
    "JSON objects": (b'{"a":' * 200_000, "json"),
    "JSON in an unknown field": (b'{"z":' + b"[" * 200_000, "json"),
    "JSON in args": (b'{"args":[' + b'["seq","list",[' * 200_000, "json"),
}


@pytest.mark.parametrize("deep", DEEP)
@pytest.mark.parametrize("name", ASKS)
def test_what_is_nested_too_deeply_is_refused(name, deep):
    data, form = DEEP[deep]
    with pytest.raises(MessageError):
        decode(data, MESSAGES[name], form)


LYING = {
    "an array of four billion": b"\xdd\xff\xff\xff\xff\x01",
    "a map of four billion": b"\xdf\xff\xff\xff\xff\xa1a\x01",
    "four gigabytes": b"\xc6\xff\xff\xff\xff\x01",
    "a text of four gigabytes": b"\xdb\xff\xff\xff\xffa",
}


@pytest.mark.parametrize("lie", LYING)
@pytest.mark.parametrize("field", ["args", "tensors", "texts", "constants", "graph", "zzz"])
def test_a_size_is_not_believed(field, lie):
    data = b"\x81" + msgspec.msgpack.encode(field) + LYING[lie]
    for name in ASKS:
        with pytest.raises(MessageError):
            decode(data, MESSAGES[name])


BAD = {
    "a request id with a slash": {"request_id": "../x"},
    "an empty request id": {"request_id": ""},
    "a long request id": {"request_id": "x" * 65},
    "a request id with a line after it": {"request_id": "x\n"},
    "a fingerprint that is none": {"fingerprint": "A" * 64},
    "a fingerprint with a line after it": {"fingerprint": "5f0c" * 16 + "\n"},
    "a digest that is none": {"constants": {"c0": "x"}},
    "inputs of another family": {"inputs": {"type": "diffusion"}},
    "an input that is not offered": {"inputs": {"type": "language", "given": ["past_key_values"]}},
    "no inputs": {"inputs": {"type": "language", "given": []}},
    "an option that is not offered": {
        "inputs": {"type": "language", "given": ["input_ids"], "options": {"custom_generate": "x"}}
    },
    "a number for a flag": {"strict": 1},
    "tensors that are text": {"tensors": "?"},
    "a protocol in words": {"protocol": "1"},
    "a node of an unknown kind": {"graph": {"nodes": [{"kind": "exec", "code": "1"}]}},
}


@pytest.mark.parametrize("bad", BAD)
def test_a_submit_is_refused_for(bad):
    assert decode(json.dumps(SUBMIT).encode(), messages.Submit, "json")
    with pytest.raises(MessageError):
        decode(json.dumps(SUBMIT | BAD[bad]).encode(), messages.Submit, "json")


def test_a_refusal_says_what_and_where():
    with pytest.raises(MessageError, match=r"`bool`, got `int` - at `\$\.strict`") as caught:
        decode(json.dumps(SUBMIT | {"strict": 1}).encode(), messages.Submit, "json")
    assert caught.value.code == "message"


def test_a_refusal_does_not_repeat_all_that_it_was_sent():
    data = json.dumps(SUBMIT | {"x" * 100_000: 1}).encode()
    with pytest.raises(MessageError, match="unknown field") as caught:
        decode(data, messages.Submit, "json")
    assert len(str(caught.value)) < 1000


# What cannot be sent


def nested(depth: int) -> Any:
    arg: Any = 1
    for _ in range(depth):
        arg = Seq("list", (arg,))
    return arg


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arg", ["\ud800", nested(5000)], ids=["half a character", "deep"])
def test_what_has_no_bytes_is_refused_where_it_is_sent(form, arg):
    with pytest.raises(TravelError):
        encode(messages.PlainInputs(args=(Ref(0), arg)), form)


def test_a_number_beyond_what_a_message_holds_is_refused():
    with pytest.raises(TravelError, match="64"):
        encode(messages.PlainInputs(args=(2**70,)))
