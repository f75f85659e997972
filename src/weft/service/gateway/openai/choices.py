"""One choice of a reply: what becomes of its job, told as parts of text.

    choice = Choice(gateway, asked, sent, speaker, index=0, opening="")
    async for part in choice.parts():
        ...                         # text as it comes; the last part has a reason

Several choices go side by side: `together(choices)` gives the parts of all, each with its choice.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from weft.service.jobs.life import Job

from ..state import Gateway
from .asks import Asked
from .following import answer_of, followed
from .jobs import MINE, Sent, abandon
from .speaking import Speaker
from .spelling import Spelling
from .texts import Text

INLINE_BYTES = 65_536
"""A result of at most so many bytes comes with the answer."""


class Part(NamedTuple):
    """Some of a choice. The last one has the reason why it ended. `idle` is said where nothing else
    is to be said for a while."""

    text: str = ""
    scores: dict[str, Any] | None = None
    reason: str | None = None
    weft: dict[str, Any] | None = None
    idle: str = ""


class Choice:
    """See the module's text. `opening` is text that stands before the answer."""

    def __init__(
        self, gateway: Gateway, asked: Asked, sent: Sent, speaker: Speaker, index: int, opening: str
    ) -> None:
        self.sent = sent
        self.index = index
        self.over = False
        self.count = 0  # of tokens
        self._gateway = gateway
        self._asked = asked
        self._opening = opening
        self._text = Text(speaker.decode, sent.ids, asked.stop)
        self._spelling = Spelling(speaker, sent.ids, asked)
        self._seen = 0  # ids of the answer

    async def parts(self) -> AsyncGenerator[Part, None]:
        """What comes, up to its end; raises the error that the job ended with."""
        async with aclosing(followed(self._gateway, self.sent)) as news:
            async for one in news:
                if one.over is not None:
                    self.over = True
                    yield await self._end(one.over)
                    return
                self._seen += len(one.ids)
                text = self._open() if one.ids or self._asked.stream else ""
                text += await self._text.add(one.ids)
                yield Part(text, await self._spelling.told(one.scores, one.begun), idle=one.idle)

    def _open(self) -> str:
        opening, self._opening = self._opening, ""
        return opening

    async def _end(self, job: Job) -> Part:
        answer = await self._gateway.off(answer_of, self._gateway, self.sent, job, self._asked.tops)
        ids, self.count = answer.ids, len(answer.ids)
        ended = bool(ids) and ids[-1] in self.sent.ends
        rest = ids[self._seen : len(ids) - ended]
        text = self._open() + await self._text.add(rest) + await self._text.end()
        stopped = ended or self._text.stopped
        last = () if stopped or answer.last is None else (answer.last,)
        reason = "length" if len(ids) >= self.sent.most and not stopped else "stop"
        weft = await self._gateway.off(self._brought, job)
        return Part(text, await self._spelling.told(last), reason, weft)

    def _brought(self, job: Job) -> dict[str, Any] | None:
        """The job, for who asked for more than text; with its result, if it is small. Blocks."""
        if not self._asked.extended:
            return None
        told: dict[str, Any] = {"job": job.id, "names": [n for n in job.names if n not in MINE]}
        if told["names"] and (job.result_bytes or 0) <= INLINE_BYTES:
            result = self._gateway.objects.get(f"results/{job.id}")
            told["result"] = base64.b64encode(result).decode()
        return told

    def abandon(self) -> None:
        """Cancels what nobody waits for any more. Blocks."""
        if not self.over:
            abandon(self._gateway, self.sent, "its client went away")


async def together(
    choices: Sequence[Choice],
) -> AsyncGenerator[tuple[Choice, Part], None]:
    """The parts of all choices as they come. The first error of one ends it."""
    came: asyncio.Queue[tuple[Choice, Part | Exception | None]] = asyncio.Queue(len(choices))

    async def pump(choice: Choice) -> None:
        try:
            async with aclosing(choice.parts()) as parts:
                async for part in parts:
                    await came.put((choice, part))
            await came.put((choice, None))
        except Exception as error:  # noqa: BLE001 - it is raised again, by who asked
            await came.put((choice, error))

    tasks = [asyncio.create_task(pump(choice)) for choice in choices]
    try:
        left = len(choices)
        while left:
            choice, part = await came.get()
            if isinstance(part, Exception):
                raise part
            if part is None:
                left -= 1
            else:
                yield choice, part
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
