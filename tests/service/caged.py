"""What a process tries from inside the sandbox: a child of `test_sandbox`, which reads the tale.

    python -m tests.service.caged MODE FOLDER PORT

One line of JSON: by attempt, how it went. `MODE` is that of the setting; with "off" all that needs
no rights of root should go well, or the attempt would show nothing. `FOLDER` has `mine/`, `read/`
and `store.sqlite`, which it is given, and `other/`, which it is not.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from weft.service.sandbox.confine import Confined, Places
from weft.service.sandbox.kernel import call, numbers
from weft.service.sandbox.landlock import ADD, DRAFT, READ, WRITE
from weft.service.sandbox.places import libraries

TOKEN = "hf_nobody_should_see_this"  # what `test_sandbox` puts into the environment
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.getenv.restype = ctypes.c_char_p


def main(mode: str, folder: Path, port: int) -> None:
    with sqlite3.connect(folder / "store.sqlite") as rows:  # before the walls, as a worker does
        rows.execute("PRAGMA journal_mode = WAL")
        rows.execute("CREATE TABLE t (x)")
    confined = Confined(mode, _places(folder))
    confined.begin()
    torch.ones(400, 400) @ torch.ones(400, 400)  # a library's threads, if it wants some
    confined.finish()
    attempts = {**_files(folder), **_calls(port), **_secrets(), **_limits(), **_work(folder, rows)}
    said = {name: _outcome(attempt) for name, attempt in attempts.items()}
    print(json.dumps({"walls": str(confined.walls), **said}), flush=True)
    os._exit(0)


def _places(folder: Path) -> Places:
    store = folder / "store.sqlite"
    files = [store.with_name(store.name + more) for more in ("", "-wal", "-shm")]
    given = {folder / "mine": DRAFT, folder / "read": READ, folder / "objects": ADD}
    return Places({**libraries(), **dict.fromkeys(files, WRITE), **given})


def _outcome(attempt: Callable[[], Any]) -> str:
    """`ok`, or the name of what was raised; `no` where nothing was, but nothing came of it."""
    try:
        return "no" if attempt() is False else "ok"
    except Exception as error:  # noqa: BLE001
        return type(error).__name__


def _files(folder: Path) -> dict[str, Callable[[], Any]]:
    def through_a_link() -> None:
        (folder / "mine/link").unlink(missing_ok=True)
        os.link(folder / "other/secret", folder / "mine/link")

    def moved_out() -> None:
        (folder / "mine/loot").write_text("x")
        (folder / "mine/loot").rename(folder / "other/loot")

    return {
        "read /etc/passwd": lambda: Path("/etc/passwd").read_text(),
        "read what is not given": lambda: (folder / "other/secret").read_text(),
        "read it by way of ..": lambda: (folder / "mine/../other/secret").read_text(),
        "read it through a link": lambda: (folder / "mine/way").read_text(),
        "take it by a hard link": through_a_link,
        "list what is not given": lambda: list((folder / "other").iterdir()),
        "list the home folder": lambda: list(Path.home().iterdir()),
        "write to /tmp": lambda: Path(f"/tmp/weft-{os.getpid()}").touch(),
        "write beside": lambda: (folder / "other/new").write_text("x"),
        "write what is for reading": lambda: (folder / "read/more").write_text("x"),
        "cut what is for reading": lambda: os.truncate(folder / "read/more", 0),
        "remove what is for reading": lambda: (folder / "read/more").unlink(),
        "change an object": lambda: (folder / "objects/one").write_text("x"),
        "move a file out": moved_out,
        "make a device": lambda: os.mkfifo(folder / "mine/pipe"),
    }


def _calls(port: int) -> dict[str, Callable[[], Any]]:
    parent = os.getppid()

    def connected() -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass

    def served() -> None:
        with socket.create_server(("127.0.0.1", 0)):
            pass

    def forked() -> None:
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)

    def looked_into() -> None:
        """A byte of the parent's memory."""
        there = int(Path(f"/proc/{parent}/maps").read_text().split("-")[0], 16)
        with Path(f"/proc/{parent}/mem").open("rb", buffering=0) as memory:
            memory.seek(there)
            memory.read(1)

    def numbered(name: str, *args: int) -> Callable[[], Any]:
        return lambda: call(name, *args)

    return {
        "connect": connected,
        "listen": served,
        "a socket of files": lambda: socket.socket(socket.AF_UNIX).close(),
        "a raw socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close(),
        "exec": lambda: subprocess.run(["/bin/true"], check=True),
        "posix_spawn": lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0),
        "fork": forked,
        "signal another process": lambda: os.kill(parent, 0),
        "signal everybody": lambda: os.kill(0, 0),
        "signal a thread of another": numbered("tgkill", parent, parent, 0),
        "take hold of another process": numbered("pidfd_open", parent, 0),
        "limit another process": lambda: resource.prlimit(parent, resource.RLIMIT_CORE),
        "read memory of another": looked_into,
        "read the environment of another": lambda: Path(f"/proc/{parent}/environ").read_bytes(),
        "ptrace": numbered("ptrace", 0, 0, 0, 0),
        "unshare": numbered("unshare", 0),
        "keyctl": numbered("keyctl", 0, -3, 0),  # the id of the session's keyring
        "mount": numbered("mount", 0, 0, 0, 0, 0),
        "chroot": numbered("chroot", 0),
        "bpf": numbered("bpf", 0, 0, 0),
        "io_uring": numbered("io_uring_setup", 0, 0),
        "userfaultfd": numbered("userfaultfd", 0),
        "perf": numbered("perf_event_open", 0, 0, 0, 0, 0),
        "load a module": numbered("finit_module", -1, 0, 0),
        "every number of the list": _unlisted,
    }


