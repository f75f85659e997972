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
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
from msgspec import Struct


class IsBorn(Struct, frozen=True, tag=True):
    """The process is there, and begins to load what it needs."""


class IsReady(Struct, frozen=True, tag=True):
    """The process can do its work. `device` are bytes of device memory that it has, of `all`."""

    device: int = 0
    device_all: int = 0


class IsKnown(Struct, frozen=True, tag=True):
    """The checker knows a model, whose tensors have so many bytes."""

    model: str
    weights: int


class IsLoading(Struct, frozen=True, tag=True):
    """A worker has so many bytes of its weights in memory."""

    loaded: int


class IsUsing(Struct, frozen=True, tag=True):
    """A worker has so many bytes of device memory, and so many are left."""

    device: int
    device_free: int


class IsAsked(Struct, frozen=True, tag=True):
    """Somebody asked the gateway: `look` at which models are deployed, or `evict` one."""

    what: Literal["look", "evict"]
    model: str


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


class DoServe(Struct, frozen=True, tag=True):
    """Tells the gateway that there is one more model. Both ends of its bell come with it."""

    model: str


class DoForget(Struct, frozen=True, tag=True):
    """Tells the gateway that a model is not there any more."""

    model: str


Message = (
    IsBorn
    | IsReady
    | IsUnusable
    | IsKnown
    | IsLoading
    | IsUsing
    | IsAsked
    | DoDrain
    | DoFinish
    | DoMark
    | DoServe
    | DoForget
)
MOST_FILES = 16
LOG = logging.getLogger("weft.fleet")
_DECODER = msgspec.json.Decoder(Message)


class Channel:
    """One end. Any thread may send, one reads."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._rest = b""
        self._files: list[int] = []
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

    def send(self, message: Message, files: Sequence[int] = ()) -> None:
        """No error where the other end is gone: who reads there will notice.

        `files` are open ones, of which the other side gets numbers of its own (`files`).
        """
        data = msgspec.json.encode(message) + b"\n"
        with self._lock:
            try:
                sent = socket.send_fds(self._end, [data], list(files)) if files else 0
                self._end.sendall(data[sent:])
            except (BrokenPipeError, ConnectionResetError):
                return

    def files(self, count: int) -> list[int]:
        """The next open files that came, for the message that they came with."""
        taken, self._files = self._files[:count], self._files[count:]
        if len(taken) < count:
            raise OSError("a message came without its open files")
        return taken

    def read(self) -> list[Message] | None:
        """Waits for messages. None: the other end is gone."""
        try:
            data, files, _, _ = socket.recv_fds(self._end, 65_536, MOST_FILES)
        except (ConnectionResetError, BrokenPipeError):
            return None
        self._files += files  # they come no later than the beginning of their message
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
