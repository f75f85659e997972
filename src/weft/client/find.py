"""Which server is asked, and with which key.

The address comes from the argument (`remote="http://..."`), else from the settings (`WEFT_HOST`,
the configuration file), else it is that of the only server that runs on this machine for this
user: each leaves a file with its address and key in the state folder, readable by its user only.

A key of the settings goes to the host of the settings, and to no other.
"""

from __future__ import annotations

import ipaddress
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from weft.errors import ServerAwayError, SettingError
from weft.settings import Settings, state_folder

WAY_OUT = "start one with `weft serve MODEL`, or set WEFT_HOST to the address of one that runs"


class PlainHttpWarning(UserWarning):
    """A key travels to another machine without encryption."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server is. The key is kept out of every text."""

    url: str
    key: str | None = field(default=None, repr=False)


class Left(msgspec.Struct, frozen=True):
    """What a server leaves for the clients of its user."""

    url: str
    key: str
    pid: int


def find(asked: bool | str, settings: Settings, environ: Mapping[str, str] | None = None) -> Place:
    """The place of the server. Raises `ServerAwayError` where none is configured or runs here."""
    if isinstance(asked, str):
        return _at(address(asked), settings, environ)
    if settings.host is not None:
        return _at(address(settings.host), settings, environ)
    here = list(running(environ))
    if not here:
        raise ServerAwayError("no server is configured, and none runs on this machine", fix=WAY_OUT)
    if len(here) > 1:
        raise SettingError(
            f"{len(here)} servers run on this machine: {', '.join(left.url for left in here)}",
            fix="say which: remote='http://...', or WEFT_HOST",
        )
    return Place(here[0].url, settings.key or here[0].key)


def is_configured(settings: Settings, environ: Mapping[str, str] | None = None) -> bool:
    """Whether `remote=True` would know whom to ask."""
    return settings.host is not None or len(list(running(environ))) == 1


def address(text: str) -> str:
    """An address as it is used: scheme, host, port, and a path where a server lies below one."""
    parts = urlsplit(text)
    right = parts.scheme in ("http", "https") and parts.hostname
    if not right or parts.username or parts.query or parts.fragment:
        raise SettingError(
            f"{text!r} is not the address of a server", fix="such as http://127.0.0.1:8765"
        )
    return text.rstrip("/")


def is_loopback(url: str) -> bool:
    """Whether an address is on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def running(environ: Mapping[str, str] | None = None) -> Iterator[Left]:
    """Servers of this user that run on this machine."""
    folder = state_folder(environ) / "servers"
    for path in sorted(folder.glob("*.json")):
        left = _read(path)
        if left is not None and _lives(left.pid):
            yield left


def _at(url: str, settings: Settings, environ: Mapping[str, str] | None) -> Place:
    own = settings.host is None or address(settings.host) == url
    key = settings.key if own else None
    if key is None and is_loopback(url):
        key = next((left.key for left in running(environ) if left.url.rstrip("/") == url), None)
    if key is not None and url.startswith("http://") and not is_loopback(url):
        warnings.warn(
            f"the key goes to {url} without encryption; use https://",
            PlainHttpWarning,
            stacklevel=2,
        )
    return Place(url, key)


def _read(path: Path) -> Left | None:
    """What a file says; None for one that went away, is another user's, or is no such file."""
    try:
        if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
            return None
        return msgspec.json.decode(path.read_bytes(), type=Left)
    except (OSError, msgspec.DecodeError):
        return None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return pid > 0
    return pid > 0
