"""One job: a stranger's opened request, drawn through a loaded model, within its limits.

    drawn = draw(net, opened, overwritten=overwritten_by(known, opened.call), limits=limits)
    encode_result(drawn.manifest, drawn.frames)

Whatever happens, the model is afterwards as it was (`kept`). Errors of torch's or of the model's
own come as themselves, with `weft_line`, the user's line, where an operation of the graph raised.

Time and cancellation are looked at before each step of the graph and at each of its sites: one
operation, and the model's own pass between two sites, run to their end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from weft.errors import (
    CancelledError,
    MessageError,
    ResultTooLargeError,
    RunError,
    TimeLimitError,
    WeftError,
    WorkerMemoryError,
)
from weft.families.call import ModelCall
from weft.graph.frame import Frame, frame_bytes
from weft.graph.node import Call, Const, Graph, Loop, Ref, Save
from weft.graph.passes import roots
from weft.graph.site import Site, Where
from weft.kernels.aval import dtype_name
from weft.kernels.frames import to_tensor
from weft.run.generate import run_generations
from weft.run.invokes import run_all
from weft.run.joined import Sharer
from weft.run.price import short
from weft.run.rows import Merger
from weft.run.structure import mapped
from weft.run.weights import weights_of
from weft.signatures import later
from weft.signatures.later import Overwritten
from weft.wire.messages import Limits, Manifest, ValueEvent

from .generation import Samplings, decoders
from .kept import Kept
from .known import Known
from .opened import Opened
from .refusals import over
from .steps import Steps
from .telling import Streaming, moved

_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
_WIDEST = 8  # bytes of an element


@dataclass(frozen=True, eq=False)
class Drawn:
    """What a job brings back: tensor `n` of the manifest is frame `"n"`. `kept` stays here."""

    manifest: Manifest
    frames: dict[str, Frame]
    kept: Mapping[str, torch.Tensor] = field(default_factory=dict)


def overwritten_by(
    known: Known,
    *calls: ModelCall,
    graph: Graph | None = None,
    sampling: Samplings = None,
) -> Overwritten:
    """Whether the model changes a leaf's tensor in place after its site has fired; of a graph that
    goes inside forwards, also there."""
    steps = Steps.of(known, calls, sampling, graph)
    if steps is not None:
        return steps.told()
    signatures = known.signatures
    return later.overwritten_by(*signatures.inside.seen(signatures, graph, calls))


def draw(
    net: nn.Module,
    opened: Opened,
    *,
    overwritten: Overwritten | None,
    limits: Limits,
    strict: bool = True,
    merger: Merger | None = None,
    sharer: Sharer | None = None,
    tokenizer: Any = None,
    on_log: Callable[[str], None] | None = None,
    on_value: Callable[[ValueEvent], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    uses: Mapping[str, torch.Tensor] | None = None,
) -> Drawn:
    """Draws an admitted graph through `net`.

    `uses` are values of a session that stand for constants; they are not changed.
    `tokenizer` is for generations with stop strings. `on_value` is told what is streamed, an event
    for each value; `on_progress(done, total)` counts sites that have fired; `cancelled()` is asked
    often, so it should be quick. Raises `CancelledError`, `TimeLimitError`, `ResultTooLargeError`,
    `WorkerMemoryError`, what the graph or the model raises, and `kept.SpoiltError` or
    `LostDeviceError` (with `retire`) if the model must not be used any more.
    """
    watch = RunWatch(opened.graph, limits, on_progress, cancelled, bool(opened.keeps))
    watch.look()
    device = weights_of(net).device or torch.device("cpu")
    try:
        calls = [
            mapped((call.args, dict(call.kwargs)), lambda tensor: tensor.to(device))
            for call in opened.calls
        ]
        constants = constants_of(opened) | _lent(opened.graph, uses or {})
        options: dict[str, Any] = {
            "strict": strict,
            "on_log": BoundedLog(on_log, limits.log_bytes),
            "on_value": Streaming(opened.graph, on_value, limits),
            "overwritten": overwritten,
            "watch": watch,
        }
        with Kept.of(net).job(net):
            if opened.sampling is not None:
                moved = [call.to(device) for call in opened.calls]
                each = decoders(net, moved, opened.sampling, tokenizer)
                options["sharer"] = None if opened.alone else sharer
                found = run_generations(opened.graph, constants, net, [*each], **options)
            else:
                merger = None if opened.alone else merger
                found = run_all(opened.graph, constants, net, calls, merger=merger, **options)
        return brought(opened.graph, found.saved, found.ended, opened.keeps)
    except (RuntimeError, MemoryError) as error:
        meant = understood(error)
        if meant is error:
            raise
        raise meant from None


def understood(error: BaseException) -> BaseException:
    """What an error of torch's means, where that is known: that memory, or the device, is gone."""
    if isinstance(error, WeftError) or not isinstance(error, (RuntimeError, MemoryError)):
        return error
    if _is_memory(error):
        return _no_memory(error)
    return _lost(error) if _is_lost(error) else error


def constants_of(opened: Opened) -> dict[str, torch.Tensor]:
    """The tensors of its constants, by key. Raises `MessageError`."""
    return {key: _tensor(key, frame) for key, frame in opened.constants.items()}


def _tensor(key: str, frame: Frame) -> torch.Tensor:
    if len(frame.data) != frame_bytes(frame.dtype, frame.shape):
        raise MessageError(f"constant {key[:80]!r} is not as long as its shape says")
    return to_tensor(frame)


