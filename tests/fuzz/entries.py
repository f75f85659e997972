"""Each place where bytes from outside are read, as a function of bytes that may raise `WeftError`.

    ENTRIES["graph"].read(b'{"nodes": []}')

`seeds` are good inputs to begin with. `admit` needs torch and is in `checker`; these do not.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from weft.client.events import Parser
from weft.graph.check import check
from weft.graph.frame import Frame
from weft.graph.node import Call, Const, Graph, Read, Ref, Save
from weft.graph.show import show
from weft.graph.site import Site, Where
from weft.service.gateway import bodies
from weft.wire import codec, frames
from weft.wire.messages import MESSAGES, ErrorReport, Manifest, Submit, decode
from weft.wire.reports import error_of, escaped
from weft.wire.results import decode_result, encode_result

GOLDEN = Path(__file__).parent.parent / "golden"


@dataclass(frozen=True)
class Entry:
    """One reader of bytes. `read` raises `WeftError` for what is no good, and nothing else."""

    read: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]


# -- the readers -----------------------------------------------------------------------------------


FORMS = ("json", "msgpack")


def _message(data: bytes) -> None:
    """The first byte says which message it is to be, the second in which form."""
    names = sorted(MESSAGES)
    if len(data) < 2:
        return
    decode(data[2:], MESSAGES[names[data[0] % len(names)]], FORMS[data[1] % 2])


def _body(data: bytes) -> None:
    bodies.read(data, Submit, "json")


def _file(data: bytes) -> None:
    found, _ = frames.read(data)
    for frame in found.values():
        frames.digest(frame)
    assert frames.read(frames.write(found))[0].keys() == found.keys()


def _result(data: bytes) -> None:
    decode_result(data)


def _graph_file(data: bytes) -> None:
    graph, _, _ = codec.decode_experiment(data)
    show(graph)


def _graph(data: bytes) -> None:
    """A graph's JSON, in a file with the constants of the seeds."""
    text = data.decode("utf-8", "surrogateescape").encode("utf-8", "replace").decode()
    graph, given = codec.decode(frames.write(CONSTANTS, {"format": "weft-graph", "graph": text}))
    show(graph)
    codec.content_hash(graph, given)
    assert codec.decode(codec.encode(graph, given))[0] == graph


def _grammar(data: bytes) -> None:
    check(decode(data, Graph, "json"))


def _report(data: bytes) -> None:
    report = decode(data, ErrorReport, "json")
    escaped(str(error_of(report)))


def _events(data: bytes) -> None:
    """In two pieces, cut where the first byte says."""
    parser, cut = Parser(), data[0] if data else 0
    for event in (*parser.feed(data[1:cut]), *parser.feed(data[max(cut, 1) :])):
        escaped(event.data)


# -- what is good ----------------------------------------------------------------------------------

CONSTANTS = {"c0": Frame("float32", (2,), bytes(8))}


def graphs() -> list[Graph]:
    """A few small graphs, with a constant each."""
    const = Const(key="c0", shape=(2,), dtype="float32")
    read = Read(site=Site("layers.0", "output"), shape=(1, 2, 2), dtype="float32")
    more = Call(op="add", args=(Ref(0), Ref(1)), outs=1)
    where = tuple([Where("mine.py", number) for number in range(4)])
    golden = [codec.decode(path.read_bytes())[0] for path in GOLDEN.glob("*.weft")]
    nodes = read, const, more, Save(name="h", value=Ref(2))
    return [Graph(nodes=(const, Save(name="x", value=Ref(0)))), Graph(nodes, where), *golden]


def _texts() -> list[bytes]:
    return [msgspec.json.encode(graph) for graph in graphs()]


def _goldens(form: str) -> list[bytes]:
    names = sorted(MESSAGES)
    found = []
    for path in sorted((GOLDEN / "messages").glob(f"*.{form}")):
        kind = path.stem.partition("-")[0]
        if kind in MESSAGES:
            head = bytes([names.index(kind), FORMS.index(form)])
            found.append(head + path.read_bytes())
    return found


def _submits() -> list[bytes]:
    return [path.read_bytes() for path in (GOLDEN / "messages").glob("Submit*.json")]


def _files() -> list[bytes]:
    pair = {"x": Frame("int64", (1, 2), bytes(16)), "y": Frame("bool", (3,), b"\0\1\0")}
    return [frames.write({}), frames.write(pair), frames.write(CONSTANTS, {"format": "pt"})]


def _results() -> list[bytes]:
    manifest = Manifest(saved=(("h", Ref(0)), ("k", Ref(1))))
    return [encode_result(manifest, {"0": CONSTANTS["c0"], "1": Frame("uint8", (1,), b"x")})]


def _weft_files() -> list[bytes]:
    return [path.read_bytes() for path in sorted(GOLDEN.glob("*.weft"))]


def _reports() -> list[bytes]:
    return [path.read_bytes() for path in sorted((GOLDEN / "messages").glob("ErrorReport*.json"))]


def _streams() -> list[bytes]:
    data = json.dumps({"type": "state", "state": "running"})
    one = f"id: 3\nevent: state\ndata: {data}\n\n: silence\n\n".encode()
    return [b"\x09" + one, b"\xff" + one * 3, b"\x05id: 1\r\ndata: a\r\ndata: b\r\n\r\n"]


ENTRIES: dict[str, Entry] = {
    "message": Entry(_message, lambda: [*_goldens("json"), *_goldens("msgpack")]),
    "body": Entry(_body, _submits),
    "file": Entry(_file, _files),
    "result": Entry(_result, _results),
    "graph file": Entry(_graph_file, _weft_files),
    "graph": Entry(_graph, lambda: _texts()[:2]),
    "grammar": Entry(_grammar, _texts),
    "report": Entry(_report, _reports),
    "events": Entry(_events, _streams),
}

WORDS = [
    *(b'"kind"', b'"nodes"', b'"ref"', b'"seq"', b'"save"', b'"call"', b'"site"', b'"shape"'),
    *(b'"read"', b'"fill"', b'"loop"', b'"op"', b'"args"', b'"data_offsets"', b'"dtype"'),
    *(b"1e999", b"-1", b"9223372036854775808", b"NaN", b"null", b"[[", b"\\ud800", b"\xff"),
    *(b'"float32"', b'"backward"', b'"name"', b'"version"', b'"outs"', b'"alias"', b"\r\n"),
    *(zlib.compress(b"x" * 1000), b"\xdd\xff\xff\xff\xff", b"../", b"__class__", b"\x1b[2J"),
]
"""What mutations put in."""
