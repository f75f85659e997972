"""Where processes that write one file stand in line: nobody is shut out, nothing hangs on it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from weft.service.store.database import Database
from weft.service.store.door import Door

TABLES = (("CREATE TABLE turn (number INTEGER NOT NULL)", "INSERT INTO turn VALUES (0)"),)
BUSY = """
import sys, time
from pathlib import Path
from weft.service.store.database import Database
database = Database(Path(sys.argv[1]), [()])
print("ready", flush=True)
while True:  # a gateway whose users never rest
    with database.write(durable=False) as rows:
        rows.execute("UPDATE turn SET number = number + 1")
        time.sleep(0.003)
"""
HOLD = """
import sys
from pathlib import Path
from weft.service.store.door import Door
door = Door(Path(sys.argv[1]))
door.enter()
print("inside", flush=True)
sys.stdin.readline()
door.leave()
print("outside", flush=True)
sys.stdin.readline()
"""


class Child:
    """A process that runs a script."""

    def __init__(self, script: str, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(path)],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def says(self, what: str) -> bool:
        assert self.process.stdout is not None
        return self.process.stdout.readline() == f"{what}\n"

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        with self.process:
            self.process.kill()


@pytest.fixture
def child() -> Iterator[Any]:
    made: list[Child] = []

    def begin(script: str, path: Path) -> Child:
        made.append(Child(script, path))
        return made[-1]

    yield begin
    for one in made:
        one.kill()


def number(database: Database) -> int:
    with database.read() as rows:
        return rows.execute("SELECT number FROM turn").fetchone()[0]


def test_who_waits_goes_before_who_comes_back(tmp_path: Path, child: Any) -> None:
    """About one write of the other is under way each time. Where both wait as SQLite has it, some
    hundreds come before one of ours."""
    database = Database(tmp_path / "x", TABLES)
    busy = child(BUSY, tmp_path / "x")
    assert busy.says("ready")
    passed = []
    for _ in range(12):
        threading.Event().wait(0.02)  # the other has it for itself again
        before = number(database)
        with database.write(durable=False) as rows:
            passed.append(rows.execute("SELECT number FROM turn").fetchone()[0] - before)
    database.close()
    assert sum(sorted(passed)[:8]) <= 40  # of the others this process may have been away itself


def test_one_at_a_time_is_inside(tmp_path: Path, child: Any) -> None:
    holder = child(HOLD, tmp_path / "door")
    assert holder.says("inside")
    door, order = Door(tmp_path / "door"), []

    def wait() -> None:
        door.enter()
        order.append("mine")
        door.leave()

    thread = threading.Thread(target=wait)
    thread.start()
    threading.Event().wait(0.1)
    order.append("theirs")
    holder.go_on()
    thread.join(60)
    door.close()
    assert order == ["theirs", "mine"]


def test_who_is_killed_inside_lets_the_others_in(tmp_path: Path, child: Any) -> None:
    holder = child(HOLD, tmp_path / "door")
    assert holder.says("inside")
    door = Door(tmp_path / "door")
    holder.kill()
    door.enter()
    door.leave()
    door.close()


def test_nobody_hangs_on_one_who_is_stopped_inside(tmp_path, monkeypatch, child) -> None:
    database = Database(tmp_path / "x", TABLES)
    holder = child(HOLD, tmp_path / "x-door")
    assert holder.says("inside")
    holder.process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr("weft.service.store.door.PATIENCE", 0.05)
    for durable in (True, False):
        with database.write(durable=durable) as rows:
            rows.execute("UPDATE turn SET number = number + 1")
    assert number(database) == 2
    holder.process.send_signal(signal.SIGCONT)
    holder.go_on()
    assert holder.says("outside")
    monkeypatch.undo()
    other = child(HOLD, tmp_path / "x-door")  # nothing was left in the doorway either
    assert other.says("inside")
    database.close()


def test_ctrl_c_while_one_waits_leaves_nothing(tmp_path: Path, monkeypatch, child: Any) -> None:
    door = Door(tmp_path / "door")
    take = door._take

    def interrupted(byte: int, until: float) -> bool:
        if byte:
            raise KeyboardInterrupt
        return take(byte, until)

    with monkeypatch.context() as patch:
        patch.setattr(door, "_take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            door.enter()
    assert child(HOLD, tmp_path / "door").says("inside")
    door.close()


def test_writing_goes_on_where_files_have_no_locks(tmp_path: Path, monkeypatch) -> None:
    def none(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.lockf", none)
    database = Database(tmp_path / "x", TABLES)
    with database.write() as rows:
        rows.execute("UPDATE turn SET number = 5")
    assert number(database) == 5
    database.close()


def test_a_write_that_fails_lets_the_others_in(tmp_path: Path, child: Any) -> None:
    database = Database(tmp_path / "x", TABLES)
    for durable in (True, False):
        with pytest.raises(ZeroDivisionError), database.write(durable=durable) as rows:
            rows.execute("UPDATE turn SET number = 7")
            raise ZeroDivisionError
    assert child(HOLD, tmp_path / "x-door").says("inside")
    assert number(database) == 0
    database.close()


@pytest.mark.parametrize("inside", [False, True])
def test_the_last_one_out_closes_it(tmp_path: Path, inside: bool) -> None:
    door = Door(tmp_path / "door")
    if inside:
        door.enter()
        door.close()
        assert os.fstat(door._file)
        door.leave()
    door.close()
    with pytest.raises(OSError):
        os.fstat(door._file)
    door.enter()  # nobody waits at a door that is gone
    door.leave()
