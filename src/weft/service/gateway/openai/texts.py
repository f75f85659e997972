"""From token ids to text, as they come: only whole characters, and nothing beyond a stop string.

    text = Text(decode, prompt_ids, stops=("\\n",))
    text.add([104, 10])         # what may be shown now
    text.end()                  # the rest

`decode(rows)` gives the texts of rows of ids. What an id adds is the difference that it makes to
the text of the ids just before it, at first those of the prompt: a tokenizer that drops a space at
the beginning of a text drops none here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

Decode = Callable[[Sequence[tuple[int, ...]]], Awaitable[tuple[str, ...]]]

WINDOW = 6
"""So many ids before are decoded along with a new one."""
HALF = "\ufffd"
"""What the text ends with while a character is not whole."""


class Text:
    """The text of an answer. `stopped`: it has come to a stop string, and ends before that."""

    def __init__(self, decode: Decode, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._ids = tuple(prompt[-WINDOW:])
        self._begin = 0  # of the ids that are decoded
        self._told = len(self._ids)  # of the ids: those before are in the text
        self._stops = stops
        self._held = ""  # may become a stop string
        self.stopped = False

    async def add(self, ids: Sequence[int]) -> str:
        """More ids; the text that they make certain."""
        self._ids = (*self._ids, *ids)
        return self._past(await self._new())

    async def end(self) -> str:
        """No more come: what was held back."""
        rest = "" if self.stopped else await self._new(last=True)
        found = self._past(rest)
        held, self._held = self._held, ""
        return found + held

    async def _new(self, last: bool = False) -> str:
        if self.stopped or self._told == len(self._ids):
            return ""
        before, now = await self._decode(
            (self._ids[self._begin : self._told], self._ids[self._begin :])
        )
        if now.endswith(HALF) and not last:
            return ""
        self._begin, self._told = max(self._begin, self._told - WINDOW), len(self._ids)
        if not now.startswith(before):  # the ids before it end in half a character
            before = before.rstrip(HALF)
        return now[len(before) :]

    def _past(self, new: str) -> str:
        """What of a text may be shown: what may be the beginning of a stop string waits."""
        whole, self._held = self._held + new, ""
        if self.stopped:
            return ""
        places = [place for place in map(whole.find, self._stops) if place >= 0]
        if places:
            self.stopped = True
            return whole[: min(places)]
        keep = max([_overlap(whole, stop) for stop in self._stops], default=0)
        cut = len(whole) - keep
        self._held = whole[cut:]
        return whole[:cut]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text begin the stop string."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
