"""The shared service with its weights on a device: walls, strangers, training, two models, faults.

Each test has a server of its own home, which must have all walls where this system has them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import weft
from tests.gpu.place import DEVICE, IS_CUDA
from tests.home import own_home
from tests.service.processes import one, until
from tests.service.test_session_faults import trained
from weft.client.find import Place
from weft.client.servers import Server as Known
from weft.client.servers import close as close_clients
from weft.service.fleet.keys import add_key, open_keys
from weft.service.sandbox.means import means
from weft.settings import Settings
from weft.testing import tiny_path
from weft.testing.process import Running, served
from weft.testing.same import bitwise, bounded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]

USERS, JOBS = 4, 24
PROMPTS = [f"{' and '.join(['one'] * n)} is" for n in (1, 2, 5, 9, 17, 30)]
SIDE, TIMES = (8192, 100) if IS_CUDA else (500, 100)
"""Products that keep the device busy for a few seconds."""


@pytest.fixture(scope="module", autouse=True)
def environ(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        own_home(patch, tmp_path_factory.mktemp("home"), OMP_NUM_THREADS="1")
        yield
    close_clients()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    walls = "auto" if means().missing else "require"
    options = ("--device", str(DEVICE), "--sandbox", walls)
    with served(f"tiny={tiny_path()}", options=options) as server:
        yield server


@pytest.fixture(scope="module")
def here() -> Any:
    return weft.LanguageModel(tiny_path(), device_map=str(DEVICE))


@pytest.fixture(scope="module")
def users(server: Running) -> Iterator[list[Any]]:
    """A model for each, with a key of his own."""
    with ExitStack() as stack:
        with open_keys(server.data) as ledger:
            keys = [add_key(ledger, f"user{n}", time.time()) for n in range(USERS)]
        found = []
        for key in keys:
            there = Known(Place(server.url, key), Settings())
            stack.callback(there.close)
            found.append(weft.LanguageModel("tiny", remote=there))
        for number in range(3):
            asked(found[0], number, blocking=False).job.result()  # a worker knows who may share
        yield found


def asked(model: Any, number: int, **options: Any) -> Any:
    """One of three kinds, each number another one."""
    layer = model.model.layers[number % 4]
    with model.trace(PROMPTS[number % len(PROMPTS)], **options) as tracer:
        if number % 3 == 1:
            layer.output[:, -1] *= 1 + number / 10
        if number % 3 == 2:
            layer.output[:] = layer.output.flip(1)
        layer.output[:, -1].save("h")
        model.lm_head.output[:, -1].save("logits")
    return tracer


def generated(model: Any, number: int, **options: Any) -> Any:
    with model.generate(PROMPTS[number % 4], max_new_tokens=6, **options) as tracer:
        model.model.layers[number % 4].output[:, -1] *= 1.1
        tracer.result.save("ids")
    return tracer


def busy(model: Any) -> Any:
    """A job that keeps the device."""
    with model.trace(PROMPTS[0], alone=True, blocking=False) as tracer:
        x = (model.model.layers[0].output.sum() * 0).expand(SIDE, SIDE) + 1 / SIDE
        y = x
        for _ in range(TIMES):
            y = y @ x
        y[0, 0].save("y")
    until(lambda: tracer.job.status().state == "running", "the long job")
    return tracer.job


def submitted(users: list[Any], block: Any, count: int) -> list[Any]:
    """Jobs that are sent at once, by users in turn."""
    with ThreadPoolExecutor(count) as pool:
        send = lambda n: block(users[n % USERS], n, blocking=False).job
        return list(pool.map(send, range(count)))


def expected(model: Any, number: int) -> dict[str, Any]:
    return {name: value.cpu() for name, value in asked(model, number).results.items()}


def test_the_walls_stand(server: Running, users: list[Any]) -> None:
    status = Path(f"/proc/{one(server.process.pid, 'worker')}/status").read_text()
    assert ("Seccomp:\t2" in status) == means().seccomp
    assert "sandbox of checker and workers" in server.said()


def test_strangers_share_forwards(users: list[Any], here: Any) -> None:
    long = busy(users[0])
    jobs = submitted(users, asked, JOBS)
    was_busy = long.status().state == "running"
    for number, job in enumerate(jobs):
        bounded(dict(job.result()), expected(here, number))
    assert long.result()
    if was_busy:
        assert sum(job.status().merged for job in jobs) >= 0.9 * JOBS


def test_strangers_share_steps(users: list[Any], here: Any) -> None:
    long = busy(users[0])
    jobs = submitted(users, generated, 8)
    for number, job in enumerate(jobs):
        bitwise(job.result()["ids"], generated(here, number).results["ids"].cpu())
    assert long.result()


def test_who_stops_the_device_stops_nobody(users: list[Any], here: Any) -> None:
    """An index that only the device sees ends its process; who shared it begins again."""

    def block(model: Any, number: int, **options: Any) -> Any:
        if number != 5:
            return asked(model, number, **options)
        with model.trace(PROMPTS[1], **options) as tracer:
            far = model.lm_head.output[:, -1].argmax(-1) + 100_000
            model.model.norm.output.index_select(1, far).save("h")
        return tracer

    long = busy(users[0])
    jobs = submitted(users, block, 8)
    for number, job in enumerate(jobs):
        if number == 5:
            with pytest.raises(weft.WeftError, match=r"(?i)index"):
                job.result()
        else:
            bounded(dict(job.result()), expected(here, number))
    assert long.result()


@pytest.mark.skipif(not IS_CUDA, reason="a CPU's memory is not bounded so")
def test_memory_that_there_is_not(users: list[Any], here: Any) -> None:
    """A job that cannot fit is told the figures; one after it runs."""
    with pytest.raises(weft.WeftError, match=r"GiB"), users[0].trace(PROMPTS[0]):
        h = users[0].model.layers[0].output.sum()
        h.expand(2**17, 2**18).clone().sum().save()  # 128 GiB
    bounded(dict(asked(users[1], 1, blocking=False).job.result()), expected(here, 1))


def test_training_on_the_server(server: Running, here: Any) -> None:
    there = weft.LanguageModel("tiny", remote=server.url)
    mine = trained(there, server.url)
    for found, right in zip(mine, trained(here, False), strict=True):
        bounded(found, _on_cpu(right))


def _on_cpu(value: Any) -> Any:
    return [one.cpu() for one in value] if isinstance(value, list) else value.cpu()


def test_two_models_take_turns_on_a_device(tmp_path: Path, here: Any) -> None:
    """There is room for one and a half: who was used least recently leaves."""
    place = "models_device_bytes" if IS_CUDA else "models_bytes"
    config = tmp_path / "server.toml"
    models = "".join(
        f'[[models]]\nid = "{name}"\nsource = "{tiny_path()}"\ndevice = "{DEVICE}"\n'
        'load = "on-demand"\n'
        for name in ("a", "b")
    )
    config.write_text(f"[server]\n{place} = {700 << 20 if IS_CUDA else 300 << 20}\n{models}")
    with served(options=("--config", str(config)), data=tmp_path / "data") as server:
        info = lambda: {model.id: model for model in weft.models(server.url)}
        until(lambda: all(one.fingerprint for one in info().values()), "that both are known")
        for name in ("a", "b", "a"):
            model = weft.LanguageModel(name, remote=server.url)
            got = asked(model, 1, alone=True, blocking=False).job.result()
            bitwise(dict(got), expected(here, 1))
            until(lambda name=name: info()[name].state == "ready", "that it is there")
        told = info()["a"]
        print(told)
        assert told.loaded_bytes == told.weight_bytes > 0
        if IS_CUDA:
            assert told.device_bytes >= told.weight_bytes
            assert told.need_device_bytes >= told.weight_bytes
