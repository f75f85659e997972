"""`Session`: several traces that share values, `with model.session():`.

    with model.session():
        with model.trace("The capital of France is"):
            france = model.model.layers[1].output[:, -1]      # no .save()
        with model.trace("The capital of Italy is"):
            model.model.layers[1].output[:, -1] = france
            logits = model.lm_head.output.save()

Each trace runs when it closes, so that an optimiser can step between two of them. Values that
somebody still holds then can be used later in the session (`trace.carry`).
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from weft.errors import RecordingError, UnknownOptionError
from weft.trace.carry import Carry, Kept
from weft.trace.current import current
from weft.trace.lines import user_line, where

from .where import Place, Remote, checked

if TYPE_CHECKING:
    from .handle import Handle
    from .tracer import Tracer

_SESSION: ContextVar[Session | None] = ContextVar("weft_session", default=None)


class Session:
    """What `model.session()` gives."""

    def __init__(self, handle: Handle, remote: Remote) -> None:
        self._handle = handle
        self.remote = remote
        """Where the traces of its model run that do not say so themselves: False or "local"."""
        self.kept = Kept()
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
        return self

    def __exit__(self, *error: Any) -> None:
        self._open = False
        if _SESSION.get() is self:
            _SESSION.set(None)
        self.kept.forget()

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
    """`model.session(...)`. Raises `UnknownOptionError` where it would be on a server."""
    asked = checked(remote)
    chosen = handle._places.default if asked is None else asked
    if chosen not in (False, "local"):
        raise UnknownOptionError(
            f"remote={chosen!r}: a session runs on this machine; sessions on a server, whose "
            "values stay there between traces, do not exist yet",
            line=where(user_line()),
            fix="model.session(remote=False), or traces on the server without a session, which "
            "bring back what they save",
        )
    return Session(handle, chosen)


def remote_of(handle: Handle, remote: Remote) -> Remote:
    """Where a trace runs: what it says itself, else what its session says."""
    session = session_here()
    if remote is None and session is not None and session._handle._root is handle._root:
        return session.remote
    return remote


def join(tracer: Tracer, place: Place) -> None:
    """Makes a trace part of the session that it is opened in. What is on a server stays there."""
    session = session_here()
    if session is not None and place.kind != "server":
        tracer._carry = Carry(tracer._recorder, session.kept)
