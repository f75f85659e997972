"""For tests against a live server: modules that wait, a proxy that cuts, what a process holds.

with DOOR.closed():                  # real passes through a `Gate` stop there
    ...
with Proxy(server.url) as proxy:     # remote=proxy.url
    proxy.cuts = [5000]              # after so many more bytes of answers it breaks, once
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

PATIENCE = 60.0
"""Seconds after which what does not happen counts as never happening."""
MOMENT = 0.5
"""Of a door before each of a hundred gates: nearly a minute in which a test can step in."""


class Door:
    """Lets passes of `Gate`s through, or not. `reached` is set once one stands before it."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._seconds = PATIENCE
        self.reached = threading.Event()

    def open(self, *_: Any) -> None:
        self._open.set()

    @contextlib.contextmanager
    def closed(self, seconds: float = PATIENCE) -> Iterator[Door]:
        """Until it is opened, or the block is left; nobody waits longer than `seconds`."""
        self._seconds = seconds
        self._open.clear()
        self.reached.clear()
        try:
            yield self
        finally:
            self._open.set()

    def go_through(self) -> None:
        self.reached.set()
        self._open.wait(self._seconds)


DOOR = Door()


class Gate(nn.Module):
    """Gives what it gets; a real pass (not one that only learns shapes) waits for the door."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor:
            DOOR.go_through()
        return x * 1


def plain_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def gated_net() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 8), Gate(), nn.Linear(8, 2)).eval()


def slow_net() -> nn.Sequential:
    """A hundred gates: with a door that is closed for a `MOMENT` only, a pass takes its time."""
    return nn.Sequential(*[Gate() for _ in range(100)]).eval()


# -- the way to a server -------------------------------------------------------------------------


class Proxy:
    """Passes bytes on to a server, in one thread; counts them `up` and `down`.

    `cuts`: after so many more bytes from the server the connection that they come on breaks; then
    the next number counts.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = parts.hostname, parts.port
        self.cuts: list[int] = []
        self.up = self.down = self.connections = 0

    def __enter__(self) -> Proxy:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._other: dict[socket.socket, socket.socket] = {}
        self._servers: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping = True
        self._thread.join()
        while self._other:
            self._break(next(iter(self._other)))
        self._selector.close()
        self._listening.close()

    def _run(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select(0.05):
                one: Any = key.fileobj
                if one is self._listening:
                    self._accept()
                elif one in self._other:
                    self._pass_on(one)

    def _accept(self) -> None:
        client, _ = self._listening.accept()
        server = socket.create_connection(self._target)
        self.connections += 1
        self._servers.add(server)
        for one, other in ((client, server), (server, client)):
            self._other[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _pass_on(self, one: socket.socket) -> None:
        try:
            data = one.recv(1 << 16)
            if one in self._servers:
                data, over = self._cut(data)
                self.down += len(data)
            else:
                over = not data
                self.up += len(data)
            self._other[one].sendall(data)
        except OSError:
            over = True
        if over:
            self._break(one)

    def _cut(self, data: bytes) -> tuple[bytes, bool]:
        if not self.cuts:
            return data, not data
        self.cuts[0] -= len(data)
        if self.cuts[0] > 0:
            return data, not data
        left = len(data) + self.cuts.pop(0)
        return data[:left], True

    def _break(self, one: socket.socket) -> None:
        for each in (one, self._other[one]):
            self._selector.unregister(each)
            self._servers.discard(each)
            del self._other[each]
            each.close()


# -- what is left --------------------------------------------------------------------------------

_SERVERS_OWN = ("AnyIO worker", "asyncio_", "gateway work", "pulse")
"""Threads that the server keeps for later, or that end with a job."""


def held() -> set[Any]:
    """Threads of this process, and what it has open: sockets, pipes, files."""
    threads = {t for t in threading.enumerate() if not t.name.startswith(_SERVERS_OWN)}
    return threads | set(_open())


def _open() -> Iterator[str]:
    for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208, it is no tree of files
        with contextlib.suppress(OSError):
            yield str(Path(f"/proc/self/fd/{fd}").readlink())


def check_nothing_left(before: set[Any]) -> None:
    """Raises AssertionError with what is held now and was not `before`; the server may need a
    moment to see that a connection is closed, and others in the process come and go."""
    until = time.monotonic() + PATIENCE
    while left := held() - before:
        assert time.monotonic() < until, left
        time.sleep(0.01)


def soon(true: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Waits until something is so. Raises AssertionError where it never is."""
    until = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < until, "it does not happen"
        time.sleep(0.01)
    return found
