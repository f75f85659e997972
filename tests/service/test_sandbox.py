"""The walls around checker and workers: what is behind them tries to get out, and cannot.

`caged` makes each attempt twice, inside and without any walls. An attempt that fails without them
as well shows nothing and is a mistake of the test's.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.caged import TOKEN
from weft.errors import ServerError, SettingError
from weft.service.sandbox import confine, environment, landlock, means, seccomp
from weft.service.sandbox.confine import Confined, Places
from weft.service.sandbox.means import Walls, check

needs_walls = pytest.mark.skipif(
    bool(means.means().missing), reason=f"this system lacks {means.means().missing}"
)

ROOTS = {"a raw socket", "mount", "chroot", "bpf", "perf", "userfaultfd", "load a module"}
"""Attempts that need rights, or sense, to go well outside; inside they must be "not permitted"."""
SENSELESS = ROOTS | {
    *("io_uring", "unshare", "keyctl", "ptrace", "take hold of another process"),
    *("raise the bound of files", "raise the bound of sizes"),
}
"""Attempts that other machines may refuse for reasons of their own, containers too."""
MISSES = {
    *("token of Python", "token of C", "token in /proc"),
    *("core files", "a file without end", "memory without end", "no end of open files"),
}
"""Attempts that raise nothing when nothing comes of them."""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """How each attempt went, by the setting."""
    return {mode: _caged(mode, tmp_path_factory.mktemp(mode)) for mode in ("require", "off")}


def _caged(mode: str, folder: Path) -> dict[str, str]:
    for name in ("mine", "read", "other", "objects"):
        (folder / name).mkdir()
    texts = {"other/secret": "s", "read/file": "given", "read/more": "m", "objects/one": "1"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "mine/way").symlink_to(folder / "other/secret")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = str(listening.getsockname()[1])
        child = subprocess.run(
            [sys.executable, "-m", "tests.service.caged", mode, str(folder), port],
            env={**os.environ, "HF_TOKEN": TOKEN, "OPENBLAS_NUM_THREADS": "1"},  # as `hands` does
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert child.returncode == 0, child.stderr
    assert (folder / "other").is_dir()
    return json.loads(child.stdout.splitlines()[-1])


@needs_walls
def test_nothing_that_is_tried_goes_well_inside(said: dict[str, dict[str, str]]) -> None:
    tried = {n: how for n, how in said["require"].items() if not n.startswith(("work", "walls"))}
    assert len(tried) > 45
    refusals = {"PermissionError", "OSError", "ValueError"}
    wrong = {n: how for n, how in tried.items() if n not in MISSES and how not in refusals}
    assert wrong == {}
    assert {n: tried[n] for n in MISSES if tried[n] != "no"} == {}


@needs_walls
def test_the_kernel_says_that_it_is_not_permitted(said: dict[str, dict[str, str]]) -> None:
    """Not that an argument was senseless: the calls did not get so far."""
    other = {n for n, how in said["require"].items() if how in ("OSError", "ValueError")}
    limits = {"raise the bound of files", "raise the bound of sizes"}
    links = {"take it by a hard link", "move a file out"}  # as if to another disk
    assert other <= limits | links


@needs_walls
def test_the_same_goes_well_without_walls(said: dict[str, dict[str, str]]) -> None:
    """Or the attempts would prove nothing."""
    free = {n: how for n, how in said["off"].items() if n not in SENSELESS and n != "walls"}
    assert {n: how for n, how in free.items() if how != "ok"} == {}


@needs_walls
def test_a_worker_can_do_its_work_inside(said: dict[str, dict[str, str]]) -> None:
    work = {n: how for n, how in said["require"].items() if n.startswith("work")}
    assert len(work) == 9
    assert set(work.values()) == {"ok"}, work


@needs_walls
def test_what_is_up_is_said(said: dict[str, dict[str, str]]) -> None:
    version = landlock.abi()
    assert said["require"]["walls"] == f"files (Landlock {version}), calls (seccomp)"


# -- what this system lacks ------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def never_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it could be undone."""
    monkeypatch.setattr(confine, "give_up_capabilities", lambda: None)
    monkeypatch.setattr(landlock, "restrict", lambda *args, **options: None)
    monkeypatch.setattr(seccomp, "install", lambda: None)


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A kernel without any of it."""
    monkeypatch.setattr(landlock, "abi", lambda: 0)
    monkeypatch.setattr(seccomp, "available", lambda: False)
    return


def test_require_names_what_is_missing(old: None) -> None:
    with pytest.raises(SettingError, match=r"lacks Landlock 2 \(this kernel has none\), seccomp"):
        check("require")
    check("auto")
    check("off")


def test_a_landlock_that_lets_no_file_be_linked_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "abi", lambda: 1)
    with pytest.raises(SettingError, match=r"Landlock 2 \(this kernel has version 1\)"):
        check("require")


def test_another_value_is_refused() -> None:
    with pytest.raises(SettingError, match=r"'on'[^$]*auto, require or off"):
        check("on")


def test_a_process_that_must_have_walls_does_not_begin_without(old: None) -> None:
    with pytest.raises(ServerError, match="required, but lacks Landlock 2"):
        Confined("require", Places({})).begin()


def test_threads_that_were_there_before_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "abi", lambda: 7)
    monkeypatch.setattr(seccomp, "available", lambda: True)
    monkeypatch.setattr(confine, "threads", lambda: 3)
    confined = Confined("auto", Places({}))
    confined.begin()
    assert "Landlock in threads that libraries had started before" in str(confined.walls)
    with pytest.raises(ServerError, match="in threads that libraries"):
        Confined("require", Places({})).begin()


def test_what_is_missing_is_said() -> None:
    none, some = Walls(), Walls(landlock=0, seccomp=True)
    assert str(none).startswith("no kernel sandbox; missing: Landlock 2")
    assert str(some) == "calls (seccomp); missing: Landlock 2 (this kernel has none)"
    assert means.told("off") == means.short("off") == "off"


def test_what_is_missing_is_said_in_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    for walls, word in ((Walls(), "off"), (Walls(seccomp=True), "partial"), (Walls(7, True), "on")):
        monkeypatch.setattr(means, "means", lambda walls=walls: walls)
        assert means.short("auto") == word


# -- the environment -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "WEFT_KEY", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "GH_TOKEN"),
        *("DATABASE_URL", "OPENAI_API_KEY", "TORCH_TOKEN", "WEFT_ADMIN_PASSWORD", "SSH_AUTH_SOCK"),
        *("http_proxy", "LD_PRELOAD", "NVIDIA_API_KEY", "XDG_RUNTIME_DIR"),
    ],
)
def test_a_variable_that_does_not_stay(name: str) -> None:
    assert environment.clean({name: "x"}) == {}


@pytest.mark.parametrize(
    "name",
    ["PATH", "HOME", "LC_ALL", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HOME", "WEFT_DATA"],
)
def test_a_variable_that_stays(name: str) -> None:
    assert environment.clean({name: "x"}) == {name: "x"}
