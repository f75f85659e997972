"""The remote backend: the model is on a server.

    backend = RemoteBackend(True, "language", lambda: Wanted("gpt2", fingerprint))
    reply = backend.run(request)             # submits, follows the job to its end, fetches
    job = backend.submit(request)            # submits, and leaves it at that

What `tracer.log` says there is printed here, as it happens.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from weft.errors import OtherModelError, WrongModelError
from weft.wire.messages import JobInfo, LogEvent, ValueEvent
from weft.wire.reports import escaped

from . import aio, jobs, results, sync
from .backend import Reply, Request
from .catalog import Wanted, chosen, forget
from .core import Talk
from .effects import Steps
from .job import AsyncJob, Job, finished
from .progress import LoadBar
from .servers import Server, server_at
from .travel import Parcel, fitting, pack
from .values import heard


class RemoteBackend:
    """Draws graphs through a model of a server. Nothing is asked before the first request.

    asked: which server, as in `remote=`. family: the kind of inputs the model takes. wanted: which
    model it is, asked for when it is needed (a fingerprint takes a moment).
    """

    def __init__(
        self, asked: bool | str | Server, family: str, wanted: Callable[[], Wanted]
    ) -> None:
        self._asked = asked
        self._family = family
        self._wanted = wanted
        self.keep_seconds: float | None = None

    def keeping(self, seconds: float) -> RemoteBackend:
        """The same, whose jobs are kept for so many seconds after their end."""
        other = RemoteBackend(self._asked, self._family, self._wanted)
        other.keep_seconds = seconds
        return other

    @property
    def server(self) -> Server:
        return server_at(self._asked)

    def run(self, request: Request) -> Reply:
        server = self.server
        return sync.run(server, self._run(Talk(server), request), hear=_hearing(request, server))

    async def arun(self, request: Request) -> Reply:
        """The same without blocking the event loop."""
        server = self.server
        return await aio.run(
            server, self._run(Talk(server), request), hear=_hearing(request, server)
        )

    def submit(self, request: Request) -> Job:
        """Sends the request; returns when it is acknowledged."""
        server = self.server
        info = sync.run(server, self._submit(Talk(server), request))
        return Job(server, info.id, info=info, device=request.device, listen=request.listen)

    async def asubmit(self, request: Request) -> AsyncJob:
        server = self.server
        info = await aio.run(server, self._submit(Talk(server), request))
        return AsyncJob(server, info.id, info=info, device=request.device, listen=request.listen)

    # -- steps -------------------------------------------------------------------------------

    def _run(self, talk: Talk, request: Request) -> Steps[Reply]:
        began = talk.server.clock()
        parcel, body = yield from self._packed(talk, request)
        end = yield from self._asking(talk, jobs.follow(talk, parcel, body))
        info = end.job
        manifest, saved = yield from results.fetch(talk, info.id, finished(info), end.result)
        stages = {**info.stages, "round trip": talk.server.clock() - began}
        return Reply(
            results.moved(saved, request.device),
            manifest.ended,
            stages,
            talk.traffic.up,
            talk.traffic.down,
            info.id,
        )

    def _submit(self, talk: Talk, request: Request) -> Steps[JobInfo]:
        parcel, body = yield from self._packed(talk, request)
        return (yield from self._asking(talk, jobs.send(talk, parcel, body)))

    def _packed(self, talk: Talk, request: Request) -> Steps[tuple[Parcel, bytes]]:
        parcel = pack(request, self._family)
        wanted = self._wanted()
        hello = yield from talk.hello()
        model = yield from chosen(talk, wanted)
        request_id = secrets.token_hex(16)
        message = parcel.submit(request_id, model.id, wanted.fingerprint, wanted.weights)
        return parcel, fitting(replace(message, keep_seconds=self.keep_seconds), hello.limits)

    def _asking(self, talk: Talk, steps: Steps[Any]) -> Steps[Any]:
        """The steps; where the server does not have the model any more, that is remembered."""
        try:
            return (yield from steps)
        except (WrongModelError, OtherModelError):
            forget(talk.server, self._wanted())
            raise

    def __repr__(self) -> str:
        return f"<RemoteBackend {self._asked!r}>"


def print_log(given: Any) -> None:
    """Prints what `tracer.log` says."""
    _, event = given
    if isinstance(event, LogEvent):
        print_line(event.text)


def _hearing(request: Request, server: Server) -> Callable[[Any], None]:
    """Prints what `tracer.log` says, hands on what `tracer.stream` does, shows a load."""
    load = LoadBar(server.settings)

    def hear(given: Any) -> None:
        _, event = given
        load.hear(event)
        if isinstance(event, ValueEvent):
            heard(event, request.listen, request.device)
        else:
            print_log(given)

    return hear


def print_line(text: str) -> None:
    """Prints a text from elsewhere, without what could act on a terminal."""
    print(escaped(text, keep="\n\t"), flush=True)
