"""The app on a listening socket: uvicorn, without its signals, its log lines and its defaults.

    server = Server(make_app(...), listening, ready=lambda: print("ready"))
    server.run()                           # until finish(), SIGTERM or SIGINT

`drain` and `finish` may be called from any thread. A finished server takes no new connections,
lets go of those who follow jobs (they resume elsewhere), and answers what it has in hand.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from .app import App
from .protocol import Protocol

LAST_SECONDS = 5
"""How long requests in hand may take after the server was told to end."""
HEADER_BYTES = 64 << 10
"""Bytes of a request's line and headers together; more is a 400."""
BACKLOG = 512


class Server(uvicorn.Server):
    """One server, run once."""

    def __init__(
        self, app: App, listening: socket.socket, ready: Callable[[], None] | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                access_log=False,
                backlog=BACKLOG,
                date_header=True,
                h11_max_incomplete_event_size=HEADER_BYTES,
                http=Protocol,
                lifespan="on",
                log_config=None,
                loop="asyncio",
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=LAST_SECONDS,
                ws="none",
            )
        )
        self._app = app
        self._listening = listening
        self._ready = ready or (lambda: None)
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run([self._listening] if sockets is None else sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        # inherited by every connection; asyncio sets it only where it knows that the socket is TCP,
        # and without it each reply waits 40 ms for its own second half
        self._listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await super().startup(sockets)
        self._app.gateway.connected = lambda: len(self.server_state.connections)
        self._ready()

    def drain(self) -> None:
        """Takes no new jobs from now on."""
        self._app.gateway.drain()

    def finish(self) -> None:
        """Ends soon."""
        self.should_exit = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._app.gateway.close)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.finish()
