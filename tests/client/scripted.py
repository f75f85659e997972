"""A server that is a script: what the client sends is answered in this process, and may go wrong.

    script = Scripted({"net": net})
    server = script.server()                     # a `Server` for `remote=`
    script.fault("GET", "/api/jobs/", refused)   # the next such call goes wrong, once

Jobs run when they come, through the engine. Faults are functions of the request that answer it, or
raise what httpx raises.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import httpx
import torch
from msgspec.structs import replace

from weft.client.find import Place
from weft.client.servers import Server
from weft.engine.draw import draw, overwritten_by
from weft.engine.known import Known
from weft.engine.opened import open_submit
from weft.engine.publish import know
from weft.errors import WeftError
from weft.settings import Settings
from weft.wire import frames
from weft.wire.messages import (
    EndEvent,
    ErrorReport,
    Hello,
    JobInfo,
    Limits,
    LogEvent,
    Missing,
    MissingQuery,
    ModelInfo,
    ModelList,
    ResultInfo,
    StateEvent,
    Submit,
    decode,
    encode,
)
from weft.wire.reports import report_of, run_error
from weft.wire.results import encode_result, select

MSGPACK = {"content-type": "application/msgpack"}
LIMITS = Limits(**{name: getattr(Settings(), name) for name in Limits.__struct_fields__})
Fault = Callable[[httpx.Request], httpx.Response]


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class Stream(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body in pieces; an error among them breaks the connection there."""

    def __init__(self, pieces: list[bytes | Exception]) -> None:
        self.pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece


