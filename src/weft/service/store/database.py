"""One SQLite file, shared by threads and processes. Knows transactions and versions, no jobs.

    database = Database(path, MIGRATIONS)
    with database.write() as rows:         # BEGIN IMMEDIATE ... COMMIT, or nothing of it
        rows.execute("INSERT ...")
    with database.read() as rows:
        rows.execute("SELECT ...")

Writes are of two kinds. After a durable one everything written so far survives a power cut (one
flush of the disk, about 0.4 ms; threads that write at the same time share it). Any other survives
the death of every process at once, and a power cut from the next durable one on (0.02 ms).

A connection serves one thread at a time and goes back to a pool. They must not cross a `fork`.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from weft.errors import ServerError

from .door import Door

BUSY_SECONDS = 5.0
BUSY_TIMES = 6
"""How long, and how often, to wait for another process that writes; each write takes about 1 ms."""


GROUP = 64
"""So many durable writes of different threads share one flush at most."""
OVERDUE = 0.05
"""Seconds after which a group that nobody has closed is closed by one of those in it."""


class _Group:
    """Durable writes that are one transaction; `failed` is why it came to nothing."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.size = 0
        self.over = threading.Event()
        self.failed: BaseException | None = None


class Database:
    """Connections to one file. `migrations[n]` leads from version n to n + 1."""

    def __init__(self, path: Path, migrations: Sequence[Sequence[str]]) -> None:
        self._path = path
        self._idle: dict[bool, list[sqlite3.Connection]] = {True: [], False: []}
        self._pool = threading.Lock()
        self._writer = threading.Lock()  # threads queue here; SQLite itself would have them poll
        self._queue = 0  # so many do
        self._group: _Group | None = None  # open; belongs to who has `_writer`
        self._closed = False
        _make_private(path)
        self._door = Door(path.with_name(f"{path.name}-door"))
        try:
            self._migrate(migrations)
        except sqlite3.DatabaseError as error:
            self.close()
            raise ServerError(
                f"{path} cannot be opened as a database: {error}",
                fix="move it away to begin anew, or give another folder (data)",
            ) from error
        except ServerError:
            self.close()
            raise

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """For one SELECT; several see one state of the file only inside `write`."""
        with self._connection(durable=False) as connection:
            yield connection

    @contextmanager
    def write(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it when the block ends, nothing of it when it raises.

        Where other threads wait for their turn, a durable one is kept open for those that come
        next, each a part of it that can fail by itself, and the flush is waited for together.
        """
        if durable:
            yield from self._together()
            return
        with self._turn(), self._connection(durable=False) as connection:
            self._close_group()
            self._begin(connection)
            try:
                yield connection
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                self._door.leave()

    def _begin(self, connection: sqlite3.Connection) -> None:
        """Begins to write, once no other process does. `_door.leave()` ends it."""
        self._door.enter()
        try:
            _patiently(connection, "BEGIN IMMEDIATE")
        except BaseException:
            self._door.leave()
            raise

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """While nobody else of this process writes."""
        with self._pool:
            self._queue += 1
        try:
            self._writer.acquire()
        except BaseException:  # somebody may have left a group open for us
            if self._writer.acquire(timeout=OVERDUE):
                self._close_group()
                self._writer.release()
            raise
        finally:
            with self._pool:
                self._queue -= 1
        try:
            yield
        finally:
            self._writer.release()

    def _together(self) -> Iterator[sqlite3.Connection]:
        with self._turn():
            group = self._joined()
            try:
                with one_of_many(group.connection):
                    yield group.connection
            finally:
                if not self._queue or group.size >= GROUP:
                    self._close_group()
        while not group.over.wait(OVERDUE):
            with self._turn():
                if self._group is group:
                    self._close_group()
        if group.failed is not None:
            raise group.failed

    def _joined(self) -> _Group:
        """The open group, or a new one."""
        if self._group is None:
            connection = self._taken(durable=True)
            try:
                self._begin(connection)
            except BaseException:
                self._take_back(connection, durable=True)
                raise
            self._group = _Group(connection)
        self._group.size += 1
        return self._group

    def _close_group(self) -> None:
        """Commits what is open, and lets those go on who wait for that."""
        group, self._group = self._group, None
        if group is None:
            return
        connection = group.connection
        try:
            connection.execute("COMMIT")
        except BaseException as error:  # noqa: BLE001 - each of those in it raises it
            group.failed = error
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        finally:
            self._door.leave()
            group.over.set()
            self._take_back(connection, durable=True)

    def close(self) -> None:
        """Closes what is idle now, and the rest when it comes back."""
        with self._pool:
            self._closed = True
            idle = [connection for pool in self._idle.values() for connection in pool]
            self._idle = {True: [], False: []}
        for connection in idle:
            connection.close()
        self._door.close()

    @contextmanager
    def _connection(self, durable: bool) -> Iterator[sqlite3.Connection]:
        connection = self._taken(durable)
        try:
            yield connection
        finally:
            self._take_back(connection, durable)

    def _taken(self, durable: bool) -> sqlite3.Connection:
        with self._pool:
            if self._closed:
                raise ServerError(f"{self._path} is closed")
            pool = self._idle[durable]
            connection = pool.pop() if pool else None
        return connection or _connect(self._path, durable)

    def _take_back(self, connection: sqlite3.Connection, durable: bool) -> None:
        with self._pool:
            if not self._closed:
                self._idle[durable].append(connection)
                return
        connection.close()

    def _migrate(self, migrations: Sequence[Sequence[str]]) -> None:
        with self.write() as rows:
            version = rows.execute("PRAGMA user_version").fetchone()[0]
            if version > len(migrations):
                raise ServerError(
                    f"{self._path} was written by a newer Weft (version {version} of its tables, "
                    f"this one knows {len(migrations)})",
                    fix="install that version, or give another folder (data)",
                )
            for statement in (s for step in migrations[version:] for s in step):
                rows.execute(statement)
            rows.execute(f"PRAGMA user_version = {len(migrations)}")


@contextmanager
def one_of_many(rows: sqlite3.Connection) -> Iterator[None]:
    """A part of a transaction: when it raises nothing of it happened, and the rest goes on."""
    rows.execute("SAVEPOINT one")
    try:
        yield
    except BaseException:
        rows.execute("ROLLBACK TO one")
        raise
    finally:
        rows.execute("RELEASE one")


def _make_private(path: Path) -> None:
    """Its owner's alone, before anything is in it; SQLite gives its helper files the same mode.

    A file that is there is not opened: closing it would drop the locks of this process on it.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        path.chmod(0o600)


def _connect(path: Path, durable: bool) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            _patiently(connection, "PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA temp_store = MEMORY")  # a confined process has no other place
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _patiently(connection: sqlite3.Connection, statement: str) -> None:
    """Runs a statement that another process may be in the way of."""
    for left in reversed(range(BUSY_TIMES)):
        try:
            connection.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if left == 0 or not _is_busy(error):
                raise


def is_full(error: BaseException) -> bool:
    """Whether something could not be written for want of room on the disk."""
    if isinstance(error, sqlite3.OperationalError):
        return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _is_busy(error: sqlite3.OperationalError) -> bool:
    # Extended codes such as SQLITE_BUSY_RECOVERY have the plain one in their lowest byte.
    return error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
