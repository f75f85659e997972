"""One server per folder. The kernel gives the lock back however the server ends.

with lock_folder(folder):              # ServerError: another server has it
    ...

A child that was forked, not started anew, has the lock too.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weft.errors import ServerError, SettingError


@contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Makes the folder, its owner's alone, and holds it. Raises `ServerError`, and `SettingError`
    where it cannot be made."""
    make_folder(path)
    with _named(path):
        path.chmod(0o700)
        # The file stays: were it removed, two servers could each lock one of the same name.
        fd = os.open(path / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        _lock(fd, path)
        os.ftruncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
        yield
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Makes the folder, its owner's alone, where there is none. Raises `SettingError`."""
    with _named(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SettingError(
            f"{path} cannot be the data folder: {error.strerror or error}",
            fix="give another one (data)",
        ) from None


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        raise ServerError(
            f"another server (process {who}) uses the folder {path}",
            fix="end it first, or give this one a folder of its own (data)",
        ) from None
