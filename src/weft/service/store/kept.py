"""How long jobs are kept, and what is known of those that are not any more."""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

from weft.service.jobs.life import Job


class Gone(Struct, frozen=True):
    """A job that was kept long enough: `ended`, and `expired` when it was forgotten."""

    id: str
    owner: str
    ended: float
    expired: float


class KeptRows(Protocol):
    """The part of a `Ledger` that is about jobs that are over."""

    def keep(self, id: str, seconds: float) -> Job:
        """Keeps a job for so many seconds after its end. Raises `NoSuchError`."""
        ...

    def forget(self, now: float, keep_seconds: float) -> list[Job]:
        """Removes jobs that were kept long enough after their end (`Job.keep`, or `keep_seconds`
        where it says nothing), and returns them, so that objects can go too. `gone` knows them."""
        ...

    def gone(self, id: str) -> Gone | None:
        """A job that `forget` removed."""
        ...

    def drop_gone(self, before: float) -> None:
        """Forgets that there were jobs that were forgotten before a time."""
        ...

    def recent(self, model: str, limit: int = 50) -> list[Job]:
        """The jobs of a model that were done last, newest first."""
        ...
