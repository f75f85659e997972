"""What the fleet says to have a process made, and how the process gets its open files. No torch.

An order goes over a socket with the files in its ancillary data: the channel, where to write logs,
both ends of each bell (gateway, checker, one for each model), and for a gateway the listening
socket.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Literal

import msgspec
from msgspec import Struct

from weft.service.store.bells import Bell, Bells
from weft.settings import Settings

from .channel import Channel
from .models import Deployment
from .process import call_me

MOST_BYTES, MOST_FILES = 1 << 16, 250
KIND = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_DGRAM
"""Sockets that keep messages apart, each with its own files."""


class Spec(Struct, frozen=True, kw_only=True):
    """What a process is to be. `holder` is the name under which it claims jobs."""

    name: str
    role: Literal["gateway", "checker", "worker"]
    holder: str
    data: str
    settings: dict[str, bool | int | float | str | None]
    models: tuple[Deployment, ...]
    model: str | None = None
    version: str = ""


class DoMake(Struct, frozen=True, tag=True):
    """Make a process; its open files come with the message."""

    spec: Spec


class DoKill(Struct, frozen=True, tag=True):
    """End the process at once."""

    name: str


class Forked(Struct, frozen=True, tag=True):
    """A process was made; `name` is its holder's."""

    name: str
    pid: int


class Exited(Struct, frozen=True, tag=True):
    """A process ended. `status` is negative for a signal."""

    name: str
    status: int


Order = DoMake | DoKill


def send(control: socket.socket, order: Order, fds: list[int] | None = None) -> None:
    socket.send_fds(control, [msgspec.json.encode(order)], fds or [])


def receive(control: socket.socket) -> tuple[Order | None, list[int]]:
    """The next order and its files. None: the fleet is gone."""
    data, fds, _, _ = socket.recv_fds(control, MOST_BYTES, MOST_FILES)
    return (msgspec.json.decode(data, type=Order) if data else None), fds


class Given:
    """The files of a process, as what they are."""

    def __init__(self, spec: Spec, fds: list[int]) -> None:
        channel, log, *rest = fds
        self.channel = Channel.of(channel)
        self._log = log
        count = 2 + len(spec.models)
        pairs = [Bell.of(rest[2 * n], rest[2 * n + 1]) for n in range(count)]
        ids = [model.id for model in spec.models]
        self.bells = Bells(pairs[0], pairs[1], dict(zip(ids, pairs[2:], strict=True)))
        self.rest = rest[2 * count :]

    def take_over(self, role: str) -> None:
        """This process has that role from now on, and its output goes to the fleet."""
        call_me(f"weft:{role}")
        for standard in (1, 2):
            os.dup2(self._log, standard)
        os.close(self._log)


def settings_of(spec: Spec) -> Settings:
    return Settings(**spec.settings)  # type: ignore[arg-type]


def alone(argv: list[str]) -> tuple[Spec, Given]:
    """In a process that was started for one order: that order. `argv`: the socket's number."""
    with socket.socket(fileno=int(argv[0])) as control:
        order, fds = receive(control)
    if not isinstance(order, DoMake):
        sys.exit(0)  # the fleet is gone
    given = Given(order.spec, fds)
    given.take_over(order.spec.role)
    return order.spec, given
