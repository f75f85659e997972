"""What one gateway has: its store, its bells, its settings. No global state anywhere here.

A handler is `handler(gateway, visit) -> Response`. What may take more than a moment (the store,
files, hashes) is done on a thread, so that the event loop stays free for others: a handler that is
a plain function is called there, whole; one that waits is `async` and goes there by `gateway.off`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

from msgspec import Struct
from starlette.requests import Request

from weft.service.jobs.usage import settings_for
from weft.service.store.bells import Bells
from weft.service.store.interface import Key, Ledger, Objects
from weft.settings import Settings
from weft.wire.messages import Limits

from .graphs import Graphs
from .meter import Meter, Stored
from .tallies import Tallies
from .threads import Threads
from .watch import Watch

T = TypeVar("T")
Order = Literal["look", "evict"]

THREADS = 8
"""At most so many calls into the store at once; more wait."""


@dataclass(kw_only=True)
class Gateway:
    """Everything a handler works with.

    `models` are the ids that this server has, loaded or not; `order` asks whoever has their
    processes to `look` at what is deployed, or to `evict` one (None: nobody has). `scratch` is the
    folder for uploads that are not whole yet (None: the system's own). `sandbox`: whether
    strangers' graphs are drawn inside walls, in a word (None: nobody knows).
    """

    ledger: Ledger
    objects: Objects
    bells: Bells
    settings: Settings
    models: tuple[str, ...]
    version: str
    watch: Watch
    routes: tuple[Any, ...] = ()  # the table, for those who describe it
    scratch: str | None = None
    sandbox: str | None = None
    order: Callable[[Order, str], None] | None = None
    clock: Callable[[], float] = time.time
    started: float = field(default_factory=time.monotonic)
    draining: bool = False
    closing: bool = False
    large: asyncio.Lock = field(default_factory=asyncio.Lock)  # for reading what is large
    threads: Threads = field(default_factory=lambda: Threads(THREADS))
    graphs: Graphs = field(default_factory=Graphs)  # of sessions
    looking: threading.Lock = field(default_factory=threading.Lock)
    looked: tuple[float, dict[str, str]] = (-1e9, {})  # when health was looked at, what was found
    born: float = field(default_factory=time.time)
    connected: Callable[[], int] = lambda: 0  # how many connections are open
    paces: dict[str, tuple[float, float | None]] = field(default_factory=dict)  # by model, until
    speakers: dict[str, tuple[str, Any]] = field(default_factory=dict)  # tokenizers, by model

    def __post_init__(self) -> None:
        self.meter = Meter(self.ledger, lambda: self.clock())
        self.store = Stored(self.objects)
        self.tallies = Tallies(self.ledger)

    async def off(self, work: Callable[..., T], *args: Any, **options: Any) -> T:
        """Does blocking work on a thread."""
        return await self.threads.run(partial(work, *args, **options))

    def drain(self) -> None:
        """Takes no new jobs from now on; everything else goes on."""
        self.draining = True

    def close(self) -> None:
        """Lets go of those who follow a job, so that the server can end: they resume elsewhere."""
        self.draining = self.closing = True
        self.watch.wake()


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One request, after key, query and protocol were checked.

    `key` is the one that it came with, which has the scope that the route needs, and `owner` who
    that stands for; None and empty where none is needed. `id` is the request's id, which stands in
    the log, in the reply's header and in errors.
    """

    request: Request
    query: Struct
    owner: str
    id: str
    key: Key | None = None


def limits_for(gateway: Gateway, key: Key | None) -> Settings:
    """The settings as they are for a key."""
    return gateway.settings if key is None else settings_for(gateway.settings, key.limits)


def limits_of(settings: Settings) -> Limits:
    """The limits, as the handshake states them."""
    return Limits(**{name: getattr(settings, name) for name in Limits.__struct_fields__})
