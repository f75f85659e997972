"""What is left of something that was done, or comes of it: objects, threads, files, calls.

Tests share a process with what earlier ones left running: servers with their threads, caches,
clients. Those make and drop objects, threads and files while a test counts its own. So what was
there before is set aside, threads are told by who started them, and what is counted is counted in
several rounds, since a leak grows in every one of them and nothing else does. What a test puts in
the place of a function of Python's is for the test's own thread (`only_here`).
"""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROUNDS = 5


def set_older_aside() -> None:
    """From now on objects are those made from now on: whoever drops older ones changes no count."""
    gc.collect()
    gc.freeze()


def objects(kind: type = object, names: tuple[str, ...] = ()) -> int:
    """How many objects of a class, or of one with such a name, are alive."""
    gc.collect()
    kinds = [type(one) for one in gc.get_objects()]
    return sum(issubclass(one, kind) and (not names or one.__name__ in names) for one in kinds)


def growth(measure: Callable[[], int], do: Callable[[], Any], bound: int = 1) -> int:
    """By how much a round of `do` changes what is measured: the least change of up to five rounds.

    The first round with less than `bound` is the last.
    """
    least = None
    for _ in range(ROUNDS):
        before = measure()
        do()
        change = measure() - before
        least = change if least is None else min(least, change, key=abs)
        if abs(least) < bound:
            break
    assert least is not None
    return least


def fewest(count: Callable[[], int]) -> int:
    """The least of up to five counts, the first that is 0 being the last."""
    least = count()
    for _ in range(ROUNDS - 1):
        if least == 0:
            break
        least = min(least, count())
    return least


@contextlib.contextmanager
def threads_started() -> Iterator[weakref.WeakSet[threading.Thread]]:
    """The threads that this thread starts meanwhile, or that one of those starts."""
    started: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
    mine, start = threading.current_thread(), threading.Thread.start

    def noted(thread: threading.Thread) -> None:
        starts = threading.current_thread()
        if starts is mine or starts in started:
            started.add(thread)
        start(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", noted)
        yield started


def running(started: weakref.WeakSet[threading.Thread], name: str = "") -> list[threading.Thread]:
    """Those of them that have not ended, and whose name begins so."""
    return [one for one in started if one.is_alive() and one.name.startswith(name)]


def only_here(instead: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """`instead` for the thread that asks, and for all others what it stands in for."""
    mine = threading.current_thread()

    def either(*args: Any, **options: Any) -> Any:
        act = instead if threading.current_thread() is mine else real
        return act(*args, **options)

    return either


def open_files() -> int:
    """How many files, sockets and pipes this process has open; 0 where nobody can tell."""
    listed = Path("/proc/self/fd")
    return len(list(listed.iterdir())) if listed.exists() else 0
