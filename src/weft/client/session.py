"""The client's half of a session on a server: a `Backend` whose requests share values there.

    room = SessionBackend(backend)           # of a `RemoteBackend`: one model of one server
    room.run(request)                        # returns when it is sent, if it brings nothing back
    room.fetch(away)                         # the numbers of what one of them has left there
    room.close()                             # waits for the rest; raises what failed unheard

Requests are numbered, and run in this order. The session is opened with the first of them; while it
is open a thread says from time to time that its client is still there.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections import deque
from typing import Any

import torch
from msgspec import msgpack
from msgspec.structs import replace as changed

from weft.errors import (
    RemoteError,
    ServerAwayError,
    SessionLostError,
    UnknownOptionError,
    WeftError,
)
from weft.graph.node import Const, Graph, Log, Ref, Save
from weft.wire.messages import (
    FINAL,
    Hello,
    JobInfo,
    Kept,
    OpenSession,
    Seat,
    SessionInfo,
    Submit,
)

from . import aio, jobs, results, sync
from .backend import Reply, Request
from .catalog import chosen
from .core import MissingError, Talk
from .effects import Steps
from .job import AsyncJob, Job, failure_of, finished
from .remote import RemoteBackend
from .travel import Parcel, fitting, pack

PATIENCE = 300.0
"""Seconds of one wait for the last request; there may be several."""

_UNSURE = (ServerAwayError, SessionLostError)
"""After these nobody knows whether the request is there."""


class SessionBackend(RemoteBackend):
    """See the module's text. Requests come from one task at a time."""

    def __init__(self, backend: RemoteBackend) -> None:
        super().__init__(backend.server, backend._family, backend._wanted)
        self._info: SessionInfo | None = None
        self._number = 0
        self._job: str | None = None  # of the last request
        self._first: Request | None = None
        self._graphs: set[str] = set()
        self._drops: deque[Kept] = deque()
        self._told: set[int] = set()  # requests whose failure the user has heard of
        self._waiting = False  # whether there may be failures that nobody has heard of
        self._lost: str | None = None
        self._life: _Life | None = None

    # -- requests ----------------------------------------------------------------------------

    def submit(self, request: Request) -> Job:
        server = self.server
        info = sync.run(server, self._sent(Talk(server), request))
        return Job(server, info.id, info=info, device=request.device, listen=request.listen)

    async def asubmit(self, request: Request) -> AsyncJob:
        server = self.server
        info = await aio.run(server, self._sent(Talk(server), request))
        return AsyncJob(server, info.id, info=info, device=request.device, listen=request.listen)

    @property
    def number(self) -> int:
        """The number of the last request."""
        return self._number

    def _run(self, talk: Talk, request: Request) -> Steps[Reply]:
        began = talk.server.clock()
        if not brings(request):
            info = yield from self._sent(talk, request)
            self._waiting = True
            traffic = talk.traffic
            return Reply({}, None, {}, traffic.up, traffic.down, info.id, self._number)
        end = yield from self._sent(talk, request, wait=True)
        info = end.job
        if info.result is None:
            self._told.add(self._number)
        manifest, saved = yield from results.fetch(talk, info.id, finished(info), end.result)
        return Reply(
            results.moved(saved, request.device),
            manifest.ended,
            {**info.stages, "round trip": talk.server.clock() - began},
            talk.traffic.up,
            talk.traffic.down,
            info.id,
            self._number,
        )

    def _sent(self, talk: Talk, request: Request, wait: bool = False) -> Steps[Any]:
        """Sends a request as the next one of the session: its job when it is acknowledged; with
        `wait` its last event, when it is over."""
        if self._lost is not None:
            raise _over(self._lost)
        parcel = pack(request, self._family)
        wanted = self._wanted()
        hello = yield from talk.hello()
        model = yield from chosen(talk, wanted)
        session = yield from self._opened(talk, model.id, wanted.fingerprint)
        assert all(one.space is self for one in request.uses.values()), "a value of another place"
        number, drops = self._number + 1, self._taken_drops()
        seat = Seat(
            id=session.id,
            number=number,
            keeps=tuple(sorted(request.keeps)),
            uses={key: Kept(number=u.number, name=u.name) for key, u in request.uses.items()},
            drops=drops,
        )
        bare = parcel.submit(f"{session.id}-{number}", model.id, wanted.fingerprint, wanted.weights)
        message = changed(bare, seat=seat)
        way = jobs.follow if wait else jobs.send
        try:
            return (yield from self._asking(talk, self._send(talk, parcel, message, hello, way)))
        except BaseException as error:
            if self._number < number:
                self._drops.extendleft(drops)
                refused = isinstance(error, WeftError) and not isinstance(error, _UNSURE)
                self._lost = None if refused else f"{type(error).__name__}: {error}"
            raise
        finally:
            if self._number == number:
                self._lightest(request)

    def _send(self, talk: Talk, parcel: Parcel, message: Submit, hello: Hello, way: Any) -> Any:
        """A graph that went before goes as its hash."""
        assert message.seat is not None
        number = message.seat.number

        def accepted(info: JobInfo) -> None:
            self._number, self._job = number, info.id

        digest = hashlib.sha256(msgpack.encode(message.graph)).hexdigest()
        whole = fitting(message, hello.limits)
        if digest in self._graphs:
            short = changed(message, graph=Graph(()), seat=changed(message.seat, same=digest))
            body = fitting(short, hello.limits)
            try:
                return (yield from way(talk, parcel, body, digest, accepted))
            except MissingError:
                pass  # it was long ago
        self._graphs.add(digest)
        return (yield from way(talk, parcel, whole, None, accepted))

    def _lightest(self, request: Request) -> None:
        """Remembers the request with the smallest inputs, for those that need no input."""
        size = _inputs(request)
        if self._first is None or size < _inputs(self._first):
            with torch._C.DisableTorchFunction():  # whatever the user does with his own
                args = tuple([_copy(one) for one in request.args])
                kwargs = {name: _copy(one) for name, one in request.kwargs.items()}
            self._first = Request(Graph(()), {}, args, kwargs, device=request.device)

    # -- values ------------------------------------------------------------------------------

    def fetch(self, *aways: Any) -> list[torch.Tensor]:
        """The numbers of values that are there, in one request. Raises what has become of them."""
        nodes: list[Any] = []
        for number, away in enumerate(aways):
            dtype = str(away.aval.dtype).removeprefix("torch.")
            ref = Ref(len(nodes))
            nodes.append(Const(key=f"c{number}", shape=tuple(away.aval.shape), dtype=dtype))
            nodes.append(Save(name=str(number), value=ref))
        uses = {f"c{number}": away for number, away in enumerate(aways)}
        try:
            saved = self.run(self.beside(Graph(tuple(nodes)), uses, look=True)).saved
        except WeftError:
            self._told.update([away.number for away in aways])
            raise
        return [saved[str(number)] for number in range(len(aways))]

    def beside(
        self, graph: Graph, uses: dict[str, Any], constants: Any = None, **options: Any
    ) -> Request:
        """A request for a graph that has no sites: the model is not run, whatever its input."""
        first = self._first
        assert first is not None
        return Request(
            graph,
            constants or {},
            first.args,
            first.kwargs,
            device=first.device,
            uses=uses,
            **options,
        )

    def dropped(self, number: int, name: str) -> None:
        """Nobody here has the value any more: the next request says so."""
        self._drops.append(Kept(number=number, name=name))

    def _taken_drops(self) -> tuple[Kept, ...]:
        taken = []
        while self._drops and len(taken) < 65_536:
            taken.append(self._drops.popleft())
        return tuple(taken)

    # -- its life ----------------------------------------------------------------------------

    def _opened(self, talk: Talk, model: str, fingerprint: str) -> Steps[SessionInfo]:
        info = self._info
        if info is None:
            if "sessions" not in (yield from talk.hello()).capabilities:
                raise UnknownOptionError(
                    f"the server at {talk.server.url} is of a version without sessions",
                    fix="use traces that save what they bring, or a session of this machine",
                )
            ask = OpenSession(
                request_id=secrets.token_hex(16), model=model, fingerprint=fingerprint
            )
            info = self._info = yield from talk.ask("POST", "/api/sessions", SessionInfo, ask)
            self._life = _Life(self, info.seconds)
        return info

    def renew(self) -> None:
        """Says that this client is still there."""
        assert self._info is not None
        server = self.server
        path = f"/api/sessions/{self._info.id}/renew"
        sync.run(server, Talk(server).ask("POST", path, SessionInfo))

    def close(self, wait: bool = True) -> None:
        """Ends the session, when all that was sent has run. Raises what failed unheard."""
        life, self._life = self._life, None
        if life is None or self._info is None:
            return
        server = self.server
        try:
            info = sync.run(server, self._closing(Talk(server), wait))
        finally:
            life.end()
        unheard = [job for number, job in info.failed if number not in self._told]
        if wait and unheard:
            raise failure_of(unheard[0])

    def _closing(self, talk: Talk, wait: bool) -> Steps[SessionInfo]:
        assert self._info is not None
        if wait and self._waiting and self._job is not None and self._lost is None:
            while (yield from jobs.wait(talk, self._job, PATIENCE)).state not in FINAL:
                pass
        return (yield from talk.ask("DELETE", f"/api/sessions/{self._info.id}", SessionInfo))

    def __repr__(self) -> str:
        return f"<SessionBackend {self._asked!r}, {self._number} requests>"


class _Life:
    """A thread that keeps the lease of a session."""

    def __init__(self, room: SessionBackend, seconds: float) -> None:
        self._room = room
        self._over = threading.Event()
        self._every = max(seconds / 3, 0.05)
        self._thread = threading.Thread(target=self._beat, name="weft session", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._over.wait(self._every):
            try:
                self._room.renew()
            except SessionLostError as error:
                self._room._lost = error.message
                return
            except RemoteError:
                continue  # the next request says what is wrong

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def _inputs(request: Request) -> int:
    """Bytes of the first call of the model."""
    given = [*request.args, *request.kwargs.values()]
    return sum([one.nbytes for one in given if isinstance(one, torch.Tensor)])


def _copy(given: Any) -> Any:
    return given.detach().clone() if isinstance(given, torch.Tensor) else given


def brings(request: Request) -> bool:
    """Whether somebody waits for what the request brings, or tells on its way."""
    return any(
        isinstance(node, Log) or (isinstance(node, Save) and node.name not in request.keeps)
        for node in request.graph.nodes
    )


def _over(why: str) -> SessionLostError:
    return SessionLostError(
        f"the session on the server is lost: {why}",
        fix="open a new one and begin again; what was saved is there",
    )
