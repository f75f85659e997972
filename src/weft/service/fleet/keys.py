"""The key of this machine's own user: who starts a server need not carry it to the client.

On loopback the server makes one and leaves it, with its address, in a file that only this user can
read; clients find it there. The same key stays in the data folder, so that a restarted server knows
its clients.

    key = add_key(ledger, "ada", now)                 # "weft_...", seen this once
    key = local_key(data, ledger, now)
    with announced("http://127.0.0.1:8765", key):
        ...                                           # clients of this user find it
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import replace

from weft.errors import SettingError
from weft.service.jobs.scopes import SCOPES
from weft.service.store.interface import Key, Ledger
from weft.service.store.keys import digest, new_key
from weft.service.store.lock import make_folder
from weft.service.store.sqlite import open_ledger
from weft.settings import state_folder

from .places import ledger_of

LOCAL_OWNER = "local"
LOCAL_FILE = "local.key"
OWNER = re.compile("[A-Za-z0-9_-]{1,64}")


def add_key(ledger: Ledger, owner: str, now: float, **fields: Any) -> str:
    """Makes a key for `owner` and returns it, the only time that it is seen.

    `fields` are those of `Key`: `scopes`, `models`, `expires`, `weight`, `limits`.
    """
    if not OWNER.fullmatch(owner):
        raise SettingError(
            f"{owner!r} is no name for a key's owner", fix="use letters, digits, - and _"
        )
    key = new_key()
    ledger.add_key(Key(owner, digest(key), now, **fields))
    return key


@contextmanager
def open_keys(data: Path) -> Iterator[Ledger]:
    """The ledger of a data folder, whether a server runs on it or not."""
    make_folder(data)
    ledger = open_ledger(ledger_of(data))
    try:
        yield ledger
    finally:
        ledger.close()


def revoke_key(ledger: Ledger, begin: str, now: float) -> None:
    """Revokes the key whose digest begins so. Raises `SettingError` where it is not one."""
    keys = ledger.keys()
    found = [key for key in keys if key.digest.startswith(begin) and not key.revoked]
    if len(found) != 1:
        raise SettingError(
            f"{len(found)} keys in force have a digest that begins with {begin!r}",
            fix="`weft keys list` shows them",
        )
    ledger.revoke(found[0].digest, now)


def local_key(data: Path, ledger: Ledger, now: float) -> str:
    """The key of the user who runs the server: that of last time, if it is still good.

    It has all scopes: whoever can read its file can read and write the data folder itself.
    """
    path = data / LOCAL_FILE
    try:
        key = path.read_text().strip()
    except FileNotFoundError:
        key = ""
    row = ledger.key(digest(key)) if key else None
    if row is not None:
        if row.scopes != SCOPES:  # of a version that had none, or fewer
            ledger.add_key(replace(row, scopes=SCOPES))
        return key
    key = add_key(ledger, LOCAL_OWNER, now, scopes=SCOPES)
    _write(path, key.encode())
    return key


class Left(msgspec.Struct, frozen=True):
    """What clients of the same user find of a server."""

    url: str
    key: str
    pid: int


@contextmanager
def announced(url: str, key: str, environ: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Leaves address and key where this user's clients look, as long as the block lasts."""
    folder = state_folder(environ) / "servers"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    parts = urlsplit(url)
    path = folder / f"{parts.hostname}-{parts.port}.json"
    mine = msgspec.json.encode(Left(url, key, os.getpid()))
    _write(path, mine)
    try:
        yield path
    finally:
        withdraw(path, mine)


def withdraw(path: Path, mine: bytes) -> None:
    """Removes the file, unless a later server at the same address has left its own."""
    try:
        if path.read_bytes() == mine:
            path.unlink()
    except FileNotFoundError:
        return


def _write(path: Path, data: bytes) -> None:
    """A file of this user only, there whole or not at all. Only one server at a time writes it."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)  # of one that was killed here
    fd = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
    draft.replace(path)
