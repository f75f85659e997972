"""Wakes those who wait for news in the store: the gateway's bell, and a clock besides.

Whoever waits names a job, clears its `Waiter`, looks into the store, and waits: a ring between
looking and waiting is not lost. At a ring the store is asked once for all the jobs waited for, and
only those are woken whose job has a new note; who follows a job's notes gets what is new with it.
So a ring costs a hundred followers little more than one. The bell is read only while somebody
waits, so no task is left behind when nobody does.

    with watch.attend(job) as waiter:
        while True:
            waiter.clear()
            ...                          # look
            await waiter.over(5.0)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from weft.service.store.bells import Bell

POLL_SECONDS = 0.25
"""How long a lost ring may cost."""
GATHER_SECONDS = 0.005
"""Rings within so long after another are answered together, where many wait."""
EACH_SECONDS = 0.000_1
"""For each who waits so much of it: about what it costs to look for one of them."""


class Follow(NamedTuple):
    """What a follower has: the notes of a job up to a number. `inline` is as in `events.follow`."""

    job: str
    after: int
    inline: int = 0


Ask = Callable[
    [Collection[str], Sequence[Follow]], Awaitable[tuple[Mapping[str, int], Sequence[Any]]]
]
"""The number of the last note of each of these jobs (one that is gone is not in it), and what is
new for each of these followers, or None."""

_GONE = -1


class Waiter:
    """Somebody who waits for news of one job, or for any news."""

    def __init__(self, job: str | None) -> None:
        self.job = job
        self._seen: int | None = None
        self._event = asyncio.Event()
        self.follows: Follow | None = None
        self._brought: tuple[Follow, Any] | None = None

    def has(self, after: int, inline: int) -> None:
        """Before waiting: its follower has the notes up to a number."""
        assert self.job is not None
        self.follows = Follow(self.job, after, inline)

    def brought(self) -> Any:
        """What was brought of the notes beyond those that the follower has, or None."""
        brought, self._brought = self._brought, None
        return brought[1] if brought is not None and brought[0] == self.follows else None

    def bring(self, follows: Follow, news: Any) -> None:
        """What is new for one who had what `follows` says."""
        self._brought = follows, news

    def clear(self) -> None:
        """Before looking: what comes from now on is news."""
        self._event.clear()

    def wake(self) -> None:
        self._event.set()

    def hear(self, note: int) -> None:
        """The job's last note has this number."""
        if note != self._seen:
            self._seen = note
            self._event.set()

    async def over(self, seconds: float) -> None:
        """Returns when there is news, or when the time is over."""
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            return


class Watch:
    """Reads one bell on behalf of many. Used by one event loop at a time."""

    def __init__(self, bell: Bell, ask: Ask) -> None:
        self._bell = bell
        self._store = ask
        self._waiters: set[Waiter] = set()
        self._asking: asyncio.Task[None] | None = None
        self._again = False
        self._clock: asyncio.TimerHandle | None = None

    def wake(self) -> None:
        """Everybody looks."""
        for waiter in self._waiters:
            waiter.wake()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiters)

    @contextmanager
    def attend(self, job: str | None = None) -> Iterator[Waiter]:
        """While somebody is here, the event loop reads the bell. Without a job every ring wakes."""
        waiter = Waiter(job)
        if not self._waiters:
            self._open()
        self._waiters.add(waiter)
        try:
            yield waiter
        finally:
            self._waiters.discard(waiter)
            if not self._waiters:
                self._close()

    def _open(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._bell, self._rung)
        self._clock = loop.call_later(POLL_SECONDS, self._tick)

    def _close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._bell)
        if self._clock is not None:
            self._clock.cancel()
        if self._asking is not None:
            self._asking.cancel()
        self._clock, self._asking, self._again = None, None, False

    def _tick(self) -> None:
        self._clock = asyncio.get_running_loop().call_later(POLL_SECONDS, self._tick)
        self._news()

    def _rung(self) -> None:
        if not self._bell.drain():  # nobody is left to ring, and that would be news for ever
            asyncio.get_running_loop().remove_reader(self._bell)
        self._news()

    def _news(self) -> None:
        """Asks the store, or once more where it is being asked: it may have looked too early."""
        self._again = True
        if self._asking is None:
            self._asking = asyncio.get_running_loop().create_task(self._ask())

    async def _ask(self) -> None:
        task = asyncio.current_task()
        try:
            while self._again:
                self._again = False
                await self._tell()
                await asyncio.sleep(min(GATHER_SECONDS, EACH_SECONDS * self.waiting))
        except Exception:  # noqa: BLE001 - of whatever kind
            self.wake()  # who looks into the store meets the error and reports it
        finally:
            if self._asking is task:
                self._asking = None

    async def _tell(self) -> None:
        asked = list(self._waiters)
        for waiter in asked:
            if waiter.job is None:
                waiter.wake()
        jobs = {waiter.job for waiter in asked if waiter.job is not None}
        follows = [one.follows for one in asked if one.follows is not None]
        found, news = await self._store(jobs, follows) if jobs else ({}, ())
        brought = dict(zip(follows, news, strict=True))
        for waiter in asked:
            if waiter.follows is not None and brought.get(waiter.follows) is not None:
                waiter.bring(waiter.follows, brought[waiter.follows])
        for waiter in asked:
            if waiter.job is not None:
                waiter.hear(found.get(waiter.job, _GONE))
