"""What one piece of work of the checker may take, in time and memory.

A graph is a stranger's. Its grammar bounds what it can ask for, and these are the second wall: an
alarm that interrupts the work, a watchdog behind it for work that does not come back to Python, and
a limit on the address space of the process. In a thread of a larger process none of that can be
done: `Unbounded`.

    bounds = ProcessBounds(settings)       # in the main thread of a process of its own
    bounds.limit_memory(bytes)             # beyond what it has now
    with bounds(20.0, "pricing it"):
        ...                                # raises LimitError
    bounds.tripped                         # then the process had better be replaced
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn, Protocol

from weft.errors import LimitError, TimeLimitError

WATCH = 0.25
"""The watchdog looks so often, in seconds."""
AGAIN = 0.5
"""The alarm sounds again after so many seconds, where something swallowed the first one."""


class Bounds(Protocol):
    """Bounds of pieces of work."""

    tripped: bool

    def __call__(self, seconds: float, what: str) -> AbstractContextManager[None]:
        """Raises `LimitError` where the block takes too much."""
        ...


class Unbounded:
    """No bounds: for a checker in a thread."""

    tripped = False

    def __call__(self, seconds: float, what: str) -> AbstractContextManager[None]:
        return nullcontext()


class _Alarm(BaseException):
    """Not an Exception: those are caught in places where a model may raise anything."""


class ProcessBounds:
    """Bounds of a process that does nothing else. Used in its main thread."""

    def __init__(self, die: Any = None) -> None:
        self.tripped = False
        self._die = die or (lambda: os._exit(75))
        self._deadline = math.inf  # of the work in hand, as `time.monotonic`
        self._watchdog: threading.Thread | None = None
        signal.signal(signal.SIGALRM, _sound)

    def limit_memory(self, extra: int) -> None:
        """From now on the process may have so many bytes more than it has."""
        import resource

        present = _address_space()
        if present is not None:
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (present + extra, hard))

    @contextmanager
    def __call__(self, seconds: float, what: str) -> Iterator[None]:
        self._deadline = time.monotonic() + 2 * seconds + 1
        if self._watchdog is None:
            self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._watchdog.start()
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
            try:
                yield
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except _Alarm:
            self.tripped = True
            raise TimeLimitError(
                f"{what} took more than {seconds:g} s, the server's limit (price_seconds)",
                fix="record less in one block",
            ) from None
        except MemoryError:
            self._no_memory(what)
        except RuntimeError as error:
            if "allocate memory" in str(error) or "not enough memory" in str(error):
                self._no_memory(what)
            raise
        finally:
            self._deadline = math.inf

    def _watch(self) -> None:
        """One thread for all work: to start one each time takes a tenth of what a price takes."""
        while time.monotonic() < self._deadline:
            time.sleep(WATCH)
        self._die()

    def _no_memory(self, what: str) -> NoReturn:
        self.tripped = True
        raise LimitError(
            f"{what} took more memory than the server gives it", fix="record less in one block"
        ) from None


def _sound(number: int, frame: object) -> NoReturn:
    raise _Alarm


def _address_space() -> int | None:
    """Bytes of address space of this process; None where nobody says."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
