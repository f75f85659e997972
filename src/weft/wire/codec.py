"""A graph with its constants as one file, and its content hash.

The file is a safetensors file: constants are its tensors, the graph stands as JSON in its
metadata. Decoding builds frozen data and nothing else; what breaks the grammar is refused.

    data = encode(graph, {"c0": Frame("float32", (2,), b"...")})
    graph, frames = decode(data)
    data = encode_edits(graph, frames, fingerprint)     # of one model; decode reads it too
    content_hash(graph, frames)     # hex; says nothing of lines and files
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
from msgspec.structs import replace

from weft.errors import GraphError, MessageError
from weft.graph.check import check
from weft.graph.frame import Frame, frame_bytes
from weft.graph.node import VERSION, AnyNode, Const, Graph
from weft.graph.passes import invokes_of

from . import messages
from .frames import digest, read, write
from .messages import Generation

FORMAT = "weft-graph"
MAX_HEADER = 100_000_000
"""The graph is part of it; the limit of the format itself."""
_AS_BYTES = frozenset(("bfloat16", "complex64", "complex128"))
"""Dtypes that stood in the first files as bytes (their `Const` node names them)."""
_SEVERAL = Annotated[tuple[Generation, ...], msgspec.Meta(max_length=512)]


def encode(
    graph: Graph, frames: Mapping[str, Frame], generations: Sequence[Generation] = ()
) -> bytes:
    """The bytes of a graph file; `generations` are how tokens are chosen, of each invoke, where it
    is of one."""
    metadata = {"format": FORMAT, "graph": _text(graph)}
    texts = [messages.encode(one, "json").decode() for one in generations]
    if len(set(texts)) == 1:
        metadata["generation"] = texts[0]
    elif texts:
        metadata["generations"] = f"[{','.join(texts)}]"
    return write(frames, metadata)


def decode(data: bytes) -> tuple[Graph, dict[str, Frame]]:
    """The graph and its constants; raises `GraphError` for anything that is not a graph file."""
    graph, frames, _ = _opened(data)
    return graph, frames


def decode_experiment(data: bytes) -> tuple[Graph, dict[str, Frame], tuple[Generation, ...]]:
    """The same, and how tokens are chosen, of each invoke, where the file says it."""
    graph, frames, metadata = _opened(data)
    try:
        return graph, frames, _generations(metadata, 1 + max(invokes_of(graph), default=0))
    except MessageError as error:
        raise GraphError(f"this graph's generation cannot be read: {error.message}") from None


def _generations(metadata: Mapping[str, str], count: int) -> tuple[Generation, ...]:
    one, several = metadata.get("generation"), metadata.get("generations")
    if one is not None and several is not None:
        raise MessageError("it is said twice")
    if one is not None:
        return (messages.decode(one.encode(), Generation, "json"),) * count
    if several is None:
        return ()
    found = messages.decode(several.encode(), _SEVERAL, "json")
    if len(found) != count:
        raise MessageError(f"it is of {len(found)} inputs, the graph of {count}")
    return found


def encode_edits(graph: Graph, frames: Mapping[str, Frame], fingerprint: str) -> bytes:
    """A graph file of edits, with the fingerprint of the model that they are for."""
    return write(frames, {"format": FORMAT, "graph": _text(graph), "edits_of": fingerprint})


def decode_edits(data: bytes) -> tuple[Graph, dict[str, Frame], str]:
    """What `encode_edits` was given. Raises `GraphError` for any other file."""
    graph, frames, metadata = _opened(data)
    if "edits_of" not in metadata:
        raise GraphError(
            "this graph file has no edits of a model",
            fix="run it as an experiment: weft.Experiment.load(path).run(model, ...)",
        )
    return graph, frames, metadata["edits_of"]


def _text(graph: Graph) -> str:
    return msgspec.json.encode(graph).decode()


def _opened(data: bytes) -> tuple[Graph, dict[str, Frame], dict[str, str]]:
    try:
        frames, metadata = read(data, MAX_HEADER)
    except MessageError as error:
        raise GraphError(f"this is not a graph file: {error.message}") from None
    if metadata.get("format") != FORMAT:
        raise GraphError(f"this is not a graph file: its format is not {FORMAT!r}")
    graph = _graph(metadata)
    check(graph)
    return graph, _frames(graph, frames), metadata


def content_hash(graph: Graph, frames: Mapping[str, Frame]) -> str:
    """A SHA-256 over what the graph does: nodes, bounds, seed, constants; not the user's lines."""
    digests = {key: digest(frame) for key, frame in frames.items()}
    nodes = tuple(_anonymous(node, digests) for node in graph.nodes)
    bounds = tuple(replace(bound, at=0) for bound in graph.bounds)
    bare = replace(graph, nodes=nodes, bounds=bounds, where=())
    return hashlib.sha256(msgspec.msgpack.encode(bare)).hexdigest()


def _anonymous(node: AnyNode, digests: Mapping[str, str]) -> AnyNode:
    if isinstance(node, Const):
        return replace(node, at=0, key=digests[node.key])
    return replace(node, at=0)


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
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise GraphError(f"this graph cannot be read: {error}") from None


class _Version(msgspec.Struct):
    version: int = VERSION


def _frames(graph: Graph, frames: dict[str, Frame]) -> dict[str, Frame]:
    """The constants that the graph names: exactly these, each of the size it says."""
    wanted = {node.key: node for node in graph.nodes if isinstance(node, Const)}
    if wanted.keys() != frames.keys():
        odd = sorted(wanted.keys() ^ frames.keys())[0]
        raise GraphError(f"constant {odd!r} is not both in the graph and in its file")
    return {key: _frame(node, frames[key]) for key, node in wanted.items()}


def _frame(node: Const, frame: Frame) -> Frame:
    if (frame.dtype, frame.shape) == (node.dtype, node.shape):
        return frame
    as_bytes = frame.dtype == "uint8" and node.dtype in _AS_BYTES
    if not as_bytes or len(frame.data) != frame_bytes(node.dtype, node.shape):
        raise GraphError(f"constant {node.key!r} is not the {node.dtype}{list(node.shape)} it says")
    return Frame(node.dtype, node.shape, frame.data)
