"""The store between processes: several at once, and some that die in the middle of a write."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from tests.service.children import content
from tests.service.jobs import job
from tests.service.processes import until
from weft.errors import ServerError
from weft.service.jobs.life import FINAL, Job
from weft.service.store.database import Database
from weft.service.store.folder import NEW, FolderObjects
from weft.service.store.lock import lock_folder
from weft.service.store.sqlite import MIGRATIONS, open_ledger

ROOT = Path(__file__).resolve().parents[2]
KILLS = 30


def child(*arguments: object) -> subprocess.Popen[str]:
    """`tests.service.children`, with pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.service.children", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def said_by(*arguments: object) -> list[str]:
    """The lines that a child prints, when it has ended well."""
    with child(*arguments) as process:
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return out.splitlines()


def checked(path: Path) -> None:
    """SQLite finds nothing wrong with the file, and the columns agree with the jobs."""
    with sqlite3.connect(path) as rows:
        assert rows.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert rows.execute("PRAGMA foreign_key_check").fetchall() == []
        columns = "state, holder, token, until, ended, body, id"
        for *found, body, id in rows.execute(f"SELECT {columns} FROM job"):
            kept = msgspec.msgpack.decode(body, type=Job)
            assert found == [kept.state, kept.holder, kept.token, kept.until, kept.ended]
            assert id == kept.id
    rows.close()


# -- several at once -----------------------------------------------------------------------------


