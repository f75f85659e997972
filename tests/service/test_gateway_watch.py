"""Who is woken by a ring: those whose job has news, and nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest

from weft.service.gateway import watch as module
from weft.service.gateway.watch import Follow, Watch
from weft.service.store.bells import Bell

Answer = tuple[Mapping[str, int], list[Any]]


class Store:
    """Numbers of last notes, and how often they were asked for."""

    def __init__(self) -> None:
        self.notes: dict[str, int] = {}
        self.asked = 0
        self.fails = False

    async def ask(self, ids: Collection[str], follows: Sequence[Follow]) -> Answer:
        self.asked += 1
        await asyncio.sleep(0)
        if self.fails:
            raise OSError("the disk is away")
        late = [self.notes.get(one.job, 0) > one.after for one in follows]
        news = [
            f"{one} anew" if is_late else None for one, is_late in zip(follows, late, strict=True)
        ]
        return {id: self.notes[id] for id in ids if id in self.notes}, news


@pytest.fixture
def store() -> Store:
    return Store()


async def woken(watch: Watch, bell: Bell, jobs: list[str | None], act) -> list[bool]:
    """Who of these is woken by what `act` does and a ring after it, once all have heard before."""
    entered = [watch.attend(job) for job in [*jobs, "another"]]
    waiters = [one.__enter__() for one in entered]
    *others, last = waiters
    last.hear = lambda note: last.wake()  # when it has heard, all the others have
    try:
        bell.ring()
        await asyncio.gather(*[one.over(60) for one in waiters])
        for one in waiters:
            one.clear()
        act()
        bell.ring()
        await asyncio.wait_for(last.over(120), 60)
        return [one._event.is_set() for one in others]
    finally:
        for one in entered:
            one.__exit__(None, None, None)


def test_only_those_with_news_look(store: Store) -> None:
    store.notes = {"a": 1, "b": 1, "c": 4}

    def act() -> None:
        store.notes |= {"b": 2}
        del store.notes["c"]

    with Bell.pair() as bell:
        watch = Watch(bell, store.ask)
        found = asyncio.run(woken(watch, bell, ["a", "b", "b", "c", None], act))
        assert found == [False, True, True, True, True]  # a job that is gone is news
        assert watch.waiting == 0


def test_a_hundred_followers_cost_one_question(store: Store) -> None:
    jobs = [str(number) for number in range(100)]
    store.notes = dict.fromkeys(jobs, 1)
    before = []
    with Bell.pair() as bell:
        watch = Watch(bell, store.ask)
        asyncio.run(woken(watch, bell, list(jobs), lambda: before.append(store.asked)))
    assert store.asked - before[0] <= 2


def test_a_lost_ring_costs_a_moment(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)

    async def run() -> None:
        with Bell.pair() as bell, Watch(bell, store.ask).attend("a") as waiter:
            for number in range(3):
                waiter.clear()
                store.notes["a"] = number
                await asyncio.wait_for(waiter.over(120), 60)
                assert waiter._event.is_set()

    asyncio.run(run())


def test_news_while_the_store_is_asked_is_not_lost(store: Store) -> None:
    async def run() -> None:
        with Bell.pair() as bell:
            watch = Watch(bell, ask)
            with watch.attend("a") as waiter:
                bell.ring()
                await asyncio.wait_for(begun.wait(), 60)
                store.notes["a"] = 7  # behind the question that is on its way
                bell.ring()
                await asyncio.sleep(0.01)
                goes_on.set()
                await waiter.over(60)
                waiter.clear()
                await waiter.over(60)
                assert waiter._seen == 7

    begun, goes_on = asyncio.Event(), asyncio.Event()

    async def ask(ids: Collection[str], follows: Sequence[Follow]) -> Answer:
        found = await store.ask(ids, follows)
        begun.set()
        await goes_on.wait()
        return found

    asyncio.run(run())


def test_who_cannot_be_told_looks(store: Store) -> None:
    store.notes = {"a": 1}

    def act() -> None:
        store.fails = True

    with Bell.pair() as bell:
        assert asyncio.run(woken(Watch(bell, store.ask), bell, ["a"], act)) == [True]


def test_what_is_new_comes_with_the_ring_and_is_not_believed_twice(store: Store) -> None:
    async def run() -> None:
        with Bell.pair() as bell:
            watch = Watch(bell, store.ask)
            with watch.attend("a") as waiter, watch.attend("b") as other:
                waiter.has(3, 10)
                other.has(0, 0)
                assert waiter.brought() is None and other.brought() is None
                waiter.clear()
                store.notes = {"a": 4}
                bell.ring()
                await waiter.over(60)
                assert waiter.brought() == f"{Follow('a', 3, 10)} anew"
                assert waiter.brought() is None, "once"
                waiter.clear()
                store.notes = {"a": 5}
                bell.ring()
                await waiter.over(60)
                waiter.has(5, 10)
                assert waiter.brought() is None, "it has looked itself meanwhile"
                assert other.brought() is None

    asyncio.run(run())
