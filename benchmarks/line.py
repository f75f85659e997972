"""A third driver for the steps of the client, beside `weft.client.sync` and `aio`: a connection of
its own that is kept, and as little between it and the steps as asyncio allows.

    end = await Line(server).run(jobs.follow(Talk(server), parcel, body))

It is for generating load on the cores that the server needs itself. It speaks what our gateway
speaks, to the loopback address, and no more of HTTP.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar
from urllib.parse import urlsplit

from weft.client.effects import Answer, Broken, Give, HttpCall, More, Shut, Sleep, Steps, Turns
from weft.client.servers import Server

T = TypeVar("T")

PIECE = 1 << 20
LAST_SECONDS = 1.0
"""How long a stream that is left may take to end; else the connection is given up."""


class Line:
    """One user's connection. One conversation at a time."""

    def __init__(self, server: Server) -> None:
        parts = urlsplit(server.url)
        self._host, self._port = parts.hostname, parts.port
        self._reader: Any = None
        self._writer: Any = None
        self._in_stream = False

    async def run(self, steps: Steps[T]) -> T:
        """Carries out all steps; what they give on the way nobody hears."""
        turns = Turns(steps)
        try:
            while not turns.over:
                try:
                    answer, error = await self._do(turns.wants), None
                except Exception as failure:  # noqa: BLE001, the steps decide
                    answer, error = None, failure
                turns.go_on(answer, error)
            return turns.value
        finally:
            turns.leave()

    async def _do(self, effect: Any) -> Any:
        try:
            match effect:
                case HttpCall():
                    return await self._call(effect)
                case More():
                    return await self._chunk()
                case Shut():
                    return await self._leave_stream()
                case Sleep():
                    return await asyncio.sleep(effect.seconds)
                case Give():
                    return None
        except (OSError, EOFError, TimeoutError) as error:
            self.close()
            raise Broken(f"{type(error).__name__}: {error}") from None
        raise AssertionError(f"no step is a {type(effect).__name__}")

    async def _call(self, call: HttpCall) -> Answer:
        if self._reader is None or self._reader.at_eof():
            self.close()
            self._reader, self._writer = await asyncio.open_connection(
                self._host, self._port, limit=PIECE
            )
        assert isinstance(call.body, bytes)
        lines = [f"{call.method} {call.path} HTTP/1.1", f"host: {self._host}:{self._port}"]
        lines += [f"{name}: {value}" for name, value in call.headers.items()]
        lines.append(f"content-length: {len(call.body)}\r\n\r\n")
        self._writer.write("\r\n".join(lines).encode() + call.body)
        async with asyncio.timeout(call.seconds):
            status, headers = head_of(await self._reader.readuntil(b"\r\n\r\n"))
            self._in_stream = headers.get("transfer-encoding") == "chunked"
            if call.stream and status < 300:
                return Answer(status, headers)
            return Answer(status, headers, await self._body(headers))

    async def _body(self, headers: dict[str, str]) -> bytes:
        if not self._in_stream:
            return await self._reader.readexactly(int(headers.get("content-length", "0")))
        pieces = []
        while piece := await self._chunk():
            pieces.append(piece)
        return b"".join(pieces)

    async def _chunk(self) -> bytes:
        if not self._in_stream:
            return b""
        size = int(await self._reader.readuntil(b"\r\n"), 16)
        piece = await self._reader.readexactly(size + 2)
        self._in_stream = size > 0
        return piece[:-2]

    async def _leave_stream(self) -> None:
        """To its end, which is near: the connection is wanted again."""
        try:
            async with asyncio.timeout(LAST_SECONDS):
                while self._in_stream:
                    await self._chunk()
        except TimeoutError:
            self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None
        self._in_stream = False


def head_of(data: bytes) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer, names in lower case."""
    first, *lines = data.decode("latin-1").split("\r\n")
    pairs = [line.partition(":") for line in lines if line]
    return int(first.split(" ", 2)[1]), {name.lower(): value.strip() for name, _, value in pairs}
