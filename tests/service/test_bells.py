"""Bells: rung from threads and processes, heard with poll and asyncio."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time

import pytest

from tests.leftovers import only_here
from weft.service.jobs.life import DropSubmit, Note, Ring
from weft.service.store.bells import Bell, Bells
from weft.service.store.memory import MemoryObjects
from weft.service.store.shell import Shell

from .jobs import job


@pytest.fixture
def bell():
    with Bell.pair() as made:
        yield made


def pipe(fd: int) -> int | None:
    """Which pipe has this number now: another thread may have taken it for its own at once."""
    try:
        return os.fstat(fd).st_ino
    except OSError:
        return None


def test_a_ring_is_heard_once(bell):
    assert not bell.wait(0)
    bell.ring()
    bell.ring()
    assert bell.wait(0)
    assert not bell.wait(0)


def test_a_ring_from_another_thread_wakes_who_waits(bell):
    heard: list[bool] = []
    waiting = threading.Thread(target=lambda: heard.append(bell.wait(60.0)))
    waiting.start()
    bell.ring()
    waiting.join()
    assert heard == [True]


def test_a_bell_that_nobody_hears_never_blocks(bell):
    for _ in range(100_000):  # more than a pipe holds
        bell.ring()
    assert bell.wait(0)
    assert not bell.wait(0)


def test_a_bell_with_nobody_there_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    with Bell.of(None, writing) as bell:
        bell.ring()
        with pytest.raises(ValueError, match="no reading end"):
            bell.wait(0)


def test_who_waits_does_not_spin_when_all_who_ring_are_gone(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", only_here(slept.append, time.sleep))
    reading, writing = os.pipe()
    os.close(writing)
    with Bell.of(reading, None) as bell:
        bell.ring()
        assert not bell.wait(60.0)
    assert len(slept) == 1


def test_the_last_rings_of_who_is_gone_are_heard():
    reading, writing = os.pipe()
    held = pipe(writing)
    Bell.of(None, writing).ring()  # and closes itself, as nobody has it any more
    assert held is not None
    assert pipe(writing) != held
    with Bell.of(reading, None) as bell:
        assert bell.wait(0)
        assert not bell.wait(0)


def test_asyncio_hears_it(bell):
    async def hear() -> bool:
        rung = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(bell, lambda: bell.drain() and rung.set())
        threading.Thread(target=bell.ring).start()
        await asyncio.wait_for(rung.wait(), 60.0)
        return loop.remove_reader(bell)

    assert asyncio.run(hear())
    assert not bell.wait(0)


def test_it_closes_by_itself_and_rings_no_stranger():
    bell = Bell.pair()
    fds = bell.fds()
    held = {*map(pipe, fds)}
    assert None not in held
    bell.close()
    bell.close()
    assert held.isdisjoint(map(pipe, fds))
    reading, writing = os.pipe()  # gets the numbers again
    try:
        bell.ring()
        os.set_blocking(reading, False)
        with pytest.raises(BlockingIOError):
            os.read(reading, 1)
    finally:
        os.close(reading)
        os.close(writing)
    bell = Bell.pair()
    fds = bell.fds()
    held = {*map(pipe, fds)}
    del bell
    assert held.isdisjoint(map(pipe, fds))


def test_children_have_it_only_when_asked():
    with Bell.pair() as private, Bell.pair(inheritable=True) as shared:
        assert not any(map(os.get_inheritable, private.fds()))
        assert all(map(os.get_inheritable, shared.fds()))


CHILD = """
import sys
from weft.service.store.bells import Bells
with Bells.spelled_so(sys.argv[1]) as bells:
    assert bells.worker("a/b").wait(60)
    bells.ring("gateway")
    bells.ring("checker")
assert "torch" not in sys.modules
"""


def test_a_process_hears_and_rings_bells_that_it_was_given():
    with Bells.of_models(["a/b", "c"]) as bells:
        assert len(set(bells.fds())) == 8
        command = [sys.executable, "-c", CHILD, bells.spelled()]
        with subprocess.Popen(command, pass_fds=bells.fds()) as child:
            bells.ring("worker", "a/b")
            assert bells.gateway.wait(60.0)
            assert bells.checker.wait(60.0)
        assert child.returncode == 0
        assert not bells.worker("c").wait(0)


def test_ends_that_a_process_does_not_have_can_be_spelled_too():
    reading, writing = os.pipe()
    ears = Bells(Bell.of(None, writing), Bell.of(None, None), {"tiny": Bell.of(reading, None)})
    assert ears.spelled() == (
        f'{{"gateway":[null,{writing}],"checker":[null,null],"workers":{{"tiny":[{reading},null]}}}}'
    )
    ears.close()


def test_bells_ring_by_name():
    with Bells.of_models(["tiny"]) as bells:
        bells.ring("worker", "another")
        bells.ring("worker", "tiny")
        assert bells.worker("tiny").wait(0)
        assert not bells.gateway.wait(0) and not bells.checker.wait(0)
        with pytest.raises(KeyError):
            bells.ring("postman")
        with pytest.raises(KeyError):
            bells.worker("another")


def test_the_shell_rings_and_drops_what_is_over():
    objects, done = MemoryObjects(), job()
    objects.put(f"submits/{done.id}", b"")
    objects.put(f"results/{done.id}", b"")
    with Bells.of_models(["tiny"]) as bells:
        shell = Shell(bells, objects)
        shell(done, (Note("state"), Ring("worker"), Ring("gateway")))
        assert bells.worker("tiny").wait(0) and bells.gateway.wait(0)
        assert not bells.checker.wait(0)
        assert objects.size(f"submits/{done.id}") == 0
        shell(done, (DropSubmit(),))
        assert objects.names("") == [f"results/{done.id}"]
