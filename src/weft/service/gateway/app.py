"""The app: what becomes of a request before its handler (`table`) sees it.

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

from . import (
    events,
    metrics,
)
from .auth import check_protocol, check_scope, key_of
from .bodies import query_of
from .entry import Entry
from .errors import Refused
from .front import Front, Passage
from .limits import check_door
from .state import THREADS, Gateway, Visit
from .table import ROUTES
from .threads import Threads
from .watch import Follow, Watch


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
