"""The line between the fleet and each of its processes: a socket pair with messages as JSON lines.

It is a life-line, too. When the fleet is gone, by `kill -9` as well, the process reads its end and
ends itself; when the process is gone, the fleet reads the end and starts another.

    ours, theirs = Channel.pair()
    ours.send(DoFinish())
    theirs.read()                          # [DoFinish()]; None at the end
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable

import msgspec
from msgspec import Struct


class IsBorn(Struct, frozen=True, tag=True):
    """The process is there, and begins to load what it needs."""


class IsReady(Struct, frozen=True, tag=True):
    """The process can do its work."""


class IsUnusable(Struct, frozen=True, tag=True):
    """A worker cannot load its model."""

    reason: str


class DoDrain(Struct, frozen=True, tag=True):
    """Take no new work from outside."""


class DoFinish(Struct, frozen=True, tag=True):
    """End, after what is in hand."""


class DoMark(Struct, frozen=True, tag=True):
    """Tells the checker how the worker of a model is."""

    model: str
    state: str
    reason: str | None = None


Message = IsBorn | IsReady | IsUnusable | DoDrain | DoFinish | DoMark
LOG = logging.getLogger("weft.fleet")
_DECODER = msgspec.json.Decoder(Message)


class Channel:
    """One end. Any thread may send, one reads."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._rest = b""
        self._lock = threading.Lock()

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        one, other = socket.socketpair()
        return cls(one), cls(other)

    @classmethod
    def of(cls, fd: int) -> Channel:
        """The end that was inherited under this number."""
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, message: Message) -> None:
        """No error where the other end is gone: who reads there will notice."""
        with self._lock:
            try:
                self._end.sendall(msgspec.json.encode(message) + b"\n")
            except (BrokenPipeError, ConnectionResetError):
                return

    def read(self) -> list[Message] | None:
        """Waits for messages. None: the other end is gone."""
        try:
            data = self._end.recv(65_536)
        except (ConnectionResetError, BrokenPipeError):
            return None
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [_DECODER.decode(line) for line in lines]

    def close(self) -> None:
        self._end.close()


def follow(channel: Channel, act: Callable[[Message], None]) -> None:
    """In a process of the fleet: does what it says, on a thread, and ends with it."""

    def listen() -> None:
        status = 1
        try:
            while (messages := channel.read()) is not None:
                for message in messages:
                    act(message)
            status = 0
        except Exception:
            LOG.exception("a message of the fleet could not be obeyed")
        finally:
            os._exit(status)

    threading.Thread(target=listen, name="life-line", daemon=True).start()
