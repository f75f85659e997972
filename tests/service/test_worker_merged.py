"""Jobs of several users, drawn together by a real worker behind a real gateway."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from msgspec.structs import replace

import weft
from tests.engine.strangers import KINDS, Experiments, Generations, ids
from tests.families import zoo
from tests.service import jobs as jobs_of
from tests.service.processes import until
from weft.client.find import Place
from weft.client.servers import Server as Known
from weft.engine.rolling import Decode
from weft.errors import CancelledError, RunError
from weft.service.fleet.keys import add_key
from weft.service.store.memory import MemoryLedger
from weft.service.worker.batch import STEPS, Claims, groups
from weft.service.worker.loop import Worker
from weft.service.worker.pulse import Pulse
from weft.settings import Settings
from weft.testing.same import bounded
from weft.testing.service import Server, serve

USERS = 4
COUNT = 16


class Gate:
    """Holds a worker before it claims anything, until the jobs of a test are queued."""

    def __init__(self, server: Server, patch: pytest.MonkeyPatch) -> None:
        self._server = server
        self._claiming = threading.Lock()
        self._is_open = True
        self.sizes: list[int] = []
        claim = Claims.next

        def held(claims: Claims) -> Any:
            with self._claiming:
                jobs = claim(claims) if self._is_open else []
            self.sizes += [len(jobs)] if jobs else []
            return jobs

        patch.setattr(Claims, "next", held)

    def hold(self) -> None:
        with self._claiming:  # a claim that was on its way has found nothing
            self._is_open = False

    def let_go(self, count: int) -> None:
        """Once so many jobs are queued."""
        until(lambda: self._server.ledger.counts().get(("m", "queued"), 0) >= count, "the queue")
        self.sizes.clear()
        self._is_open = True


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def net() -> Any:
    return zoo.build("llama")


@pytest.fixture(scope="module")
def server(net: Any) -> Iterator[Server]:
    with serve({"m": net}) as server:
        yield server


@pytest.fixture(scope="module")
def gate(server: Server, patch: pytest.MonkeyPatch) -> Gate:
    return Gate(server, patch)


@pytest.fixture(scope="module")
def models(server: Server, net: Any) -> Iterator[list[Any]]:
    """A model for each user."""
    found = []
    for number in range(USERS):
        key = add_key(server.ledger, f"user{number}", time.time())
        there = Known(Place(server.url, key), Settings())
        model = weft.LanguageModel(net, remote=server.url)
        model._places.default = there
        found.append(model)
    generation(found[0], 0)  # a worker knows who may share once it has drawn one of each kind
    experiment(found[0], 0)
    yield found
    for model in found:
        model._places.default.close()


def experiment(model: Any, number: int, **options: Any) -> Any:
    kind = getattr(Experiments("llama", **options), KINDS[number % len(KINDS)])
    return kind(model, 5 + number % 20, number)


def submitted(model: Any, number: int) -> Any:
    """A job that nobody waits for."""
    return experiment(model, number, blocking=False).job


def test_users_share_forwards_and_get_what_they_get_alone(server, gate, models, net):
    here = weft.LanguageModel(net)
    gate.hold()
    jobs = [submitted(models[n % USERS], n) for n in range(COUNT)]
    gate.let_go(COUNT)
    merged = 0
    for number, job in enumerate(jobs):
        expected = {name: value.clone() for name, value in experiment(here, number).results.items()}
        bounded({name: job.result()[name] for name in expected}, expected)
        merged += job.status().merged
    assert merged >= 0.9 * COUNT
    assert max(gate.sizes) >= 8


def test_the_error_and_the_end_of_one_are_its_own(server, gate, models, net):
    gate.hold()
    fine = [submitted(models[n % USERS], n) for n in range(3)]
    bad = wrong(models[0])
    left = submitted(models[1], 4)
    alone = solitary(models[2])
    left.cancel()
    gate.let_go(5)
    here = weft.LanguageModel(net)
    for number, job in enumerate(fine):
        bounded(dict(job.result()), dict(experiment(here, number).results))
    with pytest.raises(RunError, match="index"):
        bad.result()
    with pytest.raises(CancelledError):
        left.result()
    assert alone.result()["h"].shape == (1, 6, 32)
    assert not alone.status().merged and all(job.status().merged for job in fine)
    assert not server.ledger.unfinished()


def wrong(model: Any) -> Any:
    with model.trace(ids(6, 1), blocking=False) as tracer:
        model.model.layers[0].output[:, torch.tensor([99])].save("h")
    return tracer.job


def solitary(model: Any) -> Any:
    with model.trace(ids(6, 1), alone=True, blocking=False) as tracer:
        model.model.layers[0].output.save("h")
    return tracer.job


def test_a_lost_worker_loses_nobody(server, gate, models, monkeypatch):
    """Whoever dies with a batch in hand leaves jobs that are begun again, each by itself."""
    held: list[Any] = []
    monkeypatch.setattr(Worker, "do_together", lambda worker, jobs: held.extend(jobs))
    gate.hold()
    jobs = [submitted(models[n % USERS], n) for n in range(4)]
    gate.let_go(4)
    until(lambda: len(held) >= 4, "that all are claimed")
    assert len(server.ledger.release(held[0].holder, time.time())) == 4
    for job in jobs:
        assert job.result()
        assert not job.status().merged and job.status().attempts == 2


def generation(model: Any, number: int, **options: Any) -> Any:
    return Generations("llama", **options).block(model, number)


def alone(net: Any, number: int) -> dict[str, Any]:
    """What a generation gives on this machine, its lists with all that they were given."""
    found = generation(weft.LanguageModel(net), number).results
    return {name: value for name, value in found.items() if not name.endswith("+")}


def same(job: Any, expected: dict[str, Any]) -> None:
    got = job.result()
    for name, value in expected.items():
        bounded(got.get(f"{name}+", got[name]), value)


def test_generations_of_users_share_steps_beside_plain_traces(server, gate, models, net):
    numbers = range(8)
    gate.hold()
    jobs = [generation(models[n % USERS], n, blocking=False).job for n in numbers]
    others = [submitted(models[n % USERS], n) for n in range(6)]
    gate.let_go(len(jobs) + len(others))
    for number, job in zip(numbers, jobs, strict=True):
        same(job, alone(net, number))
    here = weft.LanguageModel(net)
    for number, job in enumerate(others):
        bounded(dict(job.result()), dict(experiment(here, number).results))
    assert sum(job.status().merged for job in jobs) >= 0.9 * len(jobs)


def long(model: Any, tokens: int = 50, **options: Any) -> Any:
    """A generation that says each of its tokens."""
    with model.generate(ids(4, 3), max_new_tokens=tokens, blocking=False, **options) as tracer:
        for _ in tracer.iter[:]:
            tracer.log("token", model.lm_head.output[:, -1].argmax(-1))
        tracer.result.save("ids")
    return tracer.job


def test_who_comes_late_does_not_wait_for_who_is_long(server, gate, models, net, monkeypatch):
    """Beside a generation of fifty tokens a short one and a trace begin and end."""
    steps = Steps(monkeypatch)
    first = long(models[0])
    steps.until(lambda: state(server, first) == "running")
    late = generation(models[1], 1, blocking=False).job
    trace = submitted(models[2], 0)
    until(lambda: "received" not in (state(server, late), state(server, trace)), "their prices")
    steps.until(lambda: {state(server, late), state(server, trace)} == {"done"})
    same(late, alone(net, 1))
    assert trace.result()
    other = long(models[3])
    steps.until(lambda: state(server, other) == "running")
    noticed = cancellation(monkeypatch)
    other.cancel()
    assert noticed.wait(60)
    steps.free()
    with pytest.raises(CancelledError):
        other.result()
    with weft.LanguageModel(net).generate(ids(4, 3), max_new_tokens=50) as tracer:
        tracer.result.save("ids")
    assert torch.equal(first.result()["ids"], tracer.results["ids"])
    assert first.status().merged and not server.ledger.unfinished()
    assert max(ended(server, late), ended(server, trace)) < ended(server, first)


class Steps:
    """The steps of decode loops, one by one as a test lets them go, until all are free to."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._allowed = threading.Semaphore(0)
        self._free = self._waiting = False
        turn = Decode.turn

        def waits(decode: Decode) -> bool:
            if not self._free:
                self._waiting = True
                assert self._allowed.acquire(timeout=120)
            return turn(decode)

        patch.setattr(Decode, "turn", waits)

    def until(self, so: Callable[[], bool]) -> None:
        """Lets one step after another go, until it is so."""

        def one_more() -> bool:
            if so():
                return True
            if self._waiting:
                self._waiting = False
                self._allowed.release()
            return False

        until(one_more)

    def free(self) -> None:
        self._free = True
        self._allowed.release()


