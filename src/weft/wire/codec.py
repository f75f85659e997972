"""A graph with its constants as one file, and its content hash.

The file is a safetensors file: constants are its tensors, the graph stands as JSON in its
metadata. Decoding builds frozen data and nothing else; what breaks the grammar is refused.

    data = encode(graph, {"c0": Frame("float32", (2,), b"...")})
    graph, frames = decode(data)
    content_hash(graph, frames)     # hex; says nothing of lines and files
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec
import numpy as np
from msgspec.structs import replace
from safetensors import SafetensorError
from safetensors.numpy import load, save

from weft.errors import GraphError
from weft.graph.check import check
from weft.graph.frame import Frame, frame_bytes
from weft.graph.node import VERSION, AnyNode, Const, Graph

FORMAT = "weft-graph"
_NUMPY = frozenset(
    ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
)
"""Dtypes that stand in the file as they are; others as bytes (their `Const` node names them)."""


def encode(graph: Graph, frames: Mapping[str, Frame]) -> bytes:
    """The bytes of a graph file."""
    arrays = {key: _array(frame) for key, frame in frames.items()}
    text = msgspec.json.encode(graph).decode()
    return save(arrays, {"format": FORMAT, "graph": text})


def decode(data: bytes) -> tuple[Graph, dict[str, Frame]]:
    """The graph and its constants; raises `GraphError` for anything that is not a graph file."""
    graph = _graph(_metadata(data))
    try:
        arrays = load(data)
    except SafetensorError as error:
        raise GraphError(f"this is not a graph file: {error}") from None
    check(graph)
    return graph, _frames(graph, arrays)


def content_hash(graph: Graph, frames: Mapping[str, Frame]) -> str:
    """A SHA-256 over what the graph does: nodes, bounds, seed, constants; not the user's lines."""
    digests = {key: _digest(frame) for key, frame in frames.items()}
    nodes = tuple(_anonymous(node, digests) for node in graph.nodes)
    bounds = tuple(replace(bound, at=0) for bound in graph.bounds)
    bare = replace(graph, nodes=nodes, bounds=bounds, where=())
    return hashlib.sha256(msgspec.msgpack.encode(bare)).hexdigest()


def _anonymous(node: AnyNode, digests: Mapping[str, str]) -> AnyNode:
    if isinstance(node, Const):
        return replace(node, at=0, key=digests[node.key])
    return replace(node, at=0)


def _digest(frame: Frame) -> str:
    head = f"{frame.dtype}{list(frame.shape)}".encode()
    return hashlib.sha256(head + frame.data).hexdigest()


def _metadata(data: bytes) -> dict[str, str]:
    """The header's text fields, read before anything else is believed."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise GraphError("this is not a graph file: its header is cut off")
    try:
        header = msgspec.json.decode(data[8 : 8 + size])
        found = header["__metadata__"]
    except (msgspec.DecodeError, KeyError, TypeError):
        raise GraphError("this is not a graph file: it has no readable header") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise GraphError(f"this is not a graph file: its format is not {FORMAT!r}")
    return found


def _graph(metadata: dict[str, str]) -> Graph:
    text = metadata.get("graph", "")
    try:
        version = msgspec.json.decode(text, type=_Version).version
        if version > VERSION:
            raise GraphError(
                f"this graph has version {version}, this Weft reads up to {VERSION}",
                fix="install a newer Weft",
            )
        return msgspec.json.decode(text, type=Graph)
    except (msgspec.DecodeError, RecursionError) as error:
        raise GraphError(f"this graph cannot be read: {error}") from None


class _Version(msgspec.Struct):
    version: int = VERSION


def _array(frame: Frame) -> np.ndarray:
    if frame.dtype in _NUMPY:
        return np.frombuffer(frame.data, dtype=frame.dtype).reshape(frame.shape)
    return np.frombuffer(frame.data, dtype=np.uint8)


def _frames(graph: Graph, arrays: dict[str, np.ndarray]) -> dict[str, Frame]:
    """The constants that the graph names: exactly these, each of the size it says."""
    wanted = {node.key: node for node in graph.nodes if isinstance(node, Const)}
    if wanted.keys() != arrays.keys():
        odd = sorted(wanted.keys() ^ arrays.keys())[0]
        raise GraphError(f"constant {odd!r} is not both in the graph and in its file")
    return {key: _frame(node, arrays[key]) for key, node in wanted.items()}


def _frame(node: Const, array: np.ndarray) -> Frame:
    typed = (str(array.dtype), array.shape) == (node.dtype, node.shape)
    raw = array.dtype == np.uint8 and node.dtype not in _NUMPY
    if not (typed or raw) or array.nbytes != frame_bytes(node.dtype, node.shape):
        raise GraphError(f"constant {node.key!r} is not the {node.dtype}{list(node.shape)} it says")
    return Frame(node.dtype, node.shape, array.tobytes())
