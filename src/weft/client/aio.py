"""The driver for asyncio: carries out the same steps with `httpx.AsyncClient`.

A conversation has a client of its own, closed at its end: nothing outlives the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, TypeVar

from .effects import Answer, Broken, Give, HttpCall, More, Pieces, Shut, Sleep, Steps, Turns
from .servers import Server
from .transport import async_client, httpx, timeout

T = TypeVar("T")


async def run(server: Server, steps: Steps[T], hear: Callable[[Any], object] | None = None) -> T:
    """Carries out all steps; `hear` is told what they give on the way."""
    turns = Turns(steps)
    async for _ in _each(server, turns, hear or (lambda value: None)):
        pass
    return turns.value


def each(server: Server, steps: Steps[Any]) -> AsyncGenerator[Any, None]:
    """Carries out the steps, and gives what they give."""
    return _each(server, Turns(steps), None)


async def _each(server: Server, turns: Turns[Any], hear: Any) -> AsyncGenerator[Any, None]:
    client = async_client(server.url, server.settings, server.transport)
    hands = _Hands(server, client, hear)
    try:
        while not turns.over:
            if type(turns.wants) is Give and hear is None:
                yield turns.wants.value
                turns.go_on()
                continue
            answer, error = await hands.try_to(turns.wants)
            turns.go_on(answer, error)
            del answer, error  # an error leads to all frames that it passed
    finally:
        await hands.shut()
        await client.aclose()
        turns.leave()


class _Hands:
    """Carries out single steps; holds the stream that is open."""

    def __init__(self, server: Server, client: Any, hear: Any) -> None:
        self.server = server
        self.client = client
        self.hear = hear
        self.stream: Any = None
        self.pieces: Any = None

    async def try_to(self, effect: Any) -> tuple[Any, BaseException | None]:
        try:
            return await self.do(effect), None
        except BaseException as error:  # noqa: BLE001, also a cancelled task: the steps decide
            return None, error

    async def do(self, effect: Any) -> Any:
        try:
            match effect:
                case HttpCall():
                    return await self.call(effect)
                case More():
                    return await anext(self.pieces, b"")
                case Sleep():
                    return await asyncio.sleep(effect.seconds)
                case Shut():
                    return await self.shut()
                case Give():
                    return self.hear(effect.value)
        except httpx().TransportError as error:
            await self.shut()
            raise Broken(f"{type(error).__name__}: {error}") from None
        raise AssertionError(f"no step is a {type(effect).__name__}")

    async def call(self, call: HttpCall) -> Answer:
        request = self.client.build_request(
            call.method,
            call.path,
            headers=call.headers,
            content=_later(call.body) if isinstance(call.body, Pieces) else call.body,
            timeout=timeout(self.server.settings, call.seconds),
        )
        response = await self.client.send(request, stream=call.stream)
        headers = dict(response.headers)
        if not call.stream:
            return Answer(response.status_code, headers, response.content)
        self.stream = response
        if response.status_code < 300:
            self.pieces = response.aiter_raw()
            return Answer(response.status_code, headers)
        body = await response.aread()
        await self.shut()
        return Answer(response.status_code, headers, body)

    async def shut(self) -> None:
        stream, self.stream, self.pieces = self.stream, None, None
        if stream is not None:
            await stream.aclose()


async def _later(pieces: Pieces) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