def ended(server: Server, job: Any) -> float:
    found = server.ledger.job(job.id)
    assert found is not None and found.ended is not None
    return found.ended


def cancellation(patch: pytest.MonkeyPatch) -> threading.Event:
    """Set when the worker has noticed one."""
    turn, noticed = Pulse._turn, threading.Event()

    def turned(pulse: Pulse) -> None:
        turn(pulse)
        if pulse.cancelling:
            noticed.set()

    patch.setattr(Pulse, "_turn", turned)
    return noticed


def state(server: Server, job: Any) -> str:
    found = server.ledger.job(job.id)
    assert found is not None
    return found.state


def test_a_step_that_fails_in_the_model_loses_nobody(server, gate, models, net, monkeypatch):
    """Memory runs out once: all begin again, each by itself."""
    failures = [torch.OutOfMemoryError("out of memory")]
    forward = type(net.model.layers[1]).forward

    def fails(layer: Any, *args: Any, **options: Any) -> Any:
        if failures and args[0].shape[0] > 2 and args[0].shape[1] == 1:
            raise failures.pop()
        return forward(layer, *args, **options)

    monkeypatch.setattr(type(net.model.layers[1]), "forward", fails)
    gate.hold()
    jobs = [long(models[n], tokens=4, seed=n) for n in range(3)]
    gate.let_go(3)
    for job in jobs:
        assert job.result()["ids"].shape == (1, 8)
    assert not failures
    assert [job.status().attempts for job in jobs] == [2, 2, 2]


