"""Where processes that write one file stand in line.

    door = Door(path)
    door.enter()                           # the others are outside until `leave()`
    door.leave()
    door.close()

SQLite has a writer look again after pauses that grow to a tenth of a second, so that a process that
writes without end shuts all others out. Here one of those who wait stands in the doorway and looks
into the room again and again; who has just left has to queue for the doorway behind him.

A courtesy. What keeps two writers apart is SQLite's own lock: where this one cannot be had (a file
system without locks, a process that has the file twice, one that is stopped inside) all goes on
without it.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

_DOORWAY, _ROOM = 0, 1
"""Bytes of the file. They are locked and never written."""
PAUSE = 0.0002
"""Seconds between two looks."""
PATIENCE = 5.0
"""Seconds after which one goes on without: then SQLite waits, and says what is wrong."""


class Door:
    """See the module's text. For one thread at a time, save `close`."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        self._lock = threading.Lock()
        self._inside = self._closed = self._shut = False

    def enter(self) -> None:
        """Waits until nobody else is inside, or for `PATIENCE`."""
        with self._lock:
            if self._closed:
                return
            self._inside = True
        try:
            until = time.monotonic() + PATIENCE
            with suppress(OSError):
                try:
                    if self._take(_DOORWAY, until):
                        self._take(_ROOM, until)
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

    def _take(self, byte: int, until: float) -> bool:
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            except (BlockingIOError, PermissionError):  # another has it: EAGAIN, or EACCES
                if time.monotonic() >= until:
                    return False
                time.sleep(PAUSE)
            else:
                return True

    def _give(self, byte: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)
