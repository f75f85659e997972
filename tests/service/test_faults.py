"""`kill -9`, two hundred times at random moments under load: nothing acknowledged is lost.

Clients submit small jobs, follow some of them and cancel a few, while processes of the server are
killed: workers, checkers, gateways, the process from which these are forked, and the whole server,
which is then started again over the same folder. In the end every acknowledged job is over once,
and every one that is done has the one result that plain PyTorch gives: to the bit where it had
asked to run alone, within the bound where it may have shared a forward.
"""

from __future__ import annotations

import os
import random
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import weft
from tests.home import own_home
from tests.service.processes import all_gone, family, kill, one, until
from weft.client.servers import close as close_clients
from weft.service.fleet.keys import LOCAL_FILE, LOCAL_OWNER, open_keys
from weft.service.fleet.places import ledger_of, objects_of
from weft.service.jobs.life import FINAL, Job
from weft.service.store.bells import Bells
from weft.service.store.folder import NEW
from weft.service.store.interface import Ledger, Objects
from weft.service.store.shelf import open_store
from weft.service.store.sweep import YOUNG, recover
from weft.service.worker.loop import measure
from weft.settings import Settings
from weft.testing import tiny_path
from weft.testing.process import Running, started
from weft.testing.same import bitwise, bounded

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]

SEEDS = (20, 21)
"""Each is a test with a server of its own: they may run side by side."""
KILLS = int(os.environ.get("WEFT_TEST_KILLS", "200")) // len(SEEDS)
SERVERS = 2
"""So many of them are of the whole server."""
NURSERIES = 1
ROLES = {"worker": 5, "checker": 3, "gateway": 2}
"""How often each of the others is the one."""
PAUSE = 0.2
"""Seconds before a kill, at most."""
CLIENTS = 4
PROMPT = "The capital of France is"
STRENGTHS = (0.0, 0.5, 1.0, 2.0, 4.0)
MATRIX, STEPS = 200, 20
"""What makes a job take some time: so many products of matrices of this size."""


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A home of its own, and clients with patience."""
    own_home(monkeypatch, tmp_path, OMP_NUM_THREADS="1", WEFT_RETRY_SECONDS="90")
    yield
    close_clients()


# -- what the jobs ask, and what plain PyTorch gives -----------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What a job asks: how much the output of a layer is scaled, and whether it runs alone."""

    strength: float
    alone: bool


def ask(model: Any, url: str, asked: Asked) -> Any:
    """Submits a job: the logits with the output of a layer scaled; returns when acknowledged."""
    with model.trace(PROMPT, remote=url, blocking=False, alone=asked.alone) as tracer:
        h = model.model.layers[1].mlp.output
        y = x = (h.sum() * 0).expand(MATRIX, MATRIX) + 1 / MATRIX
        for _ in range(STEPS):
            y = y @ x
        h *= asked.strength
        model.lm_head.output[:, -1].save("logits")
        y[0, 0].save("y")
    return tracer.job


def expected() -> dict[float, torch.Tensor]:
    net = AutoModelForCausalLM.from_pretrained(tiny_path())
    ids = AutoTokenizer.from_pretrained(tiny_path())(PROMPT, return_tensors="pt").input_ids
    found = {}
    for strength in STRENGTHS:
        scale = net.model.layers[1].mlp.register_forward_hook(lambda *a: a[2] * strength)  # noqa: B023
        with torch.no_grad():
            found[strength] = net(ids).logits[:, -1]
        scale.remove()
    return found


# -- clients -------------------------------------------------------------------------------------


