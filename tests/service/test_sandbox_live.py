"""The walls of a real server, as the kernel tells of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.home import own_home
from tests.service.processes import family, kill, one, opened, threads_of, until
from weft.client.servers import close as close_clients
from weft.service.sandbox.means import means
from weft.testing import tiny_path
from weft.testing.process import Running, served

pytestmark = pytest.mark.skipif(
    bool(means().missing), reason=f"this system lacks {means().missing}"
)

TOKEN = "hf_nobody_should_see_this"
DRAWING = ("worker", "checker")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that must have all walls, started by somebody with a token of the hub."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        own_home(patch, home, HF_TOKEN=TOKEN, OMP_NUM_THREADS="2")
        with served(f"tiny={tiny_path()}", options=("--sandbox", "require")) as server:
            yield server
    close_clients()


@pytest.fixture(scope="module")
def model() -> Any:
    return weft.LanguageModel(tiny_path())


def work(model: Any, server: Running) -> None:
    """A block that makes its worker draw, log, generate, and put a large result together."""
    with model.trace("one two three", remote=server.url) as tracer:
        h = model.model.layers[1].output.save()
        tracer.log("norm", h.norm())
        large = (h.sum() * 0).expand(3_000_000).clone().save()
    with model.trace("one two three"):
        here = model.model.layers[1].output.save()
    assert torch.equal(h, here)
    assert large.shape == (3_000_000,)
    with model.generate("one two", max_new_tokens=2, remote=server.url) as tracer:
        tokens = tracer.result.save()
    assert tokens.shape[-1] >= 3


def status(text: str) -> dict[str, str]:
    """The lines of /proc/.../status."""
    pairs = (line.split(":", 1) for line in text.splitlines())
    return {name: value.strip() for name, value in pairs}


@pytest.mark.parametrize("role", DRAWING)
def test_every_thread_is_filtered(server: Running, model: Any, role: str) -> None:
    work(model, server)
    threads = [status(text) for text in threads_of(one(server.process.pid, role))]
    assert len(threads) > 1
    assert {(one["Seccomp"], one["NoNewPrivs"]) for one in threads} == {("2", "1")}
    capable = {int(one[name], 16) for one in threads for name in ("CapEff", "CapPrm")}
    assert all(bits & ~0b1110 == 0 for bits in capable)  # what files need, or nothing


def test_who_draws_nothing_is_not(server: Running) -> None:
    """Or the test above would prove nothing."""
    for pid in (server.process.pid, one(server.process.pid, "nursery")):
        assert (
            status(Path(f"/proc/{pid}/status").read_text())["Seccomp"]
            == status(Path("/proc/self/status").read_text())["Seccomp"]
        )


def test_only_who_loads_models_has_the_token(server: Running) -> None:
    def has_token(pid: int) -> bool:
        return TOKEN.encode() in Path(f"/proc/{pid}/environ").read_bytes()

    below = family(server.process.pid)
    holders = {name for pid, name in below.items() if has_token(pid)}
    assert holders == {"weft:nursery"}


@pytest.mark.parametrize("role", DRAWING)
def test_it_has_no_socket_but_its_line_to_the_fleet(server: Running, role: str) -> None:
    pid = one(server.process.pid, role)
    assert len([one for one in opened(pid) if one.startswith("socket:")]) == 1

    def others() -> list[str]:
        files = [one for one in opened(pid) if one.startswith("/")]
        return [one for one in files if not one.startswith((str(server.data), "/dev/null"))]

    until(lambda: others() == [], "that it has no other file")  # it measures itself after a job


@pytest.mark.parametrize("role", DRAWING)
def test_its_limits_are_bounded(server: Running, role: str) -> None:
    text = Path(f"/proc/{one(server.process.pid, role)}/limits").read_text()
    hard = {line[:26].strip(): line[26:].split()[1] for line in text.splitlines()[1:]}
    assert hard["Max core file size"] == "0"
    assert int(hard["Max open files"]) < 2048
    assert hard["Max file size"] != "unlimited"
    assert hard["Max data size"] != "unlimited"


@pytest.mark.parametrize("role", DRAWING)
def test_its_memory_can_be_measured(server: Running, role: str) -> None:
    """By the server, which places models by it."""
    pid = one(server.process.pid, role)
    assert int(Path(f"/proc/{pid}/statm").read_text().split()[1]) > 1000
    assert "Pss:" in Path(f"/proc/{pid}/smaps_rollup").read_text()


def test_a_new_one_has_them_too(server: Running, model: Any) -> None:
    pid = one(server.process.pid, "worker")
    kill(pid)
    until(lambda: one(server.process.pid, "worker") != pid)
    work(model, server)
    new = Path(f"/proc/{one(server.process.pid, 'worker')}/status").read_text()
    assert status(new)["Seccomp"] == "2"


def test_the_log_and_the_greeting_say_what_is_up(server: Running) -> None:
    said = server.said()
    assert f"(sandbox of checker and workers: {means()})" in said
    for name in ("worker tiny", "checker"):
        line = rf'"part":"{name}","message":"sandbox of process \d+: {re.escape(str(means()))}"'
        until(lambda: re.search(line, server.said()), line)  # noqa: B023


def test_health_says_it_in_a_word(server: Running) -> None:
    with urllib.request.urlopen(f"{server.url}/health") as reply:
        assert json.load(reply)["parts"]["sandbox"] == "on"


def test_an_unknown_value_starts_nothing() -> None:
    command = [sys.executable, "-m", "weft", "serve", str(tiny_path()), "--sandbox", "maybe"]
    child = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert child.returncode == 2
    assert "auto, require or off" in child.stderr
