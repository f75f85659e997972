"""The processes of a real server, as a test sees them: found in /proc, killed, awaited."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 120.0
"""Seconds after which what does not happen counts as never happening: processes load torch."""
ENDED = (FileNotFoundError, ProcessLookupError)
"""What reading /proc raises of somebody who has just ended."""
_STAT = re.compile(r"(\d+) \((.*)\) (\S) (\d+) ")


def until(so: Callable[[], T], what: str = "it") -> T:
    """What `so()` gives, as soon as that is something."""
    end = time.monotonic() + PATIENCE
    while True:
        found = so()
        if found:
            return found
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.01)


def family(pid: int) -> dict[int, str]:
    """The living processes below one, and their names (`weft:worker`)."""
    below: dict[int, str] = {}
    waiting = _children(pid)
    while waiting:
        child = waiting.pop()
        if found := _stat(child):
            below[child] = found[0]
            waiting += _children(child)
    return below


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in _listed(Path(f"/proc/{pid}/task")):
        with suppress(*ENDED):
            found += map(int, (task / "children").read_text().split())
    return found


def _listed(folder: Path) -> list[Path]:
    """What is in a folder of /proc; nothing where its process has just ended."""
    try:
        return list(folder.iterdir())
    except ENDED:
        return []


def opened(pid: int) -> list[str]:
    """What a process has open, but what it has just closed."""
    found: list[str] = []
    for path in _listed(Path(f"/proc/{pid}/fd")):
        with suppress(*ENDED):
            found.append(str(path.readlink()))
    return found


def threads_of(pid: int) -> list[str]:
    """What the kernel tells of each thread of a process (`status`), but of one that has just
    ended."""
    found: list[str] = []
    for path in _listed(Path(f"/proc/{pid}/task")):
        with suppress(*ENDED):
            found.append((path / "status").read_text())
    return found


def _stat(pid: int) -> tuple[str, int] | None:
    """Name and parent of a living process."""
    try:
        found = _STAT.match(Path(f"/proc/{pid}/stat").read_text())
    except ENDED:
        return None
    assert found is not None
    return None if found[3] in "ZX" else (found[2], int(found[4]))


def alive(pid: int) -> bool:
    return _stat(pid) is not None


def pids(server: int, role: str) -> list[int]:
    """The processes of a server with this role."""
    return [pid for pid, name in family(server).items() if name == f"weft:{role}"]


def one(server: int, role: str) -> int:
    """The one that has this role, as soon as there is one."""
    return until(lambda: pids(server, role), f"a {role}")[0]


def kill(pid: int) -> None:
    """`kill -9`, and waits until it is gone."""
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), "its end")


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process does nothing until the block is left."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def all_gone(pids: dict[int, str]) -> None:
    """Waits until none of these is there any more."""
    until(lambda: not any(alive(pid) for pid in pids), f"the end of {sorted(pids.values())}")