@dataclass
class Load:
    """Clients on threads. `acknowledged` holds what each job asks, by its id."""

    url: str
    model: Any
    seed: int
    acknowledged: dict[str, Asked] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    errors: list[BaseException] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Load:
        self._threads = [
            threading.Thread(target=self._client, args=(random.Random(self.seed + n),))
            for n in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        for thread in self._threads:
            thread.join()

    def _client(self, chance: random.Random) -> None:
        try:
            while not self.stopping.is_set():
                self._one(chance)
        except BaseException as error:  # noqa: BLE001 (the test raises it)
            self.errors.append(error)

    def _one(self, chance: random.Random) -> None:
        asked = Asked(chance.choice(STRENGTHS), alone=chance.random() < 0.5)
        job = ask(self.model, self.url, asked)
        assert job.id not in self.acknowledged
        self.acknowledged[job.id] = asked
        what = chance.random()
        if what < 0.1:
            self.cancelled.add(job.id)
            job.cancel()
        elif what < 0.6:
            job.wait()  # along its events, over as many connections as it takes
        self.stopping.wait(0.1)


# -- kills ---------------------------------------------------------------------------------------


class Killer:
    """Kills, and starts the server again where it is gone."""

    def __init__(self, stack: ExitStack, data: Path, seed: int) -> None:
        self._stack = stack
        self._data = data
        self._chance = random.Random(seed)
        self.count: Counter[str] = Counter()
        self.seen: dict[int, str] = {}
        self.logs: list[str] = []
        self.server = self._start(0)
        self.server.ready()
        self.url = self.server.url
        rows = sqlite3.connect(ledger_of(data), isolation_level=None)
        self._rows = stack.enter_context(closing(rows))

    def _start(self, port: int) -> Running:
        options = ("--attempts", "100")
        server = started(f"tiny={tiny_path()}", data=self._data, options=options, port=port)
        return self._stack.enter_context(server)

    def run(self) -> None:
        servers = self._moments(SERVERS)
        nurseries = self._moments(NURSERIES) - servers
        for number in range(KILLS):
            self._wait()
            if number in servers:
                self._kill_server()
            else:
                self._kill("nursery" if number in nurseries else self._role())

    def _moments(self, count: int) -> set[int]:
        return set(self._chance.sample(range(KILLS // 10, KILLS), count))

    def _role(self) -> str:
        return self._chance.choices([*ROLES], [*ROLES.values()])[0]

    def _wait(self) -> None:
        """Any time; on average each third time only after something was done again."""
        if self._chance.random() < 1 / 3:
            self.wait_for_another()
        time.sleep(self._chance.uniform(0, PAUSE))

    def wait_for_another(self) -> None:
        before = self.over()
        until(lambda: self.over() > before, "another job's end")

    def over(self) -> int:
        """How many jobs are."""
        query = "SELECT count(*) FROM job WHERE ended IS NOT NULL"
        return self._rows.execute(query).fetchone()[0]

    def _kill(self, role: str) -> None:
        here = self.server.process.pid
        pid = one(here, role)
        self.seen |= family(here)
        kill(pid)
        self.count[role] += 1

    def _kill_server(self) -> None:
        below = family(self.server.process.pid)
        self.server.kill()
        self.count["server"] += 1
        all_gone(below)
        self.logs.append(self.server.said())
        self.server = self._start(urlsplit(self.url).port or 0)


# -- what must be so -----------------------------------------------------------------------------


def jobs_of(data: Path) -> dict[str, Job]:
    with open_keys(data) as ledger:
        return {job.id: job for job in ledger.jobs(LOCAL_OWNER, 10**6)}


def all_over(data: Path) -> bool:
    with open_keys(data) as ledger:
        return not ledger.unfinished()


def check_results(load: Load, jobs: dict[str, Job], truth: dict[float, torch.Tensor]) -> None:
    """Whoever submitted a job gets what plain PyTorch gives."""
    assert load.acknowledged.keys() <= jobs.keys()
    for id, asked in load.acknowledged.items():
        if jobs[id].state == "done":
            saved = weft.Job.get(id, remote=load.url).result()
            same = bitwise if asked.alone else bounded
            same(saved["logits"], truth[asked.strength])
            assert torch.allclose(saved["y"], torch.tensor(1 / MATRIX)), id


@contextmanager
def store_of(data: Path) -> Iterator[tuple[Ledger, Objects]]:
    with Bells.of_models() as bells:
        ledger, objects = open_store(ledger_of(data), objects_of(data), Settings(), bells)
        yield ledger, objects
        objects.close()
        ledger.close()


def check_jobs(data: Path, load: Load, jobs: dict[str, Job]) -> None:
    """Every job is over, once, and has the one result that its row says."""
    with store_of(data) as (ledger, objects):
        for job in jobs.values():
            assert job.state in FINAL
            assert job.state == "done" or (job.state == "cancelled" and job.id in load.cancelled), (
                job
            )
            kinds = [note.kind for note in ledger.notes(job.id)]
            assert kinds.count("end") == 1 and kinds[-1] == "end"
            if job.state == "done":
                result = measure(objects, f"results/{job.id}")
                assert result == (job.result_bytes, job.result_sha256)


def check_files(data: Path, jobs: dict[str, Job]) -> None:
    """Nothing else is there, after what a server does in its first minute."""
    done = sorted(f"results/{job.id}" for job in jobs.values() if job.state == "done")
    with store_of(data) as (ledger, objects):
        recover(ledger, objects, time.time() + YOUNG + 1)
        assert objects.names("") == done
    assert list((objects_of(data) / NEW).iterdir()) == []
    database = ledger_of(data).name
    ours = {f"{database}{end}" for end in ("", "-wal", "-shm", "-door")}
    assert {path.name for path in data.iterdir()} <= {"lock", LOCAL_FILE, "objects", *ours}
    with closing(sqlite3.connect(ledger_of(data))) as rows:
        assert rows.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def told(killer: Killer, taken: float, jobs: dict[str, Job]) -> str:
    done = sum(job.state == "done" for job in jobs.values())
    again = sum(job.attempts > 1 or job.pricings > 1 for job in jobs.values())
    assert done > KILLS / 2
    assert again > KILLS / 20
    return (
        f"{dict(killer.count)}: {taken / KILLS:.2f} s each; {len(jobs)} jobs, {done} done, {again} "
        "begun more than once"
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_acknowledged_is_lost_over_many_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    truth, data = expected(), tmp_path / "served"
    model = weft.LanguageModel(tiny_path())
    with ExitStack() as stack:
        killer = Killer(stack, data, seed)
        # What a server leaves for clients goes with it: they are told instead.
        monkeypatch.setenv("WEFT_HOST", killer.url)
        monkeypatch.setenv("WEFT_KEY", (data / LOCAL_FILE).read_text())
        began = time.monotonic()
        with Load(killer.url, model, seed) as load:
            killer.run()
            taken = time.monotonic() - began
            killer.server.ready()
            while killer.over() <= KILLS:
                killer.wait_for_another()
        assert not load.errors, load.errors
        assert killer.count.total() == KILLS
        assert set(killer.count) == {*ROLES, "server", "nursery"}
        until(lambda: all_over(data))
        jobs = jobs_of(data)
        check_results(load, jobs, truth)
        below = family(killer.server.process.pid)
        assert killer.server.end() == 0
        all_gone(below | killer.seen)
    logs = "\n".join([*killer.logs, killer.server.said()])
    assert "Traceback" not in logs, logs
    check_jobs(data, load, jobs)
    check_files(data, jobs)
    print(told(killer, taken, jobs))
