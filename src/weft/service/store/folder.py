"""Objects in a folder: each name is a file, whole or not there, on the disk when `put` returns.

A file is written under `.new/`, flushed, and then linked to its name, which fails where the name is
taken: so the first whole one stays, whoever is killed when. See decision 0006 for why this is our
own and not an object store's local backend. The file system must know hard links.

    objects = FolderObjects(folder / "objects")
    objects.put("results/0h5y0w2m9qk", file)
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from weft.service.store.names import checked, checked_prefix, checked_range

PIECE = 1 << 20
"""Bytes that are held at once."""

NEW = ".new"
"""Where files are written; no object's name begins with a dot."""


class Readable(Protocol):
    """What bytes are read from."""

    def read(self, size: int, /) -> bytes: ...


class FolderObjects:
    """`interface.Objects` in a folder, which several processes may have open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        _folder(path)
        _folder(path / NEW)
        self.clear()
        self._new, lock = _own_folder(path / NEW)
        self._leave = weakref.finalize(self, _leave, self._new, lock, os.getpid())

    @property
    def drafts(self) -> Path:
        """The folder in which this process writes what is not whole yet."""
        return self._new

    def close(self) -> None:
        """Nothing can be put any more. It happens by itself when the store is not used any more."""
        self._leave()

    def clear(self) -> None:
        """Removes what processes that died had not finished; opening does it, too."""
        _clear(self._path / NEW)

    # -- writing -----------------------------------------------------------------------------

    def put(self, name: str, data: bytes | BinaryIO, *, durable: bool = True) -> bool:
        if self.touch(name):
            return self._there(self._place(name))
        with self.draft(data) as draft:
            return self.link(draft, name)

    @contextmanager
    def draft(self, data: bytes | Readable) -> Iterator[Path]:
        """A file with these bytes, on the disk. It is gone when the block ends, if it was not
        linked."""
        draft = self._new / secrets.token_hex(16)
        try:
            _write(draft, data)
            yield draft
        finally:
            draft.unlink(missing_ok=True)

    def link(self, draft: Path, name: str) -> bool:
        """Gives a draft its name. False: that was taken already."""
        place = self._place(name)
        self._folders(place.parent)
        try:
            place.hardlink_to(draft)
        except FileExistsError:
            return self._there(place)
        _flush_folder(place.parent)
        return True

    def _there(self, place: Path) -> bool:
        _flush_folder(place.parent)  # who put it may not have come to that yet
        return False

    def _folders(self, folder: Path) -> None:
        """Makes a folder of names, and those above it, to stay."""
        if not folder.is_dir():
            self._folders(folder.parent)
            folder.mkdir(mode=0o700, exist_ok=True)
            _flush_folder(folder.parent)

    def delete(self, name: str) -> None:
        self._place(name).unlink(missing_ok=True)

    def touch(self, name: str) -> bool:
        try:
            os.utime(self._place(name))
        except FileNotFoundError:
            return False
        return True

    # -- reading -----------------------------------------------------------------------------

    def get(self, name: str) -> bytes:
        try:
            return self._place(name).read_bytes()
        except FileNotFoundError:
            raise KeyError(name) from None

    def size(self, name: str) -> int | None:
        found = self._stat(name)
        return None if found is None else found.st_size

    def touched(self, name: str) -> float | None:
        found = self._stat(name)
        return None if found is None else found.st_mtime

    def stream(self, name: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        checked_range(start, end)
        size = self.size(name)
        if size is None:
            raise KeyError(name)
        return self._pieces(name, start, size if end is None else min(end, size))

    def _pieces(self, name: str, at: int, end: int) -> Iterator[bytes]:
        try:
            file = self._place(name).open("rb", buffering=0)
        except FileNotFoundError:
            raise KeyError(name) from None
        with file:
            file.seek(at)
            while at < end and (piece := file.read(min(PIECE, end - at))):
                yield piece
                at += len(piece)

    def names(self, prefix: str) -> list[str]:
        folder = self._path / checked_prefix(prefix)
        found: list[str] = []
        for above, below, files in os.walk(folder):
            below[:] = [name for name in below if name != NEW]
            found += [Path(above, file).relative_to(self._path).as_posix() for file in files]
        return sorted(found)

    def _stat(self, name: str) -> os.stat_result | None:
        try:
            return self._place(name).stat()
        except FileNotFoundError:
            return None

    def _place(self, name: str) -> Path:
        return self._path / checked(name)


def _write(path: Path, data: bytes | Readable) -> None:
    """Writes a new file, its owner's alone, and flushes it to the disk."""
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(fd, "wb", buffering=0) as file:
        for piece in _pieces_of(data):
            _write_all(file, piece)
        os.fsync(fd)


def _pieces_of(data: bytes | Readable) -> Iterator[bytes]:
    if isinstance(data, (bytes, bytearray, memoryview)):
        yield data
        return
    while piece := data.read(PIECE):
        yield piece


def _write_all(file: BinaryIO, piece: bytes) -> None:
    rest = memoryview(piece).cast("B")
    while rest:
        rest = rest[file.write(rest) :]


def _flush_folder(folder: Path) -> None:
    """So that the names in it are on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _folder(path: Path) -> None:
    """There, and its owner's alone."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)


# -- files that were never finished ----------------------------------------------------------------
# Each open store writes in a folder of its own below `.new/` and holds a lock on it, which the
# kernel releases when the process dies: a folder that is not locked is nobody's.


def _own_folder(new: Path) -> tuple[Path, int]:
    while True:
        mine = new / f"{os.getpid()}-{time.time_ns()}-{secrets.token_hex(4)}"
        mine.mkdir(mode=0o700)
        lock = _locked(mine)
        if lock is not None:
            return mine, lock
        # Another process took it for a dead one's before it was locked: again.


def _leave(mine: Path, lock: int, process: int) -> None:
    if os.getpid() == process:  # a forked child's copy of the store owns nothing
        shutil.rmtree(mine)
    os.close(lock)


def _clear(new: Path) -> None:
    """Removes what processes that died had not finished."""
    for folder in new.iterdir():
        lock = _locked(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A lock on a folder. None: another has it, or the folder is gone."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.exists():
            return fd
    except BlockingIOError:
        pass
    os.close(fd)
    return None