class Scripted:
    """See the module's text. `calls` are the requests so far."""

    def __init__(self, models: Mapping[str, torch.nn.Module] | None = None) -> None:
        self.models: dict[str, tuple[torch.nn.Module, Known]] = {
            id: (net, know(net)) for id, net in (models or {}).items()
        }
        self.clock = Clock()
        self.calls: list[httpx.Request] = []
        self.faults: list[tuple[str, str, Fault]] = []
        self.constants: dict[str, bytes] = {}
        self.requests: dict[str, str] = {}
        self.jobs: dict[str, JobInfo] = {}
        self.notes: dict[str, list[Any]] = {}
        self.results: dict[str, bytes] = {}
        self.protocols: tuple[int, ...] = (1,)
        self.pieces: list[int] = []
        """Sizes of the pieces in which event streams come; all at once without."""

    def server(self, url: str = "http://scripted:1", **settings: Any) -> Server:
        place = Place(url, "weft_key")
        return Server(place, Settings(**settings), httpx.MockTransport(self.answer), self.clock)

    def fault(self, method: str, path: str, what: Fault, times: int = 1) -> None:
        """The next calls whose path begins so are answered by `what`."""
        self.faults += [(method, path, what)] * times

    def said(self, method: str, path: str = "") -> list[httpx.Request]:
        """The calls of this kind so far."""
        return [c for c in self.calls if c.method == method and c.url.path.startswith(path)]

    def answer(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.calls.append(request)
        for fault in self.faults:
            method, path, what = fault
            if request.method == method and request.url.path.startswith(path):
                self.faults.remove(fault)
                return what(request)
        return self.served(request)

    def served(self, request: httpx.Request) -> httpx.Response:
        """The answer when nothing goes wrong."""
        method, *path = request.method, *request.url.path.strip("/").split("/")
        match (method, *path):
            case "GET", "api", "hello":
                return told(
                    Hello(protocols=self.protocols, version="9.9", capabilities=(), limits=LIMITS)
                )
            case "GET", "api", "models":
                return told(ModelList(models=tuple(self._infos())))
            case "POST", "api", "constants", "missing":
                wanted = decode(request.content, MissingQuery).digests
                return told(Missing(digests=tuple(d for d in wanted if d not in self.constants)))
            case "PUT", "api", "constants", digest:
                self.constants[digest] = request.content
                return httpx.Response(201)
            case "POST", "api", "jobs":
                return self._submitted(request)
            case "GET", "api", "jobs", id:
                return told(self.jobs[id]) if id in self.jobs else no_such()
            case "GET", "api", "jobs", id, "events":
                return self._events(request, id)
            case "POST", "api", "jobs", id, "cancel":
                return told(self.jobs[id])
            case "DELETE", "api", "jobs", id:
                del self.jobs[id]
                return httpx.Response(204)
            case "GET", "api", "jobs", id, "result":
                return self._result(request, id)
        return httpx.Response(404, text="<html>not here</html>")

    def _infos(self) -> Iterator[ModelInfo]:
        for id, (net, known) in self.models.items():
            size = sum(p.numel() for p in net.parameters())
            yield ModelInfo(
                id=id,
                family=known.family,
                class_name=type(net).__name__,
                fingerprint=known.fingerprint,
                dtype="float32",
                parameters=size,
            )

    # -- jobs --------------------------------------------------------------------------------

    def _submitted(self, request: httpx.Request) -> httpx.Response:
        submit = decode(request.content, Submit)
        lost = [d for d in submit.constants.values() if not self._has(submit, d)]
        if lost:
            report = ErrorReport(code="no-such", message="constants", missing=tuple(lost))
            return told(report, 409)
        id = self.requests.get(submit.request_id)
        if id is None:
            id = self.requests[submit.request_id] = f"job-{len(self.requests) + 1}"
            self._run(id, submit)
        accepted = JobInfo(id=id, state="received", model=submit.model, created=0.0)
        if "text/event-stream" not in request.headers["accept"]:
            return told(accepted, 201)
        return self._stream([event("accepted", encode(accepted, "json")), *self._said(id, 0)])

    def _has(self, submit: Submit, digest: str) -> bool:
        inside = frames.read(submit.tensors)[0] if submit.tensors else {}
        return digest in inside or digest in self.constants

    def _run(self, id: str, submit: Submit) -> None:
        net, known = self.models[submit.model]
        info = JobInfo(id=id, state="done", model=submit.model, created=0.0, stages={"run": 0.25})
        notes = self.notes[id] = [StateEvent(state="queued"), StateEvent(state="running")]
        fetch = lambda digest: frames.read(self.constants[digest])[0]["x"]
        try:
            job = open_submit(submit, fetch, known)
            drawn = draw(
                net,
                job,
                overwritten=overwritten_by(known, job.call),
                limits=LIMITS,
                strict=submit.strict,
                on_log=lambda text: notes.append(LogEvent(text=text)),
            )
        except Exception as error:  # noqa: BLE001
            own = error if isinstance(error, WeftError) else run_error(error)
            info = replace(info, state="failed", error=report_of(own))
        else:
            data = self.results[id] = encode_result(drawn.manifest, drawn.frames)
            sha = hashlib.sha256(data).hexdigest()
            names = tuple(name for name, _ in drawn.manifest.saved)
            info = replace(info, result=ResultInfo(bytes=len(data), sha256=sha, names=names))
        self.jobs[id] = info
        notes.append(EndEvent(job=info))

    def _said(self, id: str, after: int) -> list[bytes]:
        notes = enumerate(self.notes[id], 1)
        return [
            event(note.__struct_config__.tag, encode(note, "json"), number)  # type: ignore[arg-type]
            for number, note in notes
            if number > after
        ]

    def _events(self, request: httpx.Request, id: str) -> httpx.Response:
        after = int(request.headers.get("last-event-id", 0))
        return self._stream([b": hello\n\n", *self._said(id, after)])

    def _stream(self, messages: list[bytes]) -> httpx.Response:
        """The messages; of a size among `pieces` only so many bytes come, then it breaks."""
        data = b"".join(messages)
        if not self.pieces:
            return httpx.Response(200, stream=Stream([data]))
        kept = data[: self.pieces.pop(0)]
        return httpx.Response(200, stream=Stream([kept, httpx.ReadError("cut")]))

    def _result(self, request: httpx.Request, id: str) -> httpx.Response:
        data = self.results[id]
        names = request.url.params.get_list("name")
        if names:
            part = select(lambda a, b: data[a:b], names)
            length = {"content-length": str(len(part))}
            return httpx.Response(200, headers=length, stream=Stream([part]))
        start = int(request.headers.get("range", "bytes=0-")[6:-1])
        if not start:
            return httpx.Response(200, stream=Stream([data]))
        headers = {"content-range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        return httpx.Response(206, headers=headers, stream=Stream([data[start:]]))


def event(name: str, data: bytes, number: int | None = None) -> bytes:
    """One server-sent event."""
    id = b"" if number is None else b"id: %d\n" % number
    return b"%sevent: %s\ndata: %s\n\n" % (id, name.encode(), data)


def told(message: Any, status: int = 200, **headers: str) -> httpx.Response:
    """A message as an answer."""
    return httpx.Response(status, headers={**MSGPACK, **headers}, content=encode(message))


def no_such() -> httpx.Response:
    return told(ErrorReport(code="no-such", message="there is no such job"), 404)


# -- faults --------------------------------------------------------------------------------------


def refused(request: httpx.Request) -> httpx.Response:
    """Nobody listens."""
    raise httpx.ConnectError("refused", request=request)


def silent(request: httpx.Request) -> httpx.Response:
    """It went in, and no answer came back."""
    raise httpx.ReadTimeout("silence", request=request)


def later(seconds: str, code: str = "limit", status: int = 429) -> Fault:
    """Come back later."""
    report = ErrorReport(code=code, message="too many jobs wait")
    headers = {"retry-after": seconds} if seconds else {}
    return lambda request: told(report, status, **headers)


def failing(**report: Any) -> Fault:
    """An error."""
    return lambda request: told(ErrorReport(**report), 400)