def _unlisted() -> bool:
    """Whether some listed call is not refused as "not permitted"; called without sense."""
    from weft.service.sandbox.seccomp import REFUSED

    known = numbers()
    for name in (name for names in REFUSED.values() for name in names if name in known):
        if name in ("fork", "vfork"):
            continue  # these would do what they say
        try:
            call(name, -1, 0, 0, 0, 0)
        except PermissionError:
            continue
        except OSError:
            return True
        return True
    raise PermissionError("each of them is refused")


def _secrets() -> dict[str, Callable[[], Any]]:
    return {
        "token of Python": lambda: TOKEN in os.environ.values(),
        "token of C": lambda: LIBC.getenv(b"HF_TOKEN") is not None,
        "token in /proc": lambda: TOKEN.encode() in Path("/proc/self/environ").read_bytes(),
    }


def _limits() -> dict[str, Callable[[], Any]]:
    def raised(which: int) -> Callable[[], Any]:
        def attempt() -> bool:
            _, hard = resource.getrlimit(which)
            if hard == resource.RLIM_INFINITY:
                return True
            resource.setrlimit(which, (hard + 1, hard + 1))
            return True

        return attempt

    return {
        "core files": lambda: resource.getrlimit(resource.RLIMIT_CORE)[1] != 0,
        "no end of open files": lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 4096,
        "a file without end": lambda: resource.getrlimit(resource.RLIMIT_FSIZE)[1] < 0,
        "memory without end": lambda: resource.getrlimit(resource.RLIMIT_DATA)[1] < 0,
        "raise the bound of files": raised(resource.RLIMIT_NOFILE),
        "raise the bound of sizes": raised(resource.RLIMIT_FSIZE),
    }


def _work(folder: Path, rows: sqlite3.Connection) -> dict[str, Callable[[], Any]]:
    """What a worker does all day. Always has to go well."""

    def stored() -> None:
        with rows:
            rows.execute("INSERT INTO t VALUES (randomblob(100000))")
        with sqlite3.connect(folder / "store.sqlite") as again:
            again.execute("INSERT INTO t SELECT randomblob(1000) FROM t")
            assert again.execute("SELECT count(*) FROM (SELECT x FROM t ORDER BY x)").fetchone()
        again.close()

    def linked() -> None:
        draft = folder / "mine/draft"
        draft.write_text("whole")
        (folder / "objects/results").mkdir(exist_ok=True)
        (folder / "objects/results/job").hardlink_to(draft)
        draft.unlink()
        os.utime(folder / "objects/results/job")
        assert (folder / "objects/results/job").read_text() == "whole"
        (folder / "objects/results/job").unlink()

    def threaded() -> None:
        thread = threading.Thread(target=torch.manual_seed, args=(0,))
        thread.start()
        thread.join()

    def many_at_once() -> None:
        torch.set_num_threads(2)
        x = torch.randn(300, 300)
        assert torch.allclose(torch.linalg.inv(x) @ x, torch.eye(300), atol=0.1)

    return {
        "work: the ledger": stored,
        "work: an object": linked,
        "work: threads": threaded,
        "work: torch with threads": many_at_once,
        "work: read what is given": lambda: (folder / "read/file").read_text() == "given",
        "work: libraries": lambda: Path(torch.__file__).read_bytes(),
        "work: signal itself": lambda: os.kill(os.getpid(), 0),
        "work: a timer": lambda: signal.setitimer(signal.ITIMER_REAL, 0),
        "work: memory used": lambda: Path("/proc/self/statm").read_text(),
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
