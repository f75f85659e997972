"""Graph files: constants stand in them as themselves, and older files keep decoding."""

from __future__ import annotations

import msgspec
import pytest
import safetensors.torch
import torch

from weft.errors import GraphError
from weft.graph.frame import Frame
from weft.graph.node import Call, Const, Graph, Ref, Save
from weft.kernels.frames import to_frame
from weft.wire import frames as files
from weft.wire.codec import content_hash, decode, encode

DTYPES = ["bfloat16", "complex64", "complex128", "float16", "bool"]


def graph_of(dtype: str, **options) -> Graph:
    nodes = (Const(key="c", shape=(2,), dtype=dtype), Save(name="c", value=Ref(0)))
    return Graph(nodes=nodes, **options)


def frame_of(dtype: str) -> Frame:
    return to_frame(torch.tensor([0, 1]).to(getattr(torch, dtype)))


def stored(graph: object, frames: dict[str, Frame]) -> bytes:
    text = msgspec.json.encode(graph).decode()
    return files.write(frames, {"format": "weft-graph", "graph": text})


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_file_keeps_its_constants(dtype):
    graph, frame = graph_of(dtype), frame_of(dtype)
    assert decode(encode(graph, {"c": frame})) == (graph, {"c": frame})


def test_constants_stand_in_the_file_as_what_they_are():
    data = encode(graph_of("bfloat16"), {"c": frame_of("bfloat16")})
    assert torch.equal(safetensors.torch.load(data)["c"], torch.tensor([0, 1]).bfloat16())


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64", "complex128"])
def test_the_first_files_had_some_dtypes_as_bytes(dtype):
    frame = frame_of(dtype)
    raw = Frame("uint8", (len(frame.data),), frame.data)
    graph = graph_of(dtype)
    assert decode(stored(graph, {"c": raw})) == (graph, {"c": frame})


WRONG = {
    "bytes of another size": ("bfloat16", Frame("uint8", (3,), bytes(3))),
    "bytes for what needs none": ("float16", Frame("uint8", (4,), bytes(4))),
    "another dtype of the same size": ("float16", Frame("bfloat16", (2,), bytes(4))),
    "another shape": ("float16", Frame("float16", (1, 2), bytes(4))),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_constant_that_is_not_what_its_node_says_is_refused(wrong):
    dtype, frame = WRONG[wrong]
    with pytest.raises(GraphError, match="'c'"):
        decode(stored(graph_of(dtype), {"c": frame}))


def test_a_later_version_is_told_apart_from_a_broken_file():
    later = msgspec.to_builtins(graph_of("bool")) | {"version": 999, "brand_new": 1}
    with pytest.raises(GraphError, match="this graph has version 999") as caught:
        decode(stored(later, {"c": frame_of("bool")}))
    assert caught.value.fix == "install a newer Weft"


def test_a_field_that_nobody_reads_is_refused():
    graph = msgspec.to_builtins(graph_of("bool"))
    graph["nodes"][0]["brand_new"] = 1
    with pytest.raises(GraphError, match="brand_new"):
        decode(stored(graph, {"c": frame_of("bool")}))


def test_the_hash_is_of_the_numbers_and_not_of_their_names():
    one = content_hash(graph_of("bool"), {"c": frame_of("bool")})
    other = Graph(nodes=(Const(key="k", shape=(2,), dtype="bool"), Save(name="c", value=Ref(0))))
    assert content_hash(other, {"k": frame_of("bool")}) == one
    assert content_hash(graph_of("bool"), {"c": Frame("bool", (2,), b"\1\1")}) != one
    more = Graph(nodes=(*other.nodes, Call(op="Tensor.sum", args=(Ref(0),))))
    assert content_hash(more, {"k": frame_of("bool")}) != one


NESTS = {
    "lists": ('["seq","list",[', "]]"),
    "slices": ('["slice",', "]"),
    "slices at their end": ('["slice",null,null,', "]"),
    "dicts": ('["map",["k"],[', "]]"),
}


@pytest.mark.parametrize("depth", [33, 300, 450, 600, 900, 100_000])
@pytest.mark.parametrize("nest", NESTS)
def test_arguments_nested_too_deeply_are_refused_however_deep(nest, depth):
    begin, end = NESTS[nest]
    save = '{"kind":"save","name":"x","value":' + begin * depth + "1" + end * depth + "}"
    data = files.write({}, {"format": "weft-graph", "graph": '{"nodes":[' + save + "]}"})
    with pytest.raises(GraphError):
        decode(data)
