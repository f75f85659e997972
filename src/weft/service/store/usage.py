"""What a store counts of each owner: a part of a `Ledger`. Rows are `jobs.usage.Usage`.

What jobs use is added in the transaction of the step that ends them, so that it is there exactly if
the job is over. The gateway adds what it counts itself, about once a second.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from msgspec import Struct

from weft.service.jobs.usage import Usage


class Space(Struct, frozen=True):
    """Bytes that the worker of a model has for jobs: now, and at the most. As it measured them."""

    model: str
    free: int
    most: int
    measured: float = 0.0


class UsageRows(Protocol):
    """The part of a `Ledger` that is about what was used, and what there is to be used."""

    def put_space(self, space: Space) -> None:
        """The last one of a model counts. Durable when the next step of a job is."""
        ...

    def space(self, model: str) -> Space | None: ...

    def add_usage(self, rows: Iterable[Usage]) -> None:
        """Adds to what is there. Durable when the next step of a job is."""
        ...

    def usage(self, owner: str | None = None, since: str = "", until: str = "9") -> list[Usage]:
        """What an owner (None: everybody) used from one day to another, both counted; by day,
        owner and model."""
        ...
