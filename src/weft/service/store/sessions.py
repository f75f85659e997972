"""Sessions: who has one, until when its lease runs, which request of it came last.

`SessionRows` is the part of a ledger that holds them; `session_rows` has it for both stores.
"""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

from weft.errors import LimitError


class SessionsFullError(LimitError):
    """As many of an owner's sessions are open as may be at once."""


class Session(Struct, frozen=True, kw_only=True):
    """A session: values that its requests leave on the worker of a model. `until` is its lease.

    `last` is the number of its last request, `job` the job of that one.
    """

    id: str
    owner: str
    request_id: str
    model: str
    created: float
    until: float
    ended: float | None = None
    last: int = 0
    job: str | None = None

    def over(self, now: float) -> bool:
        return self.ended is not None or self.until < now


class SessionRows(Protocol):
    """The sessions of a ledger."""

    def open_session(self, session: Session, limit: int) -> Session:
        """Adds a session; or gives the one of the same owner and request id.

        Raises `SessionsFullError` when `limit` of the owner's are open already.
        """
        ...

    def session(self, id: str) -> Session | None: ...

    def seat(self, id: str, number: int, job: str, until: float) -> None:
        """A request of the session was added as `job`, or (0) its client is still there."""
        ...

    def end_session(self, id: str, now: float) -> None:
        """No error where it is over or gone."""
        ...

    def open_sessions(self, now: float) -> dict[str, int]:
        """How many sessions are open, by model; those of a model without any are left out."""
        ...

    def forget_sessions(self, before: float) -> None:
        """Removes those that were over before a time."""
        ...


def full(limit: int) -> SessionsFullError:
    return SessionsFullError(
        f"{limit} sessions of this key are open already, which is the limit (sessions)",
        fix="close one: leave its `with` block; one that was left behind ends by itself",
    )
