"""`weft serve` as it is: real processes, HTTP, a client that knows nothing of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import weft
from tests.home import own_home
from tests.service.processes import (
    PATIENCE,
    alive,
    all_gone,
    family,
    kill,
    one,
    opened,
    pids,
    stopped,
    until,
)
from weft.client.servers import close as close_clients
from weft.errors import AccessError, ModelNotReadyError, WorkerLostError
from weft.service.fleet.keys import add_key, open_keys, revoke_key
from weft.service.fleet.places import ledger_of, objects_of
from weft.service.store.folder import NEW
from weft.settings import state_folder
from weft.testing import tiny_path
from weft.testing.process import START_SECONDS, Running, served, started

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

TINY = f"tiny={tiny_path()}"
PROMPT = "The capital of France is"
SIZE, STEPS, LONG = 500, 300, 2400
"""Products of matrices of this size: some seconds of work, in which a test can step in, and half a
minute, whose end it does not wait for."""
NAMES = ["weft:checker", "weft:gateway", "weft:nursery", "weft:worker"]


@pytest.fixture(scope="module", autouse=True)
def environ(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home of its own."""
    with pytest.MonkeyPatch.context() as patch:
        own_home(patch, tmp_path_factory.mktemp("home"), OMP_NUM_THREADS="1")
        yield
    close_clients()


@pytest.fixture(scope="module")
def model() -> Any:
    return weft.LanguageModel(tiny_path())


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """A server for all tests that leave it as it was."""
    with served(TINY) as server:
        below = family(server.process.pid)
        yield server
    assert server.process.returncode == 0, server.said()
    all_gone(below)
    assert "Traceback" not in server.said()


@pytest.fixture
def server(shared: Running) -> Running:
    """Whole again, whatever an earlier test has killed."""
    until(lambda: sorted(family(shared.process.pid).values()) == NAMES, "all its processes")
    shared.ready()
    return shared


def logits(model: Any, remote: str | bool = False) -> torch.Tensor:
    with model.trace(PROMPT, remote=remote):
        found = model.lm_head.output[:, -1].save()
    return found


def slow(model: Any, url: str, steps: int = STEPS) -> Any:
    """A job that takes a worker some seconds, and saves `h` and `y`."""
    with model.trace(PROMPT, remote=url, blocking=False) as tracer:
        h = model.model.layers[0].output
        x = (h.sum() * 0).expand(SIZE, SIZE) + 1 / SIZE
        y = x
        for _ in range(steps):
            y = y @ x
        h.save("h")
        y.sum().save("y")
    return tracer.job


@cache
def plain() -> torch.Tensor:
    """What the first layer gives for the prompt, by a hook of PyTorch."""
    kept = {}
    net = AutoModelForCausalLM.from_pretrained(tiny_path())
    ids = AutoTokenizer.from_pretrained(tiny_path())(PROMPT, return_tensors="pt").input_ids
    net.model.layers[0].register_forward_hook(lambda *call: kept.update(h=call[2]))
    with torch.no_grad():
        net(ids)
    return kept["h"]


def check(job: Any) -> None:
    """It brings back what plain PyTorch gives."""
    saved = job.result()
    assert torch.equal(saved["h"], plain())
    assert torch.allclose(saved["y"], torch.tensor(float(SIZE)))


def running(job: Any) -> bool:
    return job.status().state == "running"


