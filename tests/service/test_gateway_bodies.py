"""Bodies as they come: what is held of them meanwhile, and what is there when they are whole."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from tests.service.gate import House
from weft.service.gateway.bodies import LARGE, Bound, held

PIECE = 64 << 10
BOUND = Bound(1 << 30, "body_bytes")


def coming(
    number: int, pieces: int, last: asyncio.Event, when_last: Callable[[], object] = lambda: None
) -> Request:
    """A request whose body comes in pieces, each a new one; the last when it is let."""
    left = pieces

    async def receive() -> dict[str, Any]:
        nonlocal left
        left -= 1
        if not left:
            when_last()
            await last.wait()
        body = bytes([number]) * PIECE
        return {"type": "http.request", "body": body, "more_body": left > 0}

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
    return Request(scope, receive)


def test_bodies_on_their_way_take_no_memory_of_their_size(tmp_path: Path) -> None:
    count, pieces = 16, 64  # 64 MiB in all
    house = House()
    house.app.gateway.scratch = str(tmp_path)
    seen: list[bytes] = []
    waiting: list[int] = []
    all_wait = asyncio.Event()

    def waits(number: int) -> None:
        waiting.append(number)
        if len(waiting) == count:
            all_wait.set()

    async def whole(number: int, last: asyncio.Event) -> None:
        request = coming(number, pieces, last, lambda: waits(number))
        async with held(house.app.gateway, request, BOUND) as data:
            seen.append(data[:1] + data[-1:])
            assert len(data) == pieces * PIECE
            await asyncio.sleep(0)

    async def all_at_once() -> int:
        last = asyncio.Event()
        tasks = [asyncio.create_task(whole(number, last)) for number in range(count)]
        before, _ = tracemalloc.get_traced_memory()
        async with asyncio.timeout(60):
            await all_wait.wait()
        now, _ = tracemalloc.get_traced_memory()
        last.set()
        await asyncio.gather(*tasks)
        return now - before

    tracemalloc.start()
    try:
        taken = asyncio.run(all_at_once())
    finally:
        tracemalloc.stop()
    assert sorted(seen) == [bytes([n, n]) for n in range(count)]
    assert taken < (count + 4) * LARGE


@pytest.mark.parametrize("pieces", [1, 15, 16, 17, 40])
def test_a_body_is_whole_whatever_its_size(pieces: int, tmp_path: Path) -> None:
    house = House()
    house.app.gateway.scratch = str(tmp_path)

    async def whole() -> bytes:
        last = asyncio.Event()
        last.set()
        async with held(house.app.gateway, coming(7, pieces, last), BOUND) as data:
            return data

    assert asyncio.run(whole()) == b"\7" * (pieces * PIECE)
    assert list(tmp_path.iterdir()) == []
