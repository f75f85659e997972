"""`tracer.stream(...)` in a block: a log whose parts are handed out, whole, when they exist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from weft.graph.node import Complex, Log, Map, Name, Seq, Slice

from .arguments import Walk

if TYPE_CHECKING:
    from weft.graph.node import Arg

    from .recorder import Recorder


def record_stream(recorder: Recorder, parts: tuple[Any, ...], stream: int) -> None:
    """Hands `parts` to the stream of this number. Raises for what is no value."""
    if not recorder.open:
        raise recorder.refusal(
            "tracer.stream was called after its block",
            "call it in the block; after it, `for value in tracer.stream` gives what was streamed",
        )
    if not parts:
        raise recorder.refusal("nothing is streamed", "name a value: tracer.stream(x)")
    walk = Walk(recorder, "stream")
    lowered = tuple([walk.lower(_plain(part)) for part in parts])
    _check(recorder, lowered)
    after = None if recorder.steps is None else recorder.steps.moment(lowered)
    recorder.append(Log(parts=lowered, after=after, stream=stream, at=recorder.here()))


def _plain(part: Any) -> Any:
    return tuple(part) if isinstance(part, torch.Size) else part


def _check(recorder: Recorder, parts: tuple[Arg, ...]) -> None:
    """Raises for what would arrive from a server as something else, or not at all."""
    for part in parts:
        match part:
            case Seq():
                _check(recorder, part.items)
            case Map() if all(isinstance(key, str) for key in part.keys):
                _check(recorder, part.values)
            case Map() | Slice() | Complex():
                raise _odd(recorder)
            case Name() if part.form != "float":
                raise _odd(recorder)


def _odd(recorder: Recorder) -> Exception:
    return recorder.refusal(
        "what is streamed is made of tensors, numbers and text, alone or in tuples, lists and "
        "dicts with text keys",
        "stream the tensors themselves, and put them together where they arrive",
    )
