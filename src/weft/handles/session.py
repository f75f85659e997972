"""`Session`: several traces that share values, `with model.session():`.

    with model.session():
        with model.trace("The capital of France is"):
            france = model.model.layers[1].output[:, -1]      # no .save()
        with model.trace("The capital of Italy is"):
            model.model.layers[1].output[:, -1] = france
            logits = model.lm_head.output.save()

Each trace runs when it closes, so that an optimiser can step between two of them. Values that
somebody still holds then can be used later in the session (`trace.carry`). In a session on a server
they stay there (`trace.away`), and so do parameters that are trained (`trace.trained`, `steps`).
"""

from __future__ import annotations

from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from weft.client.session import SessionBackend
from weft.errors import RecordingError, UnknownOptionError
from weft.trace.carry import Carry, Kept
from weft.trace.current import current
from weft.trace.lines import user_line, where
from weft.trace.trained import Trained

from .optimizers import Steps
from .where import Place, Remote, checked

if TYPE_CHECKING:
    from .handle import Handle
    from .tracer import Tracer

_SESSION: ContextVar[Session | None] = ContextVar("weft_session", default=None)


class Session:
    """What `model.session()` gives."""

    def __init__(self, handle: Handle, remote: Remote, served: bool = False) -> None:
        self._handle = handle
        self.remote = remote
        """Where the traces of its model run that do not say so themselves."""
        self.kept = Kept()
        self.trained = Trained() if served else None
        """On a server: the client tensors that are trained there."""
        self._steps = None if self.trained is None else Steps(self.trained)
        self._rooms: dict[tuple[str, int], SessionBackend] = {}
        self._stack = ExitStack()
        self._entered = False
        self._open = False

    def __enter__(self) -> Session:
        line = where(user_line())
        if session_here() is not None:
            raise RecordingError(
                "a session was opened inside another one",
                line=line,
                fix="use the outer one: values flow between all of its traces",
            )
        if current() is not None:
            raise RecordingError(
                "a session was opened inside a block",
                line=line,
                fix="open the session first, and traces inside it",
            )
        if self._entered:
            raise RecordingError(
                "a session was opened a second time", line=line, fix="call model.session() again"
            )
        self._entered = self._open = True
        _SESSION.set(self)
        if self.trained is not None and self._steps is not None:
            self._stack.enter_context(self.trained.watching())
            self._stack.enter_context(self._steps.watching())
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._end(error)
        finally:
            self._stack.close()
            self._open = False
            if _SESSION.get() is self:
                _SESSION.set(None)
            self.kept.forget()

    def _end(self, error: BaseException | None) -> None:
        """Brings home what was trained, and lets the servers go on; raises what failed unheard."""
        failures: list[BaseException] = []
        for act in (self._home, *[partial(r.close, error is None) for r in self._rooms.values()]):
            try:
                act()
            except BaseException as failure:  # noqa: BLE001 (all are ended)
                failures.append(failure)
        if failures and error is None:
            raise failures[0]
        if failures and error is not None:
            error.add_note(f"and when the session ended: {failures[0]}")

    def _home(self) -> None:
        if self.trained is None or self._steps is None:
            return
        try:
            self.trained.all_home()
            self._steps.all_home()
        except BaseException as failure:
            if left := len(self.trained):
                failure.add_note(
                    f"{left} tensors that were trained on the server keep the numbers that they "
                    "had here last"
                )
            raise

    def room(self, handle: Handle, place: Place) -> SessionBackend:
        """The part of the session that a model of a server has."""
        backend: Any = place.backend
        key = place.text, id(handle._root)
        if key not in self._rooms:
            self._rooms[key] = SessionBackend(backend)
        return self._rooms[key]

    def __len__(self) -> int:
        """How many values it keeps that were not saved."""
        return len(self.kept)

    def __bool__(self) -> bool:
        return True


def session_here() -> Session | None:
    """The open session of this task."""
    session = _SESSION.get()
    return session if session is not None and session._open else None


def open_session(handle: Handle, remote: Remote) -> Session:
    """`model.session(...)`. Raises `UnknownOptionError` for a place that there is not."""
    asked = checked(remote)
    chosen = handle._places.default if asked is None else asked
    return Session(handle, chosen, served=handle._places.pick(chosen).kind == "server")


def remote_of(handle: Handle, remote: Remote) -> Remote:
    """Where a trace runs: what it says itself, else what its session says."""
    session = session_here()
    if remote is None and session is not None and session._handle._root is handle._root:
        return session.remote
    return remote


def join(tracer: Tracer, place: Place) -> None:
    """Makes a trace part of the session that it is opened in. In one of this machine a trace that
    runs on a server brings back what it saves, and nothing else."""
    session = session_here()
    if session is None or (place.kind == "server" and session.trained is None):
        return
    if place.kind == "server":
        if getattr(place.backend, "keep_seconds", None) is not None:
            raise UnknownOptionError(
                "keep_seconds: the requests of a session are kept together, as long as any",
                fix="leave it out, or run the block outside of the session",
            )
        room = session.room(tracer._handle, place)
        tracer._place = replace(place, backend=room)
        tracer._recorder.space = room
    tracer._carry = Carry(tracer._recorder, session.kept)
