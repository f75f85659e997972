"""What a store keeps about the models of a server besides their cards: how much memory each one's
worker takes, as measured, and which ones were deployed while the server ran.

    ledger.put_memory(WorkerMemory(model="tiny", host=310 << 20, need=300 << 20))
    ledger.memory("tiny").used             # when a job of it was begun or ended last

Two parts of a `Ledger`: the fleet writes both, the gateway reads the first and writes the second.
"""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct


class WorkerMemory(Struct, frozen=True, kw_only=True):
    """The worker of a model, as it was measured last. It outlives restarts. Bytes, seconds.

    `host` and `device` are what it takes now (0: there is no process), `peak` the most of `host`
    since it was loaded, `need` and `need_device` what it took right after it was loaded last, which
    is what the next load will need. `weights` are the bytes of the model's tensors, `loaded` how
    many of them are in memory, `cached` how many bytes of its `files` the system has in its page
    cache. `free` and `free_device` are what this machine had left when that was measured.
    `measured` and `used` (a job of it began or ended) are seconds since 1970. `of` says what the
    measures are of: a deployment with another text is another one. `own`: it is of the server's own
    configuration, not deployed by key.
    """

    model: str
    of: str = ""
    state: str = "cold"
    pinned: bool = True
    own: bool = True
    host: int = 0
    device: int = 0
    peak: int = 0
    need: int = 0
    need_device: int = 0
    weights: int = 0
    loaded: int = 0
    files: int = 0
    cached: int = 0
    free: int = 0
    free_device: int = 0
    load_seconds: float = 0.0
    measured: float = 0.0
    used: float = 0.0


class Deployed(Struct, frozen=True):
    """A model that was deployed while the server ran. `body` is the fleet's `Deployment` as JSON:
    nothing in the store reads it. `tries` counts how often it was asked for, the last time too."""

    id: str
    body: bytes
    owner: str
    created: float
    tries: int = 0


class ModelRows(Protocol):
    """The part of a `Ledger` that is about models and memory."""

    def put_memory(self, memory: WorkerMemory) -> None:
        """Writes all of it but `used`, which jobs move. Durable when the next step of a job is."""
        ...

    def memory(self, model: str) -> WorkerMemory | None: ...

    def memories(self) -> list[WorkerMemory]: ...

    def put_deployed(self, deployed: Deployed) -> None:
        """One of the same id is replaced."""
        ...

    def deployed(self) -> list[Deployed]:
        """All of them, by id."""
        ...

    def remove_deployed(self, id: str) -> bool:
        """False: there was none."""
        ...

    def drop_card(self, model: str) -> None:
        """Removes what the checker published of a model. No error where there is nothing."""
        ...