def health(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/health") as reply:
        return json.load(reply)


def left_files(server: Running) -> list[Path]:
    """What it has left for clients."""
    files = (state_folder() / "servers").glob("*")  # nothing where no server left any so far
    return [path for path in files if f'"pid":{server.process.pid}}}' in path.read_text()]


# -- a server that is there ----------------------------------------------------------------------


def test_a_server_is_ready_when_its_models_are(server: Running) -> None:
    told = health(server.url)
    assert (told["live"], told["ready"]) == (True, True)
    assert told["parts"]["models"] == "1 of 1 ready"
    (info,) = weft.models(server.url)
    assert (info.id, info.state) == ("tiny", "ready")


def test_it_says_where_it_is_and_what_to_type(server: Running) -> None:
    first, *rest = server.said().splitlines()
    assert first == f"Weft serves tiny at {server.url}"
    assert any('weft.LanguageModel("tiny", remote=True)' in line for line in rest)
    assert any("Ctrl-C stops" in line for line in rest)


def test_a_block_gives_there_what_it_gives_here(server: Running, model: Any) -> None:
    assert torch.equal(logits(model, server.url), logits(model))


def test_a_generation_ends_at_a_stop_string_there_as_here(server: Running, model: Any) -> None:
    """A worker reads text too: its tokenizer is the one that lies beside the model."""
    ids = []
    for remote in (server.url, False):
        with model.generate(
            PROMPT, max_new_tokens=8, do_sample=False, stop_strings=["."], remote=remote
        ) as tracer:
            ids.append(tracer.result.save())
    assert torch.equal(*ids)
    assert AutoTokenizer.from_pretrained(tiny_path()).decode(ids[0][0]).endswith(".")
    assert ids[0].shape[-1] < len(AutoTokenizer.from_pretrained(tiny_path())(PROMPT).input_ids) + 8


def test_the_only_server_of_this_machine_is_found_by_itself(server: Running, model: Any) -> None:
    assert torch.equal(logits(model, True), logits(model))


def test_the_key_is_for_this_user_only(server: Running) -> None:
    (path,) = left_files(server)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    left = json.loads(path.read_text())
    assert (left["url"], left["pid"]) == (server.url, server.process.pid)
    for file in server.data.rglob("*"):
        with suppress(FileNotFoundError):  # it may be one that is written just now
            assert file.stat().st_mode & 0o077 == 0, file


def test_without_a_key_nobody_is_let_in(server: Running, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(AccessError):
        weft.models(server.url)
    monkeypatch.setenv("WEFT_HOST", server.url)
    monkeypatch.setenv("WEFT_KEY", "weft_" + 43 * "x")
    with pytest.raises(AccessError):
        weft.models()


def test_it_is_a_gateway_a_checker_and_a_worker_for_each_model(server: Running) -> None:
    assert sorted(family(server.process.pid).values()) == NAMES


def test_neither_the_fleet_nor_the_gateway_has_torch(server: Running) -> None:
    def has_torch(pid: int) -> bool:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()

    assert not has_torch(server.process.pid)
    assert not has_torch(one(server.process.pid, "gateway"))
    assert has_torch(one(server.process.pid, "worker"))


def test_no_key_stands_where_other_processes_see_it(server: Running) -> None:
    (path,) = left_files(server)
    key = json.loads(path.read_text())["key"].encode()
    for pid in [server.process.pid, *family(server.process.pid)]:
        for what in ("environ", "cmdline"):
            assert key not in Path(f"/proc/{pid}/{what}").read_bytes()
    assert key not in server.said().encode()


def test_no_process_has_files_of_another_but_what_it_was_given(server: Running) -> None:
    """Who draws strangers' graphs has no socket on which the server listens."""
    port = urlsplit(server.url).port
    inode = _listening_inode(port)
    holders = {
        name
        for pid, name in family(server.process.pid).items()
        if f"socket:[{inode}]" in opened(pid)
    }
    assert holders == {"weft:gateway"}


def _listening_inode(port: int | None) -> str:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (found,) = [row[9] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A"]
    return found


# -- kill -9 of a part ---------------------------------------------------------------------------


def test_a_job_whose_worker_is_killed_is_run_again_by_a_new_one(server: Running, model: Any):
    job = slow(model, server.url)
    until(lambda: running(job))
    kill(one(server.process.pid, "worker"))
    check(job)
    assert (job.status().state, job.status().attempts) == ("done", 2)


def test_a_job_that_its_workers_die_of_fails(server: Running, model: Any) -> None:
    job = slow(model, server.url, steps=LONG)
    for attempt in (1, 2, 3):
        until(lambda: job.status().attempts == attempt and running(job))  # noqa: B023
        kill(one(server.process.pid, "worker"))
    with pytest.raises(WorkerLostError, match="3 times"):
        job.result()
    assert torch.equal(logits(model, server.url), logits(model))


def test_who_follows_a_job_hears_its_end_after_the_gateway_was_killed(server: Running, model: Any):
    job = slow(model, server.url)
    heard: list[Any] = []
    follower = threading.Thread(target=lambda: heard.extend(job.events()))
    follower.start()
    until(lambda: running(job))
    kill(one(server.process.pid, "gateway"))
    follower.join(PATIENCE)
    names = [type(event).__name__ for event in heard]
    assert names[-1] == "EndEvent"
    assert names.count("EndEvent") == 1
    check(job)
    assert job.status().attempts == 1


def test_every_acknowledged_job_is_there_after_the_gateway_was_killed(server: Running, model: Any):
    jobs = [slow(model, server.url, steps=3) for _ in range(5)]
    kill(one(server.process.pid, "gateway"))
    for job in jobs:
        check(weft.Job.get(job.id, remote=server.url))


def test_jobs_go_on_after_the_checker_was_killed(server: Running, model: Any) -> None:
    kill(one(server.process.pid, "checker"))
    job = slow(model, server.url, steps=3)
    check(job)


# -- the end -------------------------------------------------------------------------------------


def test_a_server_that_is_told_to_end_loses_nothing(model: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    patient = ("--drain-seconds", "100", "--lease-seconds", "100")
    with served(TINY, data=data, options=patient) as server, ThreadPoolExecutor(1) as beside:
        below = family(server.process.pid)
        first, second = slow(model, server.url), slow(model, server.url, steps=3)
        until(lambda: running(first))
        with stopped(one(server.process.pid, "worker")):  # the job takes as long as the test does
            fetched = beside.submit(check, first)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: health_status(server.url) == 503)
            with pytest.raises(ModelNotReadyError, match="about to stop"):
                refused_at_once(model, server.url)
        fetched.result()  # what runs may finish, and be fetched
        assert server.process.wait(PATIENCE) == 0
        _nothing_is_left(server, below)
    with served(TINY, data=data, port=urlsplit(server.url).port or 0) as server:
        check(second)  # what waited is done when the server is there again
        below = family(server.process.pid)
        assert len(below) == 4
        server.kill()  # and no process outlives one that is killed
        all_gone(below)
        assert left_files(server) == []
    assert not [path for path in objects_of(data).rglob("*") if path.is_file()]
    with closing(sqlite3.connect(ledger_of(data))) as rows:
        names = {name for (name,) in rows.execute("SELECT name FROM object")}
    assert names == {f"results/{first.id}", f"results/{second.id}"}


def health_status(url: str) -> int:
    try:
        with urllib.request.urlopen(f"{url}/health") as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def refused_at_once(model: Any, url: str) -> None:
    """Submits to a server without the client's patience."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEFT_RETRY_SECONDS", "0.1")
        slow(model, url, steps=1)


def _nothing_is_left(server: Running, below: dict[int, str]) -> None:
    all_gone(below)
    assert left_files(server) == []
    assert list((objects_of(server.data) / NEW).iterdir()) == []
    parts = urlsplit(server.url)
    socket.create_server((parts.hostname, parts.port)).close()


def test_a_job_that_runs_on_and_on_waits_for_the_next_server(model: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with served(TINY, data=data, options=("--drain-seconds", "0.2")) as server:
        below = family(server.process.pid)
        job = slow(model, server.url, steps=LONG)
        until(lambda: running(job))
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0
        _nothing_is_left(server, below)
    with open_keys(data) as ledger:
        (left,) = ledger.unfinished()
        assert (left.id, left.state, left.token, left.attempts) == (job.id, "queued", None, 1)


def test_a_server_ends_with_whoever_started_it(tmp_path: Path) -> None:
    code = f"""
import time
from weft.testing.process import started
with started({TINY!r}) as server:
    print(server.process.pid, server.data, flush=True)
    time.sleep(1000)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        pid, folder = starter.stdout.readline().split()
        until(lambda: pids(int(pid), "gateway"))
        starter.kill()
    until(lambda: not alive(int(pid)))
    for path in sorted(Path(folder).parent.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    Path(folder).parent.rmdir()


def test_a_server_ends_at_once_while_it_loads(tmp_path: Path) -> None:
    with started(TINY) as server:
        until(lambda: pids(server.process.pid, "gateway"))
        below = family(server.process.pid)
        assert server.end(signal.SIGINT) == 0
        all_gone(below)
        assert "Traceback" not in server.said()


# -- keys ----------------------------------------------------------------------------------------


def test_with_key_only_those_with_a_key_are_let_in(monkeypatch, tmp_path: Path) -> None:
    with started(TINY, options=("--key-only",)) as server:
        until(lambda: pids(server.process.pid, "gateway"))
        until(lambda: "Weft serves" in server.said())
        url = server.said().split(" at ")[1].split()[0]
        until(lambda: health_status(url) in (200, 503), "an answer")
        assert left_files(server) == []
        assert "weft keys add" in server.said()
        with pytest.raises(AccessError):
            weft.status(url)
        with open_keys(server.data) as ledger:
            key = add_key(ledger, "ada", 1.0)
        monkeypatch.setenv("WEFT_HOST", url)
        monkeypatch.setenv("WEFT_KEY", key)
        assert [one.id for one in weft.status().models] == ["tiny"]
        with open_keys(server.data) as ledger:
            (made,) = ledger.keys()
            revoke_key(ledger, made.digest[:12], 2.0)
        with pytest.raises(AccessError):
            weft.status()


# -- a server that cannot be ---------------------------------------------------------------------


def test_a_model_that_is_nowhere_is_a_clear_error(tmp_path: Path) -> None:
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with started("nobody/nothing", environ=offline) as server:
        assert server.process.wait(START_SECONDS) == 2
        *_, last = [line for line in server.said().splitlines() if line.startswith("weft:")]
        assert "no model is left" in last and "nobody/nothing" in last
        assert left_files(server) == []
