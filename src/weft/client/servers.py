"""`Server`: what this process knows of one server, shared by all that ask it.

server = server_at(True)            # the configured one; the same object each time
close()                             # at the end: no connection stays open
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from weft.settings import Settings, load
from weft.wire.messages import Hello

from .find import Place, find
from .transport import sync_client


class Server:
    """One server, as this process knows it. Safe to use from several threads.

    hello: its handshake, once it was made. holds: digests of constants that it has of ours.
    resolved: which of its models stands for a handle's. `transport` replaces the network in tests.
    """

    def __init__(
        self,
        place: Place,
        settings: Settings,
        transport: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.place = place
        self.settings = settings
        self.transport = transport
        self.clock = clock
        self.hello: Hello | None = None
        self.holds: set[str] = set()
        self.resolved: dict[Any, Any] = {}
        self._client: Any = None
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return self.place.url

    def client(self) -> Any:
        """The `httpx.Client` that all threads share; its connections are kept alive."""
        with self._lock:
            if self._client is None:
                self._client = sync_client(self.url, self.settings, self.transport)
            return self._client

    def finds_key(self) -> bool:
        """Whether there is a key now where there was none: the server has started since."""
        if self.place.key is not None:
            return False
        self.place = find(self.url, self.settings)
        return self.place.key is not None

    def close(self) -> None:
        """Closes the connections; the next call opens new ones."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def __repr__(self) -> str:
        return f"<Server at {self.url}>"


_SERVERS: dict[tuple[Place, Settings, int], Server] = {}
_LOCK = threading.Lock()


def server_at(asked: bool | str | Server, settings: Settings | None = None) -> Server:
    """The server that `remote=asked` means."""
    if isinstance(asked, Server):
        return asked
    settings = settings or load()
    key = find(asked, settings), settings, os.getpid()  # a forked child needs sockets of its own
    with _LOCK:
        found = _SERVERS.get(key)
        if found is None:
            found = _SERVERS[key] = Server(key[0], settings)
    return found


@atexit.register
def close() -> None:
    """Closes the connections to all servers."""
    with _LOCK:
        mine = [key for key in _SERVERS if key[2] == os.getpid()]
        servers = [_SERVERS.pop(key) for key in mine]
    for server in servers:
        server.close()
