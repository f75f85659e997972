"""Where processes that write one file stand in line.

    door = Door(path)
    door.enter()                           # the others are outside until `leave()`
    door.leave()
    door.close()

SQLite has a writer look again after pauses that grow to a tenth of a second, so that a process that
writes without end shuts all others out. Here the kernel wakes them, and whoever waits longest goes
first: he stands in the doorway, and who has just left has to queue behind him.

A courtesy. What keeps two writers apart is SQLite's own lock: where this one cannot be had (a file
system without locks, a process that has the file twice) all goes on without it.
"""

from __future__ import annotations

import fcntl
import os
import threading
from contextlib import suppress
from pathlib import Path

_DOORWAY, _ROOM = 0, 1
"""Bytes of the file. They are locked and never written."""


class Door:
    """See the module's text. For one thread at a time, save `close`."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        self._lock = threading.Lock()
        self._inside = self._closed = self._shut = False

    def enter(self) -> None:
        """Waits until nobody else is inside."""
        with self._lock:
            if self._closed:
                return
            self._inside = True
        try:
            with suppress(OSError):
                self._take(_DOORWAY)
                try:
                    self._take(_ROOM)
                finally:
                    self._give(_DOORWAY)
        except BaseException:  # Ctrl-C
            self.leave()
            raise

    def leave(self) -> None:
        if not self._inside:
            return
        with suppress(OSError):
            self._give(_ROOM)
        with self._lock:
            self._inside = False
            self._end()

    def close(self) -> None:
        """Whoever is inside closes it when he leaves."""
        with self._lock:
            self._closed = True
            self._end()

    def _end(self) -> None:
        if self._closed and not self._inside and not self._shut:
            self._shut = True
            os.close(self._file)

    def _take(self, byte: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, byte)

    def _give(self, byte: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)
