"""What a server says of jobs, while they wait and run and when they are over."""

from __future__ import annotations

from weft.graph.node import Arg
from weft.graph.site import Site

from .base import PROTOCOL, Tell


class ErrorReport(Tell, frozen=True):
    """An error as data: `weft.errors` by `code`. Never a traceback, a path or another's data.

    `kind` is the class of an exception of PyTorch's or the model's own. `request_id` is what the
    server's log has it under.
    """

    code: str
    message: str
    line: str | None = None
    fix: str | None = None
    kind: str = ""
    request_id: str | None = None
    missing: tuple[str, ...] = ()


class PriceInfo(Tell, frozen=True):
    """What the server says a graph costs: `run.price.Price`."""

    sites: int
    operations: int
    flops: int
    constant_bytes: int
    saved_bytes: int
    peak_bytes: int
    ends: Site | None = None


class ResultInfo(Tell, frozen=True):
    """What a job brought back: the size and SHA-256 of its file, the names of what it saved."""

    bytes: int
    sha256: str
    names: tuple[str, ...] = ()


class JobInfo(Tell, frozen=True):
    """A job, as its owner sees it. Times are seconds since 1970.

    `state` is `received`, `queued`, `running`, `done`, `failed` or `cancelled`. `stages` tells how
    long each took, in seconds: `price`, `queue`, `run`. While it waits, `ahead` counts the jobs
    that come before it, `estimate` says in how many seconds it may begin (jobs ahead, at the rate
    at which the last ones of this model were done, and the rest of a load), and `model_state` how
    its model is where that is not ready. `expires` is when the server forgets one that is over.
    `merged`: its forward was shared with jobs of others.
    """

    id: str
    state: str
    model: str
    created: float
    look: bool = False
    attempts: int = 0
    ahead: int | None = None
    price: PriceInfo | None = None
    result: ResultInfo | None = None
    error: ErrorReport | None = None
    stages: dict[str, float] = {}
    expires: float | None = None
    merged: bool = False
    estimate: float | None = None
    model_state: str | None = None


class JobList(Tell, frozen=True):
    jobs: tuple[JobInfo, ...]


class SessionInfo(Tell, frozen=True):
    """A session, as its owner sees it. Times are seconds since 1970.

    `state` is `open`, `closed` (its owner said so) or `expired` (nobody was heard of for `seconds`
    after `until`). `last` is the number of its last request, `failed` are the jobs of those that
    failed, by number, where it was asked.
    """

    id: str
    state: str
    model: str
    created: float
    until: float
    seconds: float
    last: int = 0
    failed: tuple[tuple[int, JobInfo], ...] = ()


class StateEvent(Tell, frozen=True, tag="state"):
    """The job moved on."""

    state: str
    attempts: int = 0


class LogEvent(Tell, frozen=True, tag="log"):
    """`tracer.log(...)`, as it happens."""

    text: str


VALUE_BYTES = 32 << 20
"""Bytes that one streamed value may have: it is one event, which is one line."""


class ValueEvent(Tell, frozen=True, tag="value"):
    """What `tracer.stream(...)` hands out, as it comes to be: a tuple.

    `Ref(n)` in `value` is the tensor `"n"` of `tensors`. `number` counts the values of the job from
    0; a job that is begun anew (`attempts`) gives the same ones again, under the same numbers.
    """

    number: int
    stream: int
    value: Arg
    tensors: bytes = b""


class ProgressEvent(Tell, frozen=True, tag="progress"):
    """How far the job is. `kind` is `run`: sites that have fired, of those the graph waits for; or
    `load`: bytes of its model's weights that are in memory, of all, while it waits for them."""

    done: int
    total: int
    kind: str = "run"


class EndEvent(Tell, frozen=True, tag="end"):
    """The job is over; nothing follows.

    result: the result file, where it is small and was asked for (`Weft-Inline`).
    """

    job: JobInfo
    result: bytes = b""


Event = StateEvent | LogEvent | ValueEvent | ProgressEvent | EndEvent

FINAL = ("done", "failed", "cancelled")
"""States that a job stays in."""


# -- what a result file says of itself -----------------------------------------------------------


class Manifest(Tell, frozen=True):
    """The head of a result file: what was saved, by name. `Ref(n)` in it is the tensor `"n"`.

    `ended` is the site at which the forward pass could stop.
    """

    saved: tuple[tuple[str, Arg], ...]
    ended: Site | None = None
    protocol: int = PROTOCOL
