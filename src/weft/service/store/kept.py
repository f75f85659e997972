"""How long jobs are kept, how much they take, and what is known of those that are not any more."""

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


def bytes_of(job: Job, told: int) -> int:
    """What lies in the store of a job; `told` are the bytes of its notes, which count at its end.

    A request goes when its job is over; that of a session may have to be run again.
    """
    if job.ended is None:
        return job.request_bytes
    asked = job.request_bytes if job.session else 0
    return asked + (job.result_bytes or 0) + told


class KeptRows(Protocol):
    """The part of a `Ledger` that is about jobs that are over, and about what jobs take."""

    def kept_bytes(self, owner: str) -> int:
        """`bytes_of` all jobs of an owner. It is kept up to date, and so costs nothing to ask."""
        ...

    def first_ended(self, owner: str) -> Job | None:
        """The job of an owner that is over for longest."""
        ...

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
