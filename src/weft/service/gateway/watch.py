"""Wakes those who wait for news in the store: the gateway's bell, and a clock besides.

Whoever waits takes a `turn` first, then looks into the store, then waits for the turn to end: a
ring between looking and waiting is not lost. The bell is read only while somebody waits, so no
task is left behind when nobody does.

    with watch.attend():
        while True:
            turn = watch.turn()
            ...                          # look
            await turn.over(0.5)
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from weft.service.store.bells import Bell


class Turn:
    """The time between two rings."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def end(self) -> None:
        self._event.set()

    async def over(self, seconds: float) -> None:
        """Returns at the next ring, or when the time is over."""
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            return


class Watch:
    """Reads one bell on behalf of many."""

    def __init__(self, bell: Bell) -> None:
        self._bell = bell
        self._turn: Turn | None = None
        self._waiting = 0

    def turn(self) -> Turn:
        """The turn that lasts now."""
        if self._turn is None:
            self._turn = Turn()
        return self._turn

    def wake(self) -> None:
        """Ends the turn: everybody looks."""
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.end()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return self._waiting

    @contextmanager
    def attend(self) -> Iterator[None]:
        """While somebody is here, the event loop reads the bell."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.add_reader(self._bell, self._rung)
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1
            if not self._waiting:
                loop.remove_reader(self._bell)
                self._turn = None

    def _rung(self) -> None:
        if not self._bell.drain():  # nobody is left to ring, and that would be news for ever
            asyncio.get_running_loop().remove_reader(self._bell)
        self.wake()
