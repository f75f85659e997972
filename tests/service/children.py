"""Processes that share a store, and die of `kill -9`: what `test_store_processes` starts.

    python -m tests.service.children claim PATH HOLDER
    python -m tests.service.children kill-ledger PATH TIMES SEED
    python -m tests.service.children kill-objects PATH TIMES SEED
    python -m tests.service.children hold PATH

No torch here, and one thread, so that a child is a cheap `fork`.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.service.jobs import FINISHED, PRICED, job
from weft.service.store.folder import FolderObjects
from weft.service.store.lock import lock_folder
from weft.service.store.sqlite import open_ledger

Work = Callable[[Callable[[str], None], int], None]


def claim(path: Path, holder: str) -> None:
    """Claims all there is, and prints what it got; begins when its input says so."""
    ledger = open_ledger(path)
    print("ready", flush=True)
    sys.stdin.readline()
    while found := ledger.claim("received", ["tiny"], holder, 500.0, 900.0):
        print(found.id)
        ledger.note(found.id, found.token or "", "log", b"{}")
        ledger.step(found.id, PRICED, 501.0, found.token)
    ledger.close()


def kill_ledger(path: Path, times: int, seed: int) -> None:
    """Children that submit, price, run; each is killed. Prints what they had acknowledged."""

    def work(acknowledge: Callable[[str], None], number: int) -> None:
        ledger = open_ledger(path)
        while True:
            new, _ = ledger.submit(job(time.time(), request_id=f"{number}-{time.time_ns()}"), 10**6)
            acknowledge(f"submitted {new.id}")
            ledger.release(None, time.time())
            found = ledger.claim("received", ["tiny"], "c", time.time(), 1e12)
            if found is not None:
                ledger.step(found.id, PRICED, time.time(), found.token)
            found = ledger.claim("queued", ["tiny"], "w", time.time(), 1e12)
            if found is not None and found.token is not None:
                ledger.note(found.id, found.token, "log", b"{}")
                ledger.step(found.id, FINISHED, time.time(), found.token)
                acknowledge(f"finished {found.id}")

    _kill_again_and_again(work, times, random.Random(seed))


def kill_objects(path: Path, times: int, seed: int) -> None:
    """Children that put objects, which `whole` knows; each is killed. Prints what was put."""

    def work(acknowledge: Callable[[str], None], number: int) -> None:
        objects = FolderObjects(path)
        for count in range(10**6):
            name = f"results/{number}-{count}"
            objects.put(name, io.BytesIO(content(name)))
            acknowledge(name)

    _kill_again_and_again(work, times, random.Random(seed))


def content(name: str) -> bytes:
    """What belongs under a name: about 1 MB or 2, and no part of it is like another's."""
    digest = hashlib.sha256(name.encode()).digest()
    return digest * (32_768 * (1 + digest[0] % 2) + digest[1])


def hold(path: Path) -> None:
    """Holds the lock of a folder until it is killed."""
    with lock_folder(path):
        print("held", flush=True)
        signal.pause()


def _kill_again_and_again(work: Work, times: int, chance: random.Random) -> None:
    """At times before anything was said, at times in the middle of work, early or late."""
    for number in range(times):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _work(work, writing, number)
        os.close(writing)
        with os.fdopen(reading) as said:
            lines = [said.readline() for _ in range(chance.choice((0, 1, 1, 1, 2, 4)))]
            time.sleep(chance.random() * 0.02)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WTERMSIG(status) != signal.SIGKILL:
                sys.exit(f"child {number} ended by itself: {status}")
            # A line that was cut off was not acknowledged.
            print(*[line for line in [*lines, *said] if line.endswith("\n")], sep="", end="")


def _work(work: Work, writing: int, number: int) -> None:
    try:
        work(lambda line: os.write(writing, f"{line}\n".encode()) and None, number)
    finally:
        os._exit(1)


if __name__ == "__main__":
    what, path, *rest = sys.argv[1:]
    if what == "claim":
        claim(Path(path), *rest)
    elif what == "hold":
        hold(Path(path))
    else:
        {"kill-ledger": kill_ledger, "kill-objects": kill_objects}[what](
            Path(path), *map(int, rest)
        )
    assert "torch" not in sys.modules
