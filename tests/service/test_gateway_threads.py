"""Threads for what blocks: what they do comes back, they are no more than so many, none stays."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator

import httpx
import pytest

from tests.leftovers import running, threads_started
from tests.service.gate import House, bearer, live
from weft.service.gateway.threads import Threads

NAME = "gateway work"


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads(3)
    yield threads
    threads.close()
    assert threads.running == 0


def test_what_work_returns_and_raises(threads: Threads) -> None:
    async def main() -> None:
        assert await threads.run(threading.get_ident) != threading.get_ident()
        with pytest.raises(ZeroDivisionError):
            await threads.run(lambda: 1 // 0)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await threads.run(lambda: next(iter(())))
        assert await threads.run(lambda: 7) == 7

    asyncio.run(main())


def test_one_thread_does_what_comes_one_after_the_other(threads: Threads) -> None:
    async def main() -> set[int]:
        return {await threads.run(threading.get_ident) for _ in range(100)}

    assert len(asyncio.run(main())) == 1


def test_no_more_than_so_many_at_once(threads: Threads) -> None:
    gate, lock, inside = threading.Barrier(3), threading.Lock(), [0, 0]

    def work() -> int:
        with lock:
            inside[0] += 1
            inside[1] = max(inside)
        gate.wait(60)  # until three are here
        with lock:
            inside[0] -= 1
        return 1

    async def main() -> int:
        return sum(await asyncio.gather(*[threads.run(work) for _ in range(9)]))

    assert asyncio.run(main()) == 9
    assert inside == [0, 3]
    assert threads.running == 3


def test_who_is_cancelled_leaves_its_thread_to_others(threads: Threads) -> None:
    held = threading.Event()

    async def main() -> int:
        task = asyncio.create_task(threads.run(lambda: held.wait(60)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        held.set()
        return await threads.run(lambda: 7)

    assert asyncio.run(main()) == 7


def test_a_loop_that_is_gone_is_no_matter(threads: Threads) -> None:
    held = threading.Event()

    async def leave() -> None:
        task = asyncio.create_task(threads.run(lambda: held.wait(60)))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(leave())
    held.set()

    async def again() -> int:
        return await threads.run(lambda: 7)

    assert asyncio.run(again()) == 7


def test_they_start_again_after_their_end(threads: Threads) -> None:
    async def main() -> int:
        first = await threads.run(lambda: 1)
        threads.close()
        assert threads.running == 0
        return first + await threads.run(lambda: 1)

    assert asyncio.run(main()) == 2


def test_forgotten_threads_end() -> None:
    async def main() -> None:
        await Threads(2).run(lambda: None)
        assert len(running(started, NAME)) == 1

    with threads_started() as started:
        asyncio.run(main())
    gc.collect()
    for thread in running(started, NAME):
        thread.join(60)
    assert not running(started, NAME)


def test_a_server_leaves_no_thread_behind() -> None:
    house = House()
    with live(house) as url:
        assert httpx.get(f"{url}/api/jobs", headers=bearer(), timeout=60).status_code == 200
        assert house.app.gateway.threads.running > 0
    assert house.app.gateway.threads.running == 0
