"""Several models on one real server: loaded on demand, evicted, deployed, refused, remembered.

One server for all tests, in any order: who counts on a state of a model first brings it about. A
job may be over before the word that its model is there, or has left, has reached who tells of it:
what is told of models is waited for.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import weft
from tests.home import own_home
from tests.service.processes import all_gone, family, kill, one, pids, stopped, until
from weft.cli import main
from weft.client.servers import close as close_clients
from weft.errors import ModelNotReadyError, WrongModelError
from weft.testing import tiny_path
from weft.testing.process import Running, served

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

PROMPT = "The capital of France is"
BUDGET = 300 << 20
"""For one worker whose memory is estimated (its weights and 256 MiB); for two as measured."""


@pytest.fixture(scope="module", autouse=True)
def environ(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home of its own."""
    with pytest.MonkeyPatch.context() as patch:
        own_home(patch, tmp_path_factory.mktemp("home"), OMP_NUM_THREADS="1")
        yield
    close_clients()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration and a root with models: good ones, and others."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("a", "b", "new", "late", "huge", "broken", "coded", "gone"):
        shutil.copytree(tiny_path(), folder / "root" / name)
    change(folder / "root" / "huge", vocab_size=4_000_000)
    weights = folder / "root" / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    code = (
        f"open({str(folder / 'ran')!r}, 'w')\nfrom transformers import LlamaForCausalLM as Mine\n"
    )
    (folder / "root" / "coded" / "mine.py").write_text(code)
    change(folder / "root" / "coded", auto_map={"AutoModelForCausalLM": "mine.Mine"})
    (folder / "server.toml").write_text(
        f"""
        [server]
        models_bytes = {BUDGET}
        model_roots = "{folder / "root"}"
        [[models]]
        id = "a"
        source = "root/a"
        load = "on-demand"
        [[models]]
        source = "./root/b"
        load = "on-demand"
        """
    )
    return folder


