"""The app: all routes in one list, and what becomes of a request before its handler sees it.

    app = make_app(ledger, objects, bells, settings, models=("tiny",), version="0.1.0")

The app is a plain ASGI callable with no state but its `gateway`: two of them, with two stores, live
in one process without knowing of each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from weft.errors import MessageError, NoSuchError
from weft.service.store.bells import Bells
from weft.service.store.interface import Ledger, Objects
from weft.settings import Settings
from weft.wire.messages import (
    Applied,
    ApplyQuery,
    Deploy,
    Evict,
    Health,
    Hello,
    JobInfo,
    JobList,
    Keep,
    Missing,
    MissingQuery,
    ModelCard,
    ModelInfo,
    ModelList,
    OpenSession,
    ServerStatus,
    SessionInfo,
    SignatureQuery,
    SourceQuery,
    SourceText,
    Submit,
    Tables,
    Tokens,
    TokensQuery,
    UsageList,
)

from . import (
    constants,
    deploy,
    events,
    health,
    jobs,
    metrics,
    models,
    pages,
    questions,
    results,
    sessions,
    usage,
)
from .auth import check_protocol, check_scope, key_of
from .bodies import query_of
from .entry import BODY, Entry
from .errors import Refused
from .front import Front, Passage
from .limits import check_door
from .openai.table import ROUTES as OPENAI
from .state import THREADS, Gateway, Visit
from .threads import Threads
from .watch import Follow, Watch

_NOT_MODEL = {404: "the server has no such model", 503: "it is loading, or could not be loaded"}
_NOT_JOB = {404: "there is no such job of yours", 410: "it was there, and has expired"}
_NOT_SESSION = {404: "there is no such session of yours"}
_OTHER = {409: "the server's model is not the one recorded on"}
_REFUSED = {422: "the checker refuses it"}
_CARD = {"If-None-Match": "an ETag that the client has"}
_RANGES = {
    "Range": "one range of bytes",
    "If-Range": "the ETag that the range belongs to",
    "If-None-Match": "an ETag that the client has",
}

ROUTES: tuple[Entry, ...] = (
    Entry(
        method="GET",
        path="/health",
        handler=health.ready,
        text="Whether the server works: all parts are there and every model is loaded.",
        gives=Health,
        statuses={503: "it does not; the body says which part"},
        key=False,
        protocol=False,
    ),
    Entry(
        method="GET",
        path="/health/live",
        handler=health.live,
        text="That this process answers.",
        gives=Health,
        key=False,
        protocol=False,
    ),
    Entry(
        method="GET",
        path="/health/ready",
        handler=health.ready,
        text="The same as `/health`.",
        gives=Health,
        statuses={503: "it does not; the body says which part"},
        key=False,
        protocol=False,
    ),
    Entry(
        method="GET",
        path="/metrics",
        handler=metrics.metrics,
        text="What the server counts of itself, for Prometheus.",
        gives="text/plain",
        protocol=False,
        scope="metrics",
    ),
    Entry(
        method="GET",
        path="/openapi.json",
        handler=pages.document,
        text="This interface as an OpenAPI document.",
        gives="application/json",
        key=False,
        protocol=False,
    ),
    Entry(
        method="GET",
        path="/docs",
        handler=pages.page,
        text="This interface as a page to read.",
        gives="text/html",
        key=False,
        protocol=False,
    ),
    Entry(
        method="GET",
        path="/api/hello",
        handler=models.hello,
        text="The handshake: protocols, version, capabilities, limits.",
        gives=Hello,
        key=False,
        protocol=False,
    ),
    Entry(
        method="GET",
        path="/api/status",
        handler=models.status,
        text="How long the server runs, and how many jobs wait and run for each model.",
        gives=ServerStatus,
        scope="read",
    ),
    Entry(
        method="GET",
        path="/api/usage",
        handler=usage.usage,
        text="What you used, by day and model, and your limits; with the scope `admin` others too.",
        gives=UsageList,
        query=usage.UsageQuery,
        scope="read",
    ),
    Entry(
        method="GET",
        path="/api/models",
        handler=models.listing,
        text="The models that the server has.",
        gives=ModelList,
        scope="read",
    ),
    Entry(
        method="POST",
        path="/api/models",
        handler=deploy.deploy,
        text="Deploys a model that the operator allows; it stays, also after a restart.",
        takes=Deploy,
        gives=ModelInfo,
        status=201,
        statuses={
            200: "it was there, and is pinned as asked, or tried anew if it had failed",
            **BODY,
            409: "the name is that of another model",
            422: "there is no model with safetensors there",
        },
        scope="deploy",
    ),
    Entry(
        method="POST",
        path="/api/models/evict",
        handler=deploy.evict,
        text="Takes a model out of memory, after the jobs that it has begun; or off the server.",
        takes=Evict,
        gives=ModelInfo,
        statuses={
            **BODY,
            404: "the server has no such model",
            409: "it is pinned, or of the server's own configuration",
        },
        scope="deploy",
    ),
    Entry(
        method="GET",
        path="/api/card",
        handler=models.card,
        text="A model as data: its modules, its configuration, its tokenizer.",
        gives=ModelCard,
        query=models.ModelQuery,
        headers=_CARD,
        statuses={304: "the client has it already", **_NOT_MODEL},
        scope="read",
    ),
    Entry(
        method="GET",
        path="/api/tables",
        handler=models.tables,
        text="What the model's sites look like, as far as the checker has learnt it.",
        gives=Tables,
        query=models.ModelQuery,
        statuses=_NOT_MODEL,
        scope="read",
    ),
    Entry(
        method="POST",
        path="/api/signature",
        handler=questions.signature,
        text="What the model's sites look like for one call.",
        takes=SignatureQuery,
        gives=Tables,
        statuses=BODY | _NOT_MODEL | _OTHER | _REFUSED,
    ),
    Entry(
        method="POST",
        path="/api/source",
        handler=questions.source,
        text="What a module's forward is, and the operations in it.",
        takes=SourceQuery,
        gives=SourceText,
        statuses=BODY | _NOT_MODEL | _OTHER | _REFUSED,
    ),
    Entry(
        method="POST",
        path="/api/apply",
        handler=questions.apply,
        text="What one of the model's modules gives for some arguments.",
        takes=ApplyQuery,
        gives=Applied,
        statuses=BODY | _NOT_MODEL | _OTHER | _REFUSED,
    ),
    Entry(
        method="POST",
        path="/api/tokens",
        handler=questions.tokens,
        text="Token ids of texts or chats, made by the model's own tokenizer.",
        takes=TokensQuery,
        gives=Tokens,
        statuses=BODY | _NOT_MODEL | _REFUSED,
    ),
    Entry(
        method="POST",
        path="/api/constants/missing",
        handler=constants.missing_ones,
        text="Which of these constants you have not uploaded yet.",
        takes=MissingQuery,
        gives=Missing,
        statuses=BODY,
    ),
    Entry(
        method="PUT",
        path="/api/constants/{digest}",
        handler=constants.upload,
        text="Uploads a constant: a safetensors file with one tensor, `x`.",
        takes=constants.MEDIA,
        gives=Missing,
        statuses={201: "it is there now", **BODY},
    ),
    Entry(
        method="POST",
        path="/api/jobs",
        handler=jobs.submit,
        text="Submits a job. With `Accept: text/event-stream` its events follow at once.",
        takes=Submit,
        gives=JobInfo,
        status=201,
        statuses={
            200: "the same request was there before; or the events follow",
            **BODY,
            404: "the server has no such model",
            409: "another model; constants are missing; or the request id was used for another",
            422: "the graph is not well formed",
            429: "too many of your jobs wait",
            503: "the model could not be loaded, or the server is about to stop",
        },
    ),
    Entry(
        method="GET",
        path="/api/jobs",
        handler=jobs.listing,
        text="Your jobs, newest first.",
        gives=JobList,
        query=jobs.ListQuery,
        scope="read",
    ),
    Entry(
        method="GET",
        path="/api/jobs/{id}",
        handler=jobs.status,
        text="A job; with `wait`, when it is over or the time is.",
        gives=JobInfo,
        query=jobs.WaitQuery,
        statuses=_NOT_JOB,
        scope="read",
    ),
    Entry(
        method="GET",
        path="/api/jobs/{id}/events",
        handler=jobs.events,
        text="A job's events as they happen, from where the client left off.",
        gives=events.MEDIA,
        query=jobs.AfterQuery,
        headers={"Last-Event-ID": "the number of the last event that the client has"},
        statuses=_NOT_JOB,
        scope="read",
    ),
    Entry(
        method="POST",
        path="/api/jobs/{id}/cancel",
        handler=jobs.cancel,
        text="Cancels a job; one that is over stays as it is.",
        gives=JobInfo,
        statuses=_NOT_JOB,
    ),
    Entry(
        method="POST",
        path="/api/jobs/{id}/keep",
        handler=jobs.keep,
        text="Keeps a job for a time of its own after its end.",
        takes=Keep,
        gives=JobInfo,
        statuses=_NOT_JOB | BODY,
    ),
    Entry(
        method="DELETE",
        path="/api/jobs/{id}",
        handler=jobs.delete,
        text="Deletes a job that is over, and its result.",
        status=204,
        statuses={409: "it is not over", **_NOT_JOB},
    ),
    Entry(
        method="POST",
        path="/api/sessions",
        handler=sessions.opened,
        text="Opens a session, whose requests share values on the server.",
        takes=OpenSession,
        gives=SessionInfo,
        status=201,
        statuses={
            429: "as many sessions of this key are open as may be",
            **BODY,
            **_NOT_MODEL,
            **_OTHER,
        },
    ),
    Entry(
        method="GET",
        path="/api/sessions/{id}",
        handler=sessions.shown,
        text="How a session is.",
        gives=SessionInfo,
        statuses=_NOT_SESSION,
    ),
    Entry(
        method="POST",
        path="/api/sessions/{id}/renew",
        handler=sessions.renewed,
        text="Says that the session's client is still there.",
        gives=SessionInfo,
        statuses={410: "it is over", **_NOT_SESSION},
    ),
    Entry(
        method="DELETE",
        path="/api/sessions/{id}",
        handler=sessions.closed,
        text="Ends a session: what has not run is cancelled. Tells which requests failed.",
        gives=SessionInfo,
        statuses=_NOT_SESSION,
    ),
    Entry(
        method="GET",
        path="/api/jobs/{id}/result",
        handler=results.result,
        text="What a job saved, as a file; with `name`, these saves only.",
        gives=results.MEDIA,
        query=results.NameQuery,
        headers=_RANGES,
        statuses={
            206: "the range asked for",
            304: "the client has it already",
            409: "there is no result (yet); the body says why",
            416: "there is nothing in this range",
            **_NOT_JOB,
            410: "the result is not there any more, or the job has expired",
        },
        scope="read",
    ),
    *OPENAI,
)


class App:
    """The ASGI callable."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        paths = dict.fromkeys(entry.path for entry in ROUTES)
        places = [Route(_pattern(path), _Place(gateway, path)) for path in paths]
        router = Router(places, redirect_slashes=False, default=_nothing)
        self._front = Front(router, gateway)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._front(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await send({"type": "websocket.close"})

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.gateway.close()
        self.gateway.threads.close()
        self.gateway.meter.flush()
        self.gateway.tallies.flush()
        await send({"type": "lifespan.shutdown.complete"})


def _pattern(path: str) -> str:
    """A path as the router has it: the id of a model may have a `/` in it."""
    return path.replace("{model}", "{model:path}")


class _Place:
    """All methods of one path."""

    def __init__(self, gateway: Gateway, path: str) -> None:
        self._gateway = gateway
        self._path = path
        self._entries = {entry.method: entry for entry in ROUTES if entry.path == path}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["weft"].route = self._path
        entry = self._entries.get(scope["method"])
        if entry is None:
            allowed = ", ".join(sorted(self._entries))
            raise Refused(MessageError(f"this path takes {allowed}"), 405, {"Allow": allowed})
        response = await _answered(self._gateway, entry, Request(scope, receive))
        await response(scope, receive, send)


async def _answered(gateway: Gateway, entry: Entry, request: Request) -> Response:
    """Key, query and handler: on one thread and in one go, if the handler does not wait."""
    if not inspect.iscoroutinefunction(entry.handler):
        return await gateway.off(_answer, gateway, entry, request)
    visit = await gateway.off(_checked, gateway, entry, request)
    return await entry.handler(gateway, visit)


def _answer(gateway: Gateway, entry: Entry, request: Request) -> Any:
    return entry.handler(gateway, _checked(gateway, entry, request))


def _checked(gateway: Gateway, entry: Entry, request: Request) -> Visit:
    """What every handler may rely on. Blocks."""
    passage: Passage = request.scope["weft"]
    key = None
    if entry.key and not (entry.scope == "metrics" and metrics.is_open(gateway, request)):
        key = key_of(gateway, request)
        passage.owner = key.owner
        check_scope(key, entry.scope)
        check_door(gateway, key, entry, request)
    if entry.protocol:
        check_protocol(request.headers)
    query = query_of(request, entry.query)
    return Visit(request=request, query=query, owner=passage.owner, id=passage.id, key=key)


async def _nothing(scope: Scope, receive: Receive, send: Send) -> NoReturn:
    raise NoSuchError("there is nothing at this path", fix="GET /docs lists what there is")


def make_app(
    ledger: Ledger,
    objects: Objects,
    bells: Bells,
    settings: Settings,
    *,
    models: Iterable[str],
    version: str,
    scratch: Path | None = None,
    sandbox: str | None = None,
) -> App:
    """An app over a store. `models` are the ids that the server has, loaded or not; `scratch` is a
    folder for uploads that are not whole yet; `sandbox` is what `/health` says about it."""
    threads = Threads(THREADS)

    async def ask(jobs: Collection[str], follows: Sequence[Follow]) -> Any:
        return await threads.run(lambda: events.ask(ledger, objects, jobs, follows))

    return App(
        Gateway(
            ledger=ledger,
            objects=objects,
            bells=bells,
            settings=settings,
            models=tuple(models),
            version=version,
            watch=Watch(bells.gateway, ask),
            threads=threads,
            routes=ROUTES,
            scratch=None if scratch is None else str(scratch),
            sandbox=sandbox,
        )
    )