def test_four_processes_claim_each_job_once(tmp_path):
    path = tmp_path / "weft.sqlite"
    ledger = open_ledger(path)
    ids = {ledger.submit(job(100.0 + n), 10**6)[0].id for n in range(200)}
    processes = [child("claim", path, f"p{n}") for n in range(4)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    claimed: list[str] = []
    for process in processes:
        with process:
            claimed += process.communicate(timeout=120)[0].split()
        assert process.returncode == 0
    assert sorted(claimed) == sorted(ids)
    assert ledger.counts() == {("tiny", "queued"): 200}
    for id in ids:
        assert [note.seq for note in ledger.notes(id)] == [1, 2, 3]
    ledger.close()


def test_two_ledgers_of_one_process_share_the_file(tmp_path):
    one, two = open_ledger(tmp_path / "x"), open_ledger(tmp_path / "x")
    new, _ = one.submit(job(), 10)
    assert two.job(new.id) == new
    one.close()
    assert two.submit(new, 10) == (new, False)
    two.close()


# -- kill -9 -------------------------------------------------------------------------------------


def test_kill_loses_no_acknowledged_job(tmp_path):
    path = tmp_path / "weft.sqlite"
    lines = [line.split() for line in said_by("kill-ledger", path, KILLS, 1)]
    submitted = {id for what, id in lines if what == "submitted"}
    finished = {id for what, id in lines if what == "finished"}
    assert len(submitted) > KILLS / 3
    assert finished
    checked(path)
    ledger = open_ledger(path)
    jobs = {found.id: found for found in ledger.jobs("ann", 10**6)}
    assert submitted <= set(jobs)
    assert {jobs[id].state for id in finished} == {"done"}
    ledger.release(None, 1e12)
    for found in jobs.values():
        notes = ledger.notes(found.id)
        assert [note.seq for note in notes] == list(range(1, len(notes) + 1))
        ends = [note.kind for note in notes].count("end")
        assert ends == (found.state in FINAL)
    ledger.close()


def test_kill_leaves_no_half_object(tmp_path):
    put = said_by("kill-objects", tmp_path, KILLS, 2)
    assert len(put) > KILLS / 3
    left = list((tmp_path / NEW).iterdir())
    assert left, "no child was killed while it had the folder open"
    objects = FolderObjects(tmp_path)
    names = objects.names("")
    assert set(put) <= set(names)
    for name in names:
        assert objects.get(name) == content(name), name
    objects.close()
    assert list((tmp_path / NEW).iterdir()) == []


# -- one server per folder -----------------------------------------------------------------------


def test_a_folder_has_one_server(tmp_path):
    path = tmp_path / "data"
    with lock_folder(path):
        assert path.stat().st_mode & 0o777 == 0o700
        refusal = pytest.raises(ServerError, match=r"another server \(process \d+\) uses")
        with refusal, lock_folder(path):
            pass
    with lock_folder(path):
        pass


def test_a_server_that_is_killed_has_the_folder_no_longer(tmp_path):
    with child("hold", tmp_path) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        refusal = pytest.raises(ServerError, match=rf"process {process.pid}\) uses")
        with refusal, lock_folder(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with lock_folder(tmp_path):
            pass


# -- the file ------------------------------------------------------------------------------------


def test_only_its_owner_may_read_the_database(tmp_path):
    path = tmp_path / "sub" / "weft.sqlite"
    ledger = open_ledger(path)
    ledger.submit(job(), 10)
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    files = [f"weft.sqlite{end}" for end in ("", "-wal", "-shm", "-door")]
    assert modes == dict.fromkeys(files, 0o600)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    ledger.close()


def test_a_database_that_others_could_read_is_closed_to_them(tmp_path):
    path = tmp_path / "weft.sqlite"
    path.touch(0o644)
    path.chmod(0o644)
    open_ledger(path).close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_writes_wait_for_the_disk_where_they_must(tmp_path):
    """2 is FULL, 1 is NORMAL: https://www.sqlite.org/pragma.html#pragma_synchronous"""
    ledger = open_ledger(tmp_path / "x")
    for durable, level in ((True, 2), (False, 1)):
        with ledger._database.write(durable=durable) as rows:
            assert rows.execute("PRAGMA synchronous").fetchone() == (level,)
            assert rows.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert rows.execute("PRAGMA foreign_keys").fetchone() == (1,)
    ledger.close()


def test_threads_that_write_at_once_share_a_flush(tmp_path):
    """Each is one transaction all the same: one that fails takes nobody with it."""
    database = Database(tmp_path / "x", [["CREATE TABLE t (n INTEGER)"]])
    first, commits = threading.Event(), []

    def traced(statement: str) -> None:
        if statement == "COMMIT":
            commits.append(statement)

    def write(number: int) -> None:
        with database.write() as rows:
            rows.set_trace_callback(traced)
            if number == 0:
                first.set()
                until(lambda: database._queue == 20)
            rows.execute("INSERT INTO t VALUES (?)", (number,))
            if number == 7:
                raise LookupError("seven")

    with ThreadPoolExecutor(21) as pool:
        done = [pool.submit(write, 0)]
        assert first.wait(60)
        done += [pool.submit(write, number) for number in range(1, 21)]
        failed = [one for one in done if one.exception() is not None]
    assert [type(one.exception()) for one in failed] == [LookupError]
    with database.read() as rows:
        found = [n for (n,) in rows.execute("SELECT n FROM t ORDER BY n")]
    assert found == [n for n in range(21) if n != 7]
    assert len(commits) == 1
    database.close()


def test_a_flush_that_fails_is_told_to_all_who_waited_for_it(tmp_path):
    database = Database(tmp_path / "x", [["CREATE TABLE t (n INTEGER)"]])
    first, found = threading.Event(), []

    def write(number: int) -> None:
        try:
            with database.write() as rows:
                if number == 0:
                    first.set()
                    until(lambda: database._queue == 4)
                    rows.execute("PRAGMA defer_foreign_keys = ON")
                    rows.execute("CREATE TABLE a (n INTEGER PRIMARY KEY)")
                    rows.execute("CREATE TABLE b (n INTEGER REFERENCES a (n))")
                    rows.execute("INSERT INTO b VALUES (1)")  # refused at the end, not here
                rows.execute("INSERT INTO t VALUES (?)", (number,))
        except sqlite3.IntegrityError as error:
            found.append(str(error))

    with ThreadPoolExecutor(5) as pool:
        pool.submit(write, 0)
        assert first.wait(60)
        for number in range(1, 5):
            pool.submit(write, number)
    assert len(found) == 5
    with database.read() as rows:
        assert rows.execute("SELECT count(*) FROM t").fetchone() == (0,)
    with database.write() as rows:  # and it goes on
        rows.execute("INSERT INTO t VALUES (1)")
    database.close()


def test_what_a_newer_weft_wrote_is_left_alone(tmp_path):
    path = tmp_path / "x"
    open_ledger(path).close()
    with sqlite3.connect(path) as rows:
        rows.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    rows.close()
    with pytest.raises(ServerError, match="written by a newer Weft"):
        open_ledger(path)


def test_what_is_no_database_is_left_alone(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"a letter to my aunt " * 100)
    with pytest.raises(ServerError, match="cannot be opened as a database"):
        open_ledger(path)
    assert path.read_bytes().startswith(b"a letter")


def test_an_older_database_is_led_to_the_newest_version(tmp_path, monkeypatch):
    path = tmp_path / "x"
    ledger = open_ledger(path)
    new, _ = ledger.submit(job(), 10)
    ledger.close()
    more = (*MIGRATIONS, ("CREATE TABLE more (x TEXT) STRICT",))
    monkeypatch.setattr("weft.service.store.sqlite.MIGRATIONS", more)
    for _ in range(2):
        ledger = open_ledger(path)
        assert ledger.job(new.id) == new
        with ledger._database.read() as rows:
            assert rows.execute("PRAGMA user_version").fetchone() == (len(more),)
        ledger.close()


def test_a_migration_happens_whole_or_not_at_all(tmp_path, monkeypatch):
    broken = (*MIGRATIONS, ("CREATE TABLE more (x TEXT)", "CREATE TABLE job (x TEXT)"))
    monkeypatch.setattr("weft.service.store.sqlite.MIGRATIONS", broken)
    with pytest.raises(ServerError, match="already exists"):
        open_ledger(tmp_path / "x")
    monkeypatch.undo()
    ledger = open_ledger(tmp_path / "x")
    assert ledger.submit(job(), 10)[1]
    ledger.close()


def test_a_closed_ledger_says_so(tmp_path):
    ledger = open_ledger(tmp_path / "x")
    ledger.close()
    ledger.close()
    with pytest.raises(ServerError, match="is closed"):
        ledger.job("a")
