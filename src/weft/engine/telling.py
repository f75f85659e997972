"""What a run tells of its values, as data: those that it brings back, and those that it streams.

moved(node.value, saved, found, frames)        # `Ref`s name frames
Streaming(graph, tell, limits)(node, parts)    # tells a `ValueEvent`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from weft.errors import LimitError, WeftError
from weft.graph.frame import Frame
from weft.graph.node import Graph, Log, Map, Ref, Seq, Shape, Slice
from weft.kernels.frames import to_frame
from weft.run.price import short
from weft.run.steps import line_of
from weft.wire import frames as files
from weft.wire.messages import VALUE_BYTES, Limits, ValueEvent

from .refusals import over

_ENCODER = msgspec.msgpack.Encoder()


class Streaming:
    """What `tracer.stream` hands out, one event after another; at most `stream_bytes` in all."""

    def __init__(
        self, graph: Graph, tell: Callable[[ValueEvent], None] | None, limits: Limits
    ) -> None:
        self._graph = graph
        self._tell = tell
        self._limit = limits.stream_bytes
        self._bytes = 0
        self._number = 0

    def __call__(self, node: Log, parts: tuple[Any, ...]) -> None:
        frames: dict[str, Frame] = {}
        value = moved(Seq("tuple", node.parts), parts, {}, frames)
        tensors = files.write(frames) if frames else b""
        size = len(tensors) + len(_ENCODER.encode(value))
        self._bytes += size
        line = line_of(self._graph, node)
        if size > VALUE_BYTES or self._bytes > self._limit:
            raise too_much(size, self._bytes, self._limit, line)
        event = ValueEvent(
            number=self._number, stream=node.stream or 0, value=value, tensors=tensors
        )
        self._number += 1
        if self._tell is not None:
            self._tell(event)


def too_much(size: int, total: int, limit: int, line: object) -> WeftError:
    """The refusal of a value of `size` bytes, with which `total` are streamed."""
    fix = "stream less, such as x[:, -1].argmax(-1), and save the rest"
    if size > VALUE_BYTES:
        most = short(VALUE_BYTES, 1024, "B")
        what = f"a value of {short(size, 1024, 'B')} is streamed; one may have {most}"
        return LimitError(what, line=line, fix=fix)
    asked = f"up to here {short(total, 1024, 'B')} are streamed"
    return over("stream_bytes", short(limit, 1024, "B"), asked, line=line, fix=fix)


def moved(arg: Any, value: Any, found: dict[Ref, Ref], frames: dict[str, Frame]) -> Any:
    """What a save holds, as data: `arg` of the graph, with the frames' numbers as `Ref`s."""
    match arg:
        case Ref() if value is None:
            return None  # not reached
        case Ref():
            if arg not in found:
                found[arg] = Ref(len(frames))
                frames[str(len(frames))] = to_frame(value)
            return found[arg]
        case Seq():
            pairs = zip(arg.items, value, strict=True)
            form = "tuple" if arg.form == "size" else arg.form  # what a client can build
            return Seq(form, tuple([moved(a, v, found, frames) for a, v in pairs]))
        case Map():
            pairs = zip(arg.values, value.values(), strict=True)
            return Map(arg.keys, tuple([moved(a, v, found, frames) for a, v in pairs]))
        case Slice():
            parts = ((arg.start, value.start), (arg.stop, value.stop), (arg.step, value.step))
            return Slice(*[moved(a, v, found, frames) for a, v in parts])
        case Shape():
            return Seq("tuple", tuple(value))
    return arg
