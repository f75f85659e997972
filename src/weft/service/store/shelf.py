"""Objects of a server on one machine: small ones in the ledger's file, large ones in a folder.

    ledger, objects = open_store(path, folder, settings, bells)
    objects.put("results/0h5y0w2m9qk", data, durable=False)

Most requests and results are small, and a file costs two flushes of the disk. In the ledger's file
one that is put with `durable=False` costs none: it is on the disk when the row is that names it.
Which of the two has a name is decided once, by whoever puts it first.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from weft.service.store.bells import Bells
from weft.service.store.database import Database
from weft.service.store.folder import FolderObjects
from weft.service.store.names import checked, checked_prefix, checked_range
from weft.service.store.shell import Shell
from weft.service.store.sqlite import SqliteLedger
from weft.service.store.tables import MIGRATIONS
from weft.settings import Settings

SMALL = 65_536
"""Objects of at most so many bytes are rows."""


class Shelf:
    """`interface.Objects` in a database and a folder. The database is closed by its ledger."""

    def __init__(self, database: Database, folder: FolderObjects) -> None:
        self._database = database
        self._folder = folder

    @property
    def drafts(self) -> Path:
        """The folder in which this process writes what is not whole yet."""
        return self._folder.drafts

    def close(self) -> None:
        """No large object can be put any more."""
        self._folder.close()

    def clear(self) -> None:
        """Removes what processes that died had not finished."""
        self._folder.clear()

    # -- writing -----------------------------------------------------------------------------

    def put(self, name: str, data: bytes | BinaryIO, *, durable: bool = True) -> bool:
        checked(name)
        if self._folder.touch(name):
            return self._folder.put(name, b"")
        head, rest = _head_of(data)
        if rest is None:
            return self._put_small(name, head, durable)
        with self._folder.draft(_Joined(head, rest)) as draft, self._database.write() as rows:
            if self._in_rows(rows, name):
                return False
            return self._folder.link(draft, name)  # while nobody can put a small one

    def _put_small(self, name: str, data: bytes, durable: bool) -> bool:
        put = """INSERT INTO object (name, data, touched) VALUES (?, ?, ?)
            ON CONFLICT DO NOTHING"""
        with self._database.write(durable=durable) as rows:
            if self._folder.touch(name) or self._in_rows(rows, name):
                return False
            return rows.execute(put, (name, data, time.time())).rowcount == 1

    def _in_rows(self, rows: Any, name: str) -> bool:
        touch = "UPDATE object SET touched = ? WHERE name = ?"
        return rows.execute(touch, (time.time(), name)).rowcount == 1

    def delete(self, name: str) -> None:
        checked(name)
        with self._database.write(durable=False) as rows:
            gone = rows.execute("DELETE FROM object WHERE name = ?", (name,)).rowcount
        if not gone:
            self._folder.delete(name)

    def touch(self, name: str) -> bool:
        checked(name)
        if self._folder.touch(name):
            return True
        with self._database.write(durable=False) as rows:
            return self._in_rows(rows, name)

    # -- reading -----------------------------------------------------------------------------

    def get(self, name: str) -> bytes:
        found = self._row("data", name)
        return self._folder.get(name) if found is None else found

    def size(self, name: str) -> int | None:
        found = self._row("length(data)", name)
        return self._folder.size(name) if found is None else found

    def touched(self, name: str) -> float | None:
        found = self._row("touched", name)
        return self._folder.touched(name) if found is None else found

    def stream(self, name: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        checked_range(start, end)
        found = self._row("data", name)
        if found is None:
            return self._folder.stream(name, start, end)
        part = found[start:end]
        return iter((part,) if part else ())

    def names(self, prefix: str) -> list[str]:
        """`0` comes after `/`, and no name has a character in between."""
        low = checked_prefix(prefix)
        high = low[:-1] + "0" if low else "~"
        query = "SELECT name FROM object WHERE name >= ? AND name < ?"
        with self._database.read() as rows:
            found = [name for (name,) in rows.execute(query, (low, high))]
        return sorted([*found, *self._folder.names(prefix)])

    def _row(self, what: str, name: str) -> Any:
        query = f"SELECT {what} FROM object WHERE name = ?"
        with self._database.read() as rows:
            row = rows.execute(query, (checked(name),)).fetchone()
        return None if row is None else row[0]


class _Joined:
    """A file of which the first bytes were read."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head = head
        self._rest = rest

    def read(self, size: int) -> bytes:
        head, self._head = self._head[:size], self._head[size:]
        return head or self._rest.read(size)


def _head_of(data: bytes | BinaryIO) -> tuple[bytes, BinaryIO | None]:
    """All of a small object and None, or the first bytes of a large one and what comes next."""
    if isinstance(data, (bytes, bytearray, memoryview)):
        data = io.BytesIO(data)
    head = b""
    while len(head) <= SMALL:
        piece = data.read(SMALL + 1 - len(head))
        if not piece:
            return head, None
        head += piece
    return head, data


def open_store(
    path: Path, folder: Path, settings: Settings, bells: Bells
) -> tuple[SqliteLedger, Shelf]:
    """The ledger in a file and the objects beside it, or new ones. Raises `ServerError` where the
    file cannot be read."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    database = Database(path, MIGRATIONS)
    objects = Shelf(database, FolderObjects(folder))
    return SqliteLedger(database, settings, Shell(bells, objects)), objects