def change(model: Path, **fields: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


class House:
    """A server that can be started again; `now` is the one that runs."""

    def __init__(self, folder: Path) -> None:
        self._options = ("--config", str(folder / "server.toml"))
        self._data = folder / "data"
        self._stack = ExitStack()
        self._start()

    def _start(self) -> None:
        self.now = self._stack.enter_context(served(options=self._options, data=self._data))
        self._below = family(self.now.process.pid)

    def end(self) -> None:
        self._stack.close()
        assert self.now.process.returncode == 0, self.now.said()
        all_gone(self._below)

    def again(self) -> Running:
        self.end()
        close_clients()
        self._start()
        return self.now


@pytest.fixture(scope="module")
def house(folder: Path) -> Iterator[House]:
    house = House(folder)
    settle(house.now)
    assert set(states(house.now).values()) <= {"cold", "warm"}
    assert pids(house.now.process.pid, "worker") == [], "nobody has asked for anything"
    yield house
    house.end()


@pytest.fixture
def server(house: House) -> Running:
    return house.now


@pytest.fixture(scope="module")
def model() -> Any:
    return weft.LanguageModel(tiny_path())


@pytest.fixture(scope="module")
def plain(model: Any) -> torch.Tensor:
    with model.trace(PROMPT):
        found = model.lm_head.output[:, -1].save()
    return found


def logits(server: Running, name: str) -> torch.Tensor:
    model = weft.LanguageModel(name, remote=server.url)
    with model.trace(PROMPT):
        found = model.lm_head.output[:, -1].save()
    return found


def info(server: Running, name: str) -> Any:
    """What is told of a model, as soon as it is listed."""
    listed = lambda: [model for model in weft.models(server.url) if model.id == name]
    return until(listed, f"that {name} is listed")[0]


def states(server: Running) -> dict[str, str]:
    return {model.id: model.state for model in weft.models(server.url)}


def comes_to(server: Running, name: str, *wanted: str) -> None:
    """Waits until the model is told to be in one of these states."""
    until(lambda: states(server).get(name) in wanted, f"that {name} is {' or '.join(wanted)}")


def settle(server: Running) -> None:
    until(lambda: "loading" not in states(server).values(), "that the checker has looked at them")


def run(capsys: pytest.CaptureFixture[str], server: Running, *command: str) -> str:
    status = main([*command, "--server", server.url])
    out, err = capsys.readouterr()
    assert status == (2 if err else 0)
    return out + err


def put_away(server: Running, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Nobody has the model in memory from now on."""
    run(capsys, server, "evict", name)
    comes_to(server, name, "cold", "warm")


def test_a_model_on_demand_is_there_before_it_is_loaded_and_loads_for_a_job(
    server: Running, plain: torch.Tensor, capsys
) -> None:
    put_away(server, capsys, "a")
    model = weft.LanguageModel("a", remote=server.url)
    with stopped(one(server.process.pid, "nursery")):  # where a worker would come from
        with model.trace(PROMPT, blocking=False, keep_seconds=77) as tracer:
            found = model.lm_head.output[:, -1].save("x")
        until(lambda: tracer.job.status().model_state == "loading", "the beginning of the load")
        assert tracer.job.status().state == "queued"
    events = list(tracer.job.events())
    assert torch.equal(tracer.job.result("x"), plain) and torch.equal(found, plain)
    comes_to(server, "a", "ready")
    until(lambda: info(server, "a").host_bytes, "that its process was measured")
    told = info(server, "a")
    assert (told.state, told.pinned, told.loaded_bytes) == ("ready", False, told.weight_bytes)
    assert 10 << 20 < told.host_bytes <= BUDGET and told.used is not None
    loads = [one for one in events if getattr(one, "kind", "") == "load"]
    assert all(0 <= one.done <= one.total for one in loads)
    over = tracer.job.status()
    assert over.expires is not None
    assert abs(over.expires - (over.created + sum(over.stages.values()) + 77)) < 5


def test_the_least_recently_used_leaves_for_another_and_comes_back(
    server: Running, plain: torch.Tensor, capsys
) -> None:
    assert torch.equal(logits(server, "a"), plain)
    run(capsys, server, "deploy", "new")
    assert torch.equal(logits(server, "new"), plain)
    comes_to(server, "a", "cold", "warm")  # both did not fit as it was estimated
    assert info(server, "a").host_bytes == 0 and info(server, "a").need_bytes > 10 << 20
    assert torch.equal(logits(server, "a"), plain)
    comes_to(server, "a", "ready")
    assert states(server)["new"] == "ready", "measured, both fit"


def test_what_cannot_fit_is_refused_by_name_with_the_figures(
    server: Running, plain: torch.Tensor, capsys
) -> None:
    assert torch.equal(logits(server, "a"), plain)
    comes_to(server, "a", "ready")
    assert "huge" in run(capsys, server, "deploy", "huge")
    until(lambda: info(server, "huge").fingerprint, "that the checker knows it")
    with pytest.raises(ModelNotReadyError, match=r"huge .*it needs .*GiB of memory; .*300.0 MiB"):
        logits(server, "huge")
    comes_to(server, "huge", "failed")
    assert "300.0 MiB" in info(server, "huge").reason
    assert states(server)["a"] == "ready", "nobody left for it"


def test_a_load_that_fails_fails_its_jobs_by_name_and_can_be_tried_again(
    server: Running, folder: Path, plain: torch.Tensor, capsys
) -> None:
    run(capsys, server, "deploy", "broken")
    until(lambda: info(server, "broken").fingerprint, "that the checker knows it")
    with pytest.raises(ModelNotReadyError, match="broken could not be loaded"):
        logits(server, "broken")
    comes_to(server, "broken", "failed")
    assert str(folder) not in info(server, "broken").reason
    health = httpx.get(f"{server.url}/health/ready")
    others = health.json()["parts"]["others"].split()
    assert health.status_code == 200 and int(others[0]) < int(others[2])
    shutil.copy(Path(tiny_path()) / "model.safetensors", folder / "root" / "broken")
    run(capsys, server, "deploy", "broken")
    until(lambda: info(server, "broken").state != "failed", "another chance")
    assert torch.equal(logits(server, "broken"), plain)


def test_code_that_lies_beside_weights_is_never_run(server: Running, folder: Path, capsys) -> None:
    run(capsys, server, "deploy", "coded")
    until(lambda: info(server, "coded").state != "loading", "that the checker has looked")
    logits(server, "coded")
    assert not (folder / "ran").exists()


def test_evicting_by_hand_and_loading_again(server: Running, plain: torch.Tensor, capsys) -> None:
    logits(server, "a")
    comes_to(server, "a", "ready")
    before = set(pids(server.process.pid, "worker"))
    put_away(server, capsys, "a")
    until(lambda: before - set(pids(server.process.pid, "worker")), "the end of its process")
    assert len(before - set(pids(server.process.pid, "worker"))) == 1
    assert torch.equal(logits(server, "a"), plain)


def test_a_pinned_model_is_not_evicted(server: Running, capsys) -> None:
    run(capsys, server, "deploy", "late", "--pin")
    comes_to(server, "late", "ready")
    assert "is pinned" in run(capsys, server, "evict", "late")
    assert "own configuration" in run(capsys, server, "evict", "a", "--forget")
    assert json.loads(run(capsys, server, "list", "--json"))["models"][0]["id"] == "a"
    run(capsys, server, "evict", "late", "--forget")


def test_a_worker_that_dies_while_jobs_wait_is_replaced(
    server: Running, plain: torch.Tensor
) -> None:
    model = weft.LanguageModel("b", remote=server.url)
    with model.trace(PROMPT, blocking=False) as tracer:
        model.lm_head.output[:, -1].save("x")
    for pid in pids(server.process.pid, "worker"):
        with suppress(ProcessLookupError):  # one of a model that was put away has just ended
            kill(pid)
    assert torch.equal(tracer.job.result("x"), plain)


def test_forgetting_a_model_ends_what_waits_for_it(server: Running, capsys) -> None:
    """It is unfit, so its jobs would be refused; those of a model that is gone end as such."""
    run(capsys, server, "deploy", "gone")
    until(lambda: info(server, "gone").fingerprint, "that the checker knows it")
    run(capsys, server, "evict", "gone", "--forget")
    until(lambda: "gone" not in states(server), "that it is listed no more")
    with pytest.raises(WrongModelError):
        logits(server, "gone")


def test_all_of_it_is_there_after_a_restart(house: House, plain: torch.Tensor, capsys) -> None:
    """What was deployed, and what was measured, which is not estimated anew."""
    server = house.now
    for name in ("a", "b"):
        assert torch.equal(logits(server, name), plain)
    for name, *how in (("huge",), ("coded",), ("late", "--pin")):
        run(capsys, server, "deploy", name, *how)
    comes_to(server, "late", "ready")
    before = {model.id: model for model in weft.models(server.url)}
    server = house.again()
    after = {model.id: model for model in weft.models(server.url)}
    assert set(after) == set(before) >= {"a", "b", "huge", "coded", "late"}
    assert after["b"].need_bytes == before["b"].need_bytes > 0
    assert after["late"].pinned and not after["coded"].pinned
    assert torch.equal(logits(server, "a"), plain)
    run(capsys, server, "evict", "late", "--forget")