def test_groups_are_neither_too_wide_nor_too_large():
    widths = [200, 5, 30, 24, 190, 6, 7, 31]
    found = list(groups(widths, lambda w: w, lambda w: 1, 450))
    assert found == [[200, 190], [31, 30, 24, 7, 6, 5]]
    assert list(groups([9, 9, 9], lambda w: w, lambda w: 2, 36)) == [[9, 9], [9]]
    assert list(groups([], lambda w: w, lambda w: 1, 36)) == []


def test_generations_that_wait_are_claimed_together():
    """As many as there is room for, in the order in which they would come one by one."""
    ledger = MemoryLedger(Settings())
    made = []
    for number, owner in enumerate(("ann", "bob", "ann", "eve", "ann")):
        one, _ = ledger.submit(jobs_of.job(100.0 + number, owner=owner), 100)
        lane = "" if number == 3 else STEPS
        ledger.step(one.id, replace(jobs_of.PRICED, lane=lane, tokens=10, peak=1), 200.0)
        made.append(one.id)
    claims = Claims(ledger, "tiny", "w", Settings(), time.time, time.sleep)
    assert [one.id for one in claims.steps(35, 2)] == made[:2]
    assert [one.id for one in claims.steps(15, 8)] == [made[2]]
    assert claims.steps(9, 8) == []
    assert [one.id for one in claims.steps(35, 8)] == [made[4]]
