"""Where the blocks of a handle run: `remote=` of a trace, and of a handle's constructor.

False           on this machine, on the module itself
True            on the configured server (`WEFT_HOST`, the configuration file, or the only one
                that runs on this machine)
"http://..."    on that server
"local"         on this machine, as a server would: all but the network
"auto"          on the configured server, if it has the model and answers; else on this machine
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from weft.client import sync
from weft.client.backend import Backend
from weft.client.catalog import Wanted, chosen
from weft.client.core import Talk
from weft.client.find import address, is_configured
from weft.client.loopback import LoopbackBackend
from weft.client.remote import RemoteBackend
from weft.client.servers import Server, server_at
from weft.engine.known import Known
from weft.errors import (
    ModelNotReadyError,
    OtherModelError,
    ServerAwayError,
    SettingError,
    UnknownOptionError,
    WrongModelError,
)
from weft.settings import load

Remote = bool | str | Server | None

_LOG = logging.getLogger("weft")
_NOT_THERE = (ServerAwayError, WrongModelError, ModelNotReadyError, OtherModelError)


@dataclass(frozen=True)
class Place:
    """Where a block runs. `kind` is `here`, `loop` or `server`; `text` says it to a user."""

    backend: Backend
    kind: str
    text: str


@dataclass(frozen=True)
class InPlaces:
    """What a handle lets its places know of its model: each part is asked for when needed."""

    family: str
    wanted: Callable[[], Wanted]
    known: Callable[[], Known]
    loaded: Callable[[], torch.nn.Module]


class Places:
    """The places of one handle. `default` is the one of traces that do not say."""

    def __init__(self, model: InPlaces, local: Backend, default: Remote) -> None:
        self._model = model
        self._local = Place(local, "here", "here")
        self.default = checked(default) or False
        self._auto: Place | None = None

    def wanted(self) -> Wanted:
        """Which model it is, as a server would be asked for it."""
        return self._model.wanted()

    def pick(self, remote: Remote) -> Place:
        """The place that `remote=` means. Raises `UnknownOptionError` for what means none."""
        asked = self.default if remote is None else remote
        if asked is False:
            return self._local
        asked = checked(asked)
        if asked == "local":
            return self._loop()
        if asked == "auto":
            self._auto = self._auto or self._decided()
            return self._auto
        return self._server(asked)  # type: ignore[arg-type]

    def _loop(self) -> Place:
        model = self._model
        backend = LoopbackBackend(model.known, model.loaded)
        return Place(backend, "loop", "here, as a server would")

    def _server(self, asked: bool | str | Server) -> Place:
        server = server_at(asked)
        backend = RemoteBackend(server, self._model.family, self._model.wanted)
        return Place(backend, "server", server.url)

    def _decided(self) -> Place:
        """The server, if it is there and has the model. Said once, in the log."""
        settings = load()
        if not is_configured(settings):
            return self._said(self._local, "no server is configured")
        server = server_at(True, settings)
        try:
            self._check(server)
        except _NOT_THERE as error:
            return self._said(self._local, error.message)
        return self._said(self._server(server), "it has the model")

    def _check(self, server: Server) -> None:
        wanted = self._model.wanted()
        found = sync.run(server, chosen(Talk(server, seconds=0.0), wanted))
        if found.fingerprint != wanted.fingerprint:
            raise OtherModelError(
                f"the server's {found.id} is another version of this model",
                fix="open the model from the server: LanguageModel(id, remote=True)",
            )

    def _said(self, place: Place, why: str) -> Place:
        _LOG.info("remote='auto': blocks run at %s (%s)", place.text, why)
        return place


def is_server(remote: Remote) -> bool:
    """Whether `remote=` names a server, rather than leaving it open or meaning this machine."""
    return remote is not False and checked(remote) not in (None, "local", "auto")


def checked(remote: Any) -> Remote:
    """The value of `remote=`, if it is one."""
    if remote is None or isinstance(remote, (bool, Server)) or remote in ("local", "auto"):
        return remote
    try:
        if isinstance(remote, str):
            return address(remote)
    except SettingError:
        pass
    raise UnknownOptionError(
        f"remote={remote!r} means no place",
        fix="remote is False, True, 'local', 'auto', or a server's address: 'http://...'",
    )
