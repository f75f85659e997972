"""The life of a job: a table of states and events with no fallback. Pure: no clock, no socket.

    received --Priced--> queued --Leased--> running --Finished--> done
        |                   ^                  |---Failed-------> failed
        |                   |                  |---Stopped------> cancelled
        |                   +------Lost--------|  (fewer than `attempts` so far; else failed)
        +--Refused--> failed

`Cancel` ends a job that waits at once, and marks one that runs (its worker then says `Stopped`).

    step(job, Priced(...), now) -> Change(job, commands)

An event that the table does not have for a state raises `IllegalStepError`, with the job's history.
"""

from __future__ import annotations

from msgspec import Struct

STATES = ("received", "queued", "running", "done", "failed", "cancelled")
FINAL = frozenset({"done", "failed", "cancelled"})


class Job(Struct, frozen=True, kw_only=True):
    """A job at rest. `error` and `price` are wire messages as JSON: nothing here reads them.

    `names` are what it saves, `stages` seconds by stage, `token` the claim of who has it now.
    Objects: `submits/<id>` is the request as it came, `results/<id>` the result file.
    """

    id: str
    owner: str
    request_id: str
    model: str
    created: float
    state: str = "received"
    look: bool = False
    cancelling: bool = False
    attempts: int = 0  # how often a worker began it
    pricings: int = 0  # how often the checker began it
    holder: str | None = None
    token: str | None = None
    until: float | None = None
    since: float = 0.0  # when the state began
    price: bytes | None = None
    cost: float = 0.0
    error: bytes | None = None
    result_bytes: int | None = None
    result_sha256: str | None = None
    names: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()  # digests, so that they are kept while it waits
    stages: dict[str, float] = {}
    ended: float | None = None
    history: tuple[str, ...] = ()  # the last events, for messages


class Priced(Struct, frozen=True, kw_only=True, tag=True):
    price: bytes
    cost: float
    names: tuple[str, ...]


class Refused(Struct, frozen=True, tag=True):
    """The checker will not have it."""

    error: bytes


class Leased(Struct, frozen=True, tag=True):
    """Somebody claims it: the checker a received job, a worker a queued one."""

    holder: str
    token: str
    until: float


class Lost(Struct, frozen=True, tag=True):
    """Who had it died, or was silent for too long. `error` is what it fails with, if it fails."""

    attempts: int  # how many are allowed
    error: bytes


class Finished(Struct, frozen=True, kw_only=True, tag=True):
    result_bytes: int
    result_sha256: str
    names: tuple[str, ...]


class Failed(Struct, frozen=True, tag=True):
    error: bytes


class Cancel(Struct, frozen=True, tag=True):
    """The owner wants no more of it."""

    error: bytes


class Stopped(Struct, frozen=True, tag=True):
    """Its worker left it because it is to be cancelled."""

    error: bytes


Event = Priced | Refused | Leased | Lost | Finished | Failed | Cancel | Stopped