def _lent(graph: Graph, uses: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values of a session as constants; copies, where the graph writes into them."""
    if not uses:
        return {}
    owner = roots(graph.nodes)
    refs = [ref for node in graph.nodes if isinstance(node, Call) for ref in node.writes]
    written = {owner.get(ref, ref).node for ref in refs}
    if any(isinstance(node, Loop) for node in graph.nodes):  # it may write into what it takes
        written = set(range(len(graph.nodes)))
    lent = {}
    for number, node in enumerate(graph.nodes):
        if isinstance(node, Const) and node.key in uses:
            value = uses[node.key]
            if (dtype_name(value.dtype), tuple(value.shape)) != (node.dtype, tuple(node.shape)):
                raise MessageError(
                    f"a value of the session is {dtype_name(value.dtype)}{list(value.shape)}, "
                    f"not {node.dtype}{list(node.shape)}"
                )
            lent[node.key] = value.clone() if number in written else value
    return lent


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return any(part in text for part in _MEMORY)


def _no_memory(error: BaseException) -> WorkerMemoryError:
    return WorkerMemoryError(
        "the worker had not enough memory for the job",
        line=getattr(error, "weft_line", None),
        fix="give a smaller input, or keep and save less at once",
    )


class LostDeviceError(RunError):
    """The job has stopped the accelerator. `retire`: this process cannot use it any more."""

    retire = True


def _is_lost(error: BaseException) -> bool:
    """Whether a kernel failed on the device: every later call of this process fails as well."""
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or (
        "device-side assert" in str(error)
    )


def _lost(error: BaseException) -> LostDeviceError:
    return LostDeviceError(
        "an operation failed on the accelerator; most often an index was out of range",
        line=getattr(error, "weft_line", None),
        fix="check the indices of the experiment, or clamp them",
        kind="IndexError",
    )


# -- while it runs -------------------------------------------------------------------------------


class RunWatch:
    """Holds a run to its limits: `run.watch.Watch`."""

    def __init__(
        self,
        graph: Graph,
        limits: Limits,
        on_progress: Callable[[int, int], None] | None,
        cancelled: Callable[[], bool] | None,
        keeps: bool = False,
    ) -> None:
        self._limits = limits
        self._room = limits.result_bytes + (limits.session_bytes if keeps else 0)
        self._until = time.monotonic() + limits.run_seconds
        self.others: Callable[[], float] = float
        """Seconds that went to others since then, which do not count."""
        self._on_progress = on_progress
        self._cancelled = cancelled
        self._total = 0
        self._bytes = 0

    def look(self) -> None:
        if self._cancelled is not None and self._cancelled():
            raise CancelledError("the job was cancelled")
        now = time.monotonic()
        if now > self._until and now > self._until + self.others():
            seconds = f"{self._limits.run_seconds:g} s"
            raise over("run_seconds", seconds, "the job runs longer", kind=TimeLimitError)

    def fired(self, left: int) -> None:
        self._total = max(self._total, left + 1)
        if self._on_progress is not None:
            self._on_progress(self._total - left, self._total)

    def counted(self, elements: int, line: Where | None) -> None:
        limit = self._limits.memory_bytes
        if elements * _WIDEST > limit:
            asked = f"an operation would make {elements} elements of the numbers in its arguments"
            raise over("memory_bytes", short(limit, 1024, "B"), asked, line=line)

    def saved(self, size: int, line: Where | None) -> None:
        self._bytes += size
        limit = self._limits.result_bytes
        if self._bytes > self._room:  # admitted each by its own limit; this is for mistakes
            raise over(
                "result_bytes",
                short(limit, 1024, "B"),
                f"up to here {short(self._bytes, 1024, 'B')} are saved",
                line=line,
                fix="save a slice (x[:, -1]), a narrower dtype, or fewer values",
                kind=ResultTooLargeError,
            )


class BoundedLog:
    """Passes lines on until they are too many bytes; then says so, once."""

    def __init__(self, on_log: Callable[[str], None] | None, limit: int) -> None:
        self._on_log = on_log
        self._left = limit
        self._limit = limit

    def __call__(self, text: str) -> None:
        if self._on_log is None or self._left < 0:
            return
        self._left -= len(text.encode(errors="replace"))
        if self._left < 0:
            text = f"(the rest of the log is dropped: log_bytes is {self._limit})"
        self._on_log(text)


# -- what it brings back -------------------------------------------------------------------------


def brought(
    graph: Graph,
    saved: Mapping[str, Any],
    ended: Site | None,
    keeps: frozenset[str] = frozenset(),
) -> Drawn:
    """What a job brings back; what `keeps` names stays here."""
    frames: dict[str, Frame] = {}
    kept: dict[str, torch.Tensor] = {}
    rows = []
    for node in graph.nodes:
        if not isinstance(node, Save) or node.name not in saved:  # a stop may have come before
            continue
        if node.name in keeps:
            if saved[node.name] is not None:
                value = saved[node.name].detach()
                kept[node.name] = value.clone(memory_format=torch.contiguous_format)
            continue
        found: dict[Ref, Ref] = {}  # a tensor that stands twice in one save is sent once
        rows.append((node.name, moved(node.value, saved[node.name], found, frames)))
    return Drawn(Manifest(saved=tuple(rows), ended=ended), frames, kept)
