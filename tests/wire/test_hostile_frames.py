"""Files of tensors made by an enemy: each is refused, none costs more than its own bytes."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import MessageError
from weft.graph.frame import Frame
from weft.wire.frames import MAX_HEADER, read, write

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def packed(header: Any, body: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(**changed: Any) -> bytes:
    """A file with one tensor of which something is wrong."""
    return packed({"x": F32 | changed})


def at(*ranges: tuple[int, int]) -> bytes:
    """A file of sixteen bytes with a tensor at each of these ranges."""
    tensors = {
        f"t{n}": {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        for n, (start, end) in enumerate(ranges)
    }
    return packed(tensors, bytes(16))


def raw(dtypes: str, shape: tuple[int, ...] = (16,), dtype: str = "U8") -> bytes:
    """A file whose tensor stands for another dtype."""
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, 16]}
    return packed({"__metadata__": {"dtypes": dtypes}, "x": tensor}, bytes(16))


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was opened')",)


HUGE = str(2**63 - 1)
FILES = {
    # not a file at all
    "nothing": b"",
    "less than a size": b"\x02\0\0\0",
    "a size and no header": b"\x02\0\0\0\0\0\0\0",
    "a pickle": pickle.dumps(Bomb()),
    "a web page": b"<!doctype html><html>",
    # the header
    "a header that is cut": packed({"x": F32})[:20],
    "a header of 2**64 - 1 bytes": b"\xff" * 8 + b"{}",
    "a header longer than any": (MAX_HEADER + 1).to_bytes(8, "little") + b"{}",
    "a header of no bytes": packed(b""),
    "a header of spaces": packed(b"   "),
    "a header that begins with spaces": packed(b"  {}", b""),
    "a header that is a list": packed([]),
    "a header that is a number": packed(1),
    "a header that is no JSON": packed(b"{x:1}"),
    "a header that ends early": packed(b'{"x":'),
    "a header with more after it": packed(b"{}{}", b""),
    "a header that is not UTF-8": packed(b'{"\xff":1}'),
    "a header in UTF-16": packed('{"x":1}'.encode("utf-16")),
    "half a character in a name": packed(b'{"\\ud800":' + json.dumps(F32).encode() + b"}"),
    "half a character in the metadata": packed(b'{"__metadata__":{"a":"\\udfff"}}', b""),
    "a deep list": packed(b'{"x":' + b"[" * 200_000),
    "a deep object": packed(b'{"x":' * 200_000),
    "a number of five thousand digits": packed(b'{"x":' + b"9" * 5000 + b"}"),
    "a tensor twice": packed(b'{"x":%b,"x":%b}' % ((json.dumps(F32).encode(),) * 2)),
    "a field twice": packed(b'{"x":{"dtype":"U8","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
    "metadata twice": packed(b'{"__metadata__":{},"__metadata__":{}}', b""),
    "a text of the metadata twice": packed(b'{"__metadata__":{"a":"1","a":"2"}}', b""),
    "metadata that is a list": packed({"__metadata__": []}, b""),
    "metadata that is nothing": packed({"__metadata__": None}, b""),
    "metadata with a number": packed({"__metadata__": {"a": 1}}, b""),
    "metadata with an object": packed({"__metadata__": {"a": {}}}, b""),
    # one tensor
    "a tensor that is a list": packed({"x": [1]}),
    "a tensor without a dtype": packed({"x": {"shape": [2], "data_offsets": [0, 8]}}),
    "a tensor with one field more": entry(brand_new=1),
    "an unknown dtype": entry(dtype="F31"),
    "a dtype of another library": entry(dtype="float32"),
    "a dtype that is a number": entry(dtype=4),
    "a wider dtype than there are bytes": entry(dtype="F64"),
    "a narrower dtype than there are bytes": entry(dtype="I8"),
    "a shape of more than there are bytes": entry(shape=[3]),
    "a shape below zero": entry(shape=[-2]),
    "two sizes below zero": entry(shape=[-1, -2]),
    "a shape with a fraction": entry(shape=[2.0]),
    "a shape with a flag": entry(shape=[True, 2]),
    "a shape that is a number": entry(shape=2),
    "a shape whose size overflows": entry(shape=[2**62, 4, 2]),
    "a shape whose size overflows to what is there": entry(shape=[2**62 + 2, 4]),
    "a huge shape beside a zero": entry(shape=[2**62, 2**62, 0], data_offsets=[0, 0]),
    "a size beyond 64 bits": entry(shape=[2**64]),
    "a size that is not a number": packed(
        b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'
    ),
    "more dimensions than a tensor has": entry(shape=[2, *([1] * 64)]),
    "three offsets": entry(data_offsets=[0, 8, 8]),
    "one offset": entry(data_offsets=[8]),
    "an offset below zero": entry(data_offsets=[-8, 0]),
    "offsets the wrong way round": entry(data_offsets=[8, 0]),
    "offsets beyond the end": entry(shape=[4], data_offsets=[0, 16]),
    "huge offsets": entry(data_offsets=[2**63 - 9, 2**63 - 1]),
    "offsets beyond 64 bits": entry(data_offsets=[2**64, 2**64 + 8]),
    "a byte that is no bool": packed(
        {"x": {"dtype": "BOOL", "shape": [8], "data_offsets": [0, 8]}}, bytes(7) + b"\2"
    ),
    # where they lie
    "nothing said of the bytes": packed({}),
    "a byte before the first": at((1, 16)),
    "a byte after the last": at((0, 15)),
    "a hole": at((0, 8), (9, 16)),
    "an overlap": at((0, 9), (8, 16)),
    "one inside the other": at((0, 16), (4, 8)),
    "the same bytes twice": at((0, 16), (0, 16)),
    "an empty one in the middle of another": at((0, 16), (8, 8)),
    "a truncated body": at((0, 8), (8, 16))[:-1],
    "one byte more": at((0, 8), (8, 16)) + b"\0",
    # dtypes that stand as bytes
    "true dtypes that are no JSON": raw("x"),
    "true dtypes that are a list": raw("[]"),
    "true dtypes that are deep": raw("[" * 100_000),
    "a true dtype that is not known": raw('{"x":"object"}'),
    "a true dtype that needs no bytes": raw('{"x":"float32"}'),
    "a true dtype for what is not there": raw('{"x":"complex128","y":"complex128"}'),
    "a true dtype of other bytes": raw('{"x":"complex128"}', (2, 8)),
    "a true dtype without a size": raw('{"x":"complex128"}', ()),
    "a true dtype on no bytes": raw('{"x":"complex128"}', (4,), "F32"),
}


@pytest.mark.parametrize("name", FILES)
def test_it_is_refused(name):
    with pytest.raises(MessageError) as caught:
        read(FILES[name])
    assert len(str(caught.value)) < 500


def test_the_same_without_the_fault_is_read():
    """So that the refusals above are for what was changed."""
    x = Frame("float32", (2,), bytes(8))
    assert read(entry()) == ({"x": x}, {})
    assert len(read(at((0, 8), (8, 16)))[0]) == 2
    assert read(raw('{"x":"complex128"}'))[0]["x"].dtype == "complex128"
    assert read(packed({}, b"")) == read(packed(b"{}   ", b"")) == ({}, {})
    assert read(at((0, 16), (16, 16), (0, 0)))[0]["t1"] == Frame("uint8", (0,), b"")


def test_names_and_texts_of_any_length_are_not_repeated_whole():
    with pytest.raises(MessageError) as caught:
        read(packed({"x" * 100_000: 1}))
    assert len(str(caught.value)) < 500


def test_a_longer_header_can_be_allowed():
    data = write({}, {"a": "x" * MAX_HEADER})
    with pytest.raises(MessageError, match="longer than"):
        read(data)
    assert read(data, 2 * MAX_HEADER)[1]


# Anything at all

GOOD = write(
    {
        "a": Frame("float32", (2, 1), bytes(range(8))),
        "b": Frame("bool", (3,), b"\0\1\0"),
        "c": Frame("complex128", (1,), bytes(16)),
        "": Frame("int64", (0, 4), b""),
    },
    {"format": "x"},
)


def theirs(data: bytes) -> dict[str, bytes]:
    """The oracle: what the library finds."""
    return {name: bytes(found["data"]) for name, found in safetensors.deserialize(data)}


def refused_or_the_same(data: bytes) -> None:
    try:
        found, _ = read(data)
    except MessageError:
        return
    assert {name: bytes(frame.data) for name, frame in found.items()} == theirs(data)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=64))
def test_random_bytes_are_refused(data):
    refused_or_the_same(data)
    refused_or_the_same(packed(data))


@settings(max_examples=500, deadline=None)
@given(place=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255), end=st.integers(0, len(GOOD)))
def test_what_we_accept_the_library_reads_alike(place, byte, end):
    changed = bytearray(GOOD)
    changed[place] = byte
    refused_or_the_same(bytes(changed))
    refused_or_the_same(bytes(changed[:end]))


SIZES = st.integers(-1, 5) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 1.5, True, None, "2"])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["BOOL", "U8", "F32", "I64", "F8_E4M3", "x"]),
        "shape": st.lists(SIZES, max_size=3),
        "data_offsets": st.lists(st.integers(0, 12) | SIZES, min_size=2, max_size=2),
    }
)


@settings(max_examples=500, deadline=None)
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "c"]), ENTRIES, max_size=3),
    body=st.integers(0, 12),
)
def test_headers_that_lie_are_refused(header, body):
    refused_or_the_same(packed(header, bytes(body)))
