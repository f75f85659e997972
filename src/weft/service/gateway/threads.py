"""Threads for what blocks. As `loop.run_in_executor`, at half its price: a call goes to a thread
and comes back with one wake-up each, and nothing else is built around it.

    threads = Threads(8)
    found = await threads.run(lambda: ledger.job(id))
    threads.close()

Threads are started as they are needed. Context variables do not cross; nothing here has any.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
Work = Callable[[], Any]
Tell = Callable[[Any], None]
Queue = SimpleQueue[tuple[Work, asyncio.Future[Any]] | None]
"""What is to be done, and who waits for it; None ends one thread."""


class Threads:
    """At most `most` calls at once; more wait. Used by one event loop at a time."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._queue: Queue = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []
        weakref.finalize(self, _end, self._queue, self._threads)

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. Who is cancelled meanwhile does not stop it."""
        future = asyncio.get_running_loop().create_future()
        if not self._idle.acquire(blocking=False) and len(self._threads) < self._most:
            self._start()
        self._queue.put((work, future))
        return await future

    def _start(self) -> None:
        thread = threading.Thread(
            target=_work, args=(self._queue, self._idle), name="gateway work", daemon=True
        )
        thread.start()
        self._threads.append(thread)

    @property
    def running(self) -> int:
        """How many threads there are."""
        return sum(thread.is_alive() for thread in self._threads)

    def close(self, seconds: float = 5.0) -> None:
        """Ends the threads, and waits for what they have in hand. A later call starts new ones."""
        _end(self._queue, self._threads)
        for thread in self._threads:
            thread.join(seconds)
        self._threads.clear()
        self._idle = threading.Semaphore(0)


def _end(queue: Queue, threads: list[threading.Thread]) -> None:
    for _ in threads:
        queue.put(None)


def _work(queue: Queue, idle: threading.Semaphore) -> None:
    """One thread. It knows the queue only, so that its `Threads` can be forgotten."""
    while (item := queue.get()) is not None:
        work, future = item
        tell, what = _done(work, future)
        idle.release()  # before anybody hears of it: who asks again then finds this thread
        _tell(future, tell, what)
        del item, work, future, tell, what  # nothing of it is kept until the next one


def _done(work: Work, future: asyncio.Future[Any]) -> tuple[Tell, Any]:
    """How to tell what became of it, and what to tell."""
    try:
        return future.set_result, work()
    except StopIteration as error:  # no future can hold one
        return future.set_exception, RuntimeError(f"the work raised {error!r}")
    except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
        return future.set_exception, error


def _tell(future: asyncio.Future[Any], tell: Tell, what: Any) -> None:
    try:
        future.get_loop().call_soon_threadsafe(_settle, future, tell, what)
    except RuntimeError:  # the loop is closed: nobody waits any more
        return


def _settle(future: asyncio.Future[Any], tell: Tell, what: Any) -> None:
    if not future.done():  # it may have been cancelled
        tell(what)
