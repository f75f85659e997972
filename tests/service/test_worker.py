"""A worker: jobs drawn as plain PyTorch would, and every way in which one can end."""

from __future__ import annotations

import errno
import hashlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.leftovers import running, threads_started
from tests.run.graphs import Builder
from tests.service.shop import MODEL, Shop, X, reads
from weft.engine.publish import know
from weft.errors import (
    CancelledError,
    ResultTooLargeError,
    RunError,
    ServerError,
    TimeLimitError,
    WorkerLostError,
    WorkerMemoryError,
)
from weft.service.jobs.life import Cancel, Job
from weft.service.store.interface import Card
from weft.service.store.memory import MemoryLedger
from weft.service.worker import pulse
from weft.wire.messages import ErrorReport, LogEvent, ProgressEvent, StateEvent, encode

CANCEL = Cancel(encode(ErrorReport(code="cancelled", message="no more"), "json"))


@pytest.fixture
def shop() -> Iterator[Shop]:
    made = Shop()
    yield made
    made.close()


@pytest.fixture
def make() -> Iterator[type[Shop]]:
    """Makes shops with settings, and closes them."""
    made: list[Shop] = []

    def new(**settings: float) -> Shop:
        made.append(Shop(**settings))
        return made[-1]

    yield new  # type: ignore[misc]
    for one in made:
        one.close()


def until(so: Callable[[], bool]) -> None:
    while not so():
        threading.Event().wait(0.005)


# -- a job that ends well ------------------------------------------------------------------------


def test_a_job_brings_back_what_plain_pytorch_gives(shop: Shop) -> None:
    job = shop.queued(reads("last"))
    shop.one()
    assert shop.job(job).state == "done"
    assert torch.equal(shop.saved(job)["h"], shop.last())


def test_an_edit_acts_on_the_model_and_on_no_later_job(shop: Shop) -> None:
    built = Builder()
    h = built.read("first", (3, 8))
    built.mul_(h, 0.5)
    built.fill("first", h)
    built.save("h", built.read("last", (3, 2)))
    edited, plain = shop.queued(built), shop.queued(reads("last"))
    shop.one()
    shop.one()
    with torch.no_grad():
        expected = shop.net.last(shop.first() * 0.5)
    assert torch.equal(shop.saved(edited)["h"], expected)
    assert torch.equal(shop.saved(plain)["h"], shop.last())


def test_constants_come_from_their_owners_objects(shop: Shop) -> None:
    built, direction = Builder(), torch.arange(8.0)
    built.save("h", built.add2(built.read("first", (3, 8)), built.const(direction)))
    job = shop.queued(built)
    assert shop.objects.names("constants/ann/")
    shop.one()
    assert torch.equal(shop.saved(job)["h"], shop.first() + direction)


def test_the_ledger_says_what_the_result_is(shop: Shop) -> None:
    job = shop.queued(reads("first", "last"))
    shop.one()
    data, done = shop.objects.get(f"results/{job.id}"), shop.job(job)
    assert done.result_bytes == len(data)
    assert done.result_sha256 == hashlib.sha256(data).hexdigest()
    assert done.names == ("first", "last")
    assert shop.objects.names("submits/") == []


def test_a_large_result_is_the_same_as_a_small_one(shop: Shop, monkeypatch) -> None:
    monkeypatch.setattr("weft.service.worker.loop.IN_MEMORY", 16)
    job = shop.queued(reads("last"))
    shop.one()
    assert torch.equal(shop.saved(job)["h"], shop.last())


def test_its_followers_see_each_step(shop: Shop) -> None:
    job = shop.queued(reads("last"))
    shop.one()
    states = [event.state for event in shop.events(job) if isinstance(event, StateEvent)]
    assert states == ["received", "queued", "running"]
    assert shop.end(job).state == "done"


def test_logs_are_notes_in_their_order(shop: Shop) -> None:
    job = shop.queued(reads("first", "last", log="a \x1b[31mred\nline"))
    shop.one()
    logs = [event.text for event in shop.events(job) if isinstance(event, LogEvent)]
    assert "\n".join(logs) == "\n".join(["a \x1b[31mred\nline"] * 2)
    assert shop.end(job).state == "done"


def test_a_log_arrives_while_the_job_runs(shop: Shop) -> None:
    job = shop.queued(reads("first", "last", log="here"))
    shop.bells.gateway.drain()

    def until_told() -> None:
        until(lambda: any(isinstance(event, LogEvent) for event in shop.events(job)))

    shop.does(until_told)
    shop.one()
    assert shop.job(job).state == "done"
    assert shop.bells.gateway.drain()


def test_progress_is_told_now_and_then(shop: Shop) -> None:
    job = shop.queued(reads("first", "last"))

    def until_told() -> None:
        shop.clock.ahead += pulse.PROGRESS
        until(lambda: any(isinstance(event, ProgressEvent) for event in shop.events(job)))

    shop.does(until_told)
    shop.one()
    (told,) = [event for event in shop.events(job) if isinstance(event, ProgressEvent)]
    assert (told.done, told.total) == (1, 2)


def test_what_the_checker_has_learnt_is_not_learnt_again(shop: Shop) -> None:
    learnt = know(shop.net)
    learnt.signatures.for_call((X,), {})
    tables = learnt.signatures.to_bytes()
    shop.ledger.put_card(Card(MODEL, "ready", learnt.fingerprint, b"", tables))
    job = shop.queued(reads("last"))
    shop.one()
    assert torch.equal(shop.saved(job)["h"], shop.last())
    assert shop.known.signatures.passes == 0


def test_what_was_learnt_of_another_model_is_not_believed(shop: Shop) -> None:
    other = know(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    other.signatures.for_call((X,), {})
    tables = other.signatures.to_bytes()
    shop.ledger.put_card(Card(MODEL, "ready", other.fingerprint, b"", tables))
    job = shop.queued(reads("last"))
    shop.one()
    assert torch.equal(shop.saved(job)["h"], shop.last())


# -- a job that fails ----------------------------------------------------------------------------


def raising(error: Exception):
    def act() -> None:
        raise error

    return act


def test_the_models_own_exception_comes_back_without_the_servers_paths(shop: Shop) -> None:
    job = shop.queued(reads("last"))
    shop.does(raising(IndexError("row 7 of /srv/weft/secret.bin\nis not there")))
    shop.one()
    error = shop.error(job)
    assert isinstance(error, RunError) and isinstance(error, IndexError)
    assert error.message == "row 7 of <path>"
    assert shop.end(job).state == "failed"
    assert shop.objects.names("") == []


def test_an_operation_that_fails_names_the_users_line(shop: Shop) -> None:
    built = Builder()
    h, far = built.read("first", (3, 8)), built.const(torch.tensor([99]))
    built.save("h", built.call("Tensor.__getitem__", h, (far,)))
    job = shop.queued(built)
    shop.one()
    error = shop.error(job)
    assert isinstance(error, IndexError)
    assert "user.py:102" in str(error)
    assert "99" in error.message


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_a_worker_without_memory_says_so_and_goes_on(shop: Shop, error: Exception) -> None:
    job, next_one = shop.queued(reads("last")), shop.queued(reads("last"))
    shop.does(raising(error))
    shop.one()
    told = shop.error(job)
    assert isinstance(told, WorkerMemoryError) and isinstance(told, MemoryError)
    assert told.fix is not None and "less" in told.fix
    shop.does(None)
    shop.one()
    assert torch.equal(shop.saved(next_one)["h"], shop.last())


def test_a_result_that_is_too_large_is_refused_with_a_hint(make) -> None:
    shop = make(result_bytes=20)
    job = shop.queued(reads("last"))
    shop.one()
    error = shop.error(job)
    assert isinstance(error, ResultTooLargeError)
    assert "result_bytes" in error.message and "slice" in (error.fix or "")
    assert shop.objects.names("results/") == []


def test_a_model_that_was_changed_is_not_used_again(shop: Shop) -> None:
    job, next_one = shop.queued(reads("last")), shop.queued(reads("last"))

    def change() -> None:
        with torch.no_grad():
            shop.net.last.weight.add_(1.0)

    shop.does(change)
    worker = shop.worker()
    worker.run()  # returns by itself
    assert worker.spoilt
    assert isinstance(shop.error(job), ServerError)
    assert shop.job(next_one).state == "queued"


def test_a_mistake_of_the_servers_is_told_without_its_details(shop: Shop, caplog) -> None:
    job = shop.queued(reads("last"))
    shop.objects.delete(f"submits/{job.id}")
    with caplog.at_level(logging.ERROR):
        shop.one()
    error = shop.error(job)
    assert isinstance(error, ServerError)
    assert "KeyError" not in str(error) and job.id not in str(error)
    assert "KeyError" in caplog.text and job.id in caplog.text
    assert any(job.id in note for note in error.__notes__)


def test_a_job_for_another_model_is_left_alone(shop: Shop) -> None:
    shop.queued(reads("last"), model="other")
    assert shop.worker().claim() is None


# -- time ----------------------------------------------------------------------------------------


def test_a_job_that_runs_too_long_is_stopped_between_two_sites(make) -> None:
    shop = make(run_seconds=0.01)
    job = shop.queued(reads("first", "last"))
    shop.does(lambda: threading.Event().wait(0.02))
    shop.one()
    error = shop.error(job)
    assert isinstance(error, TimeLimitError) and "run_seconds" in error.message


def test_a_job_that_is_stuck_fails_and_its_process_ends(make) -> None:
    shop = make(run_seconds=1.0)
    job, died = shop.queued(reads("last")), threading.Event()

    def stuck() -> None:
        shop.clock.ahead += 1.0 + pulse.GRACE + 1.0
        assert died.wait(60)

    shop.does(stuck)
    shop.one(die=died.set)
    error = shop.error(job)
    assert isinstance(error, TimeLimitError) and "single operation" in error.message
    assert shop.end(job).state == "failed"
    assert shop.objects.names("") == []


# -- claims --------------------------------------------------------------------------------------


class Watched(MemoryLedger):
    """Tells when the pulse of a job has looked at it."""

    def look(self) -> None:
        """Returns when a pulse has looked after this call."""
        self.looks = threading.Semaphore(0)
        for _ in range(2):
            assert self.looks.acquire(timeout=60)

    def job(self, id: str) -> Job | None:
        found = super().job(id)
        if threading.current_thread().name.startswith("pulse"):
            getattr(self, "looks", threading.Semaphore()).release()
        return found


@pytest.fixture
def watched(shop: Shop, monkeypatch) -> Watched:
    """The shop's ledger."""
    monkeypatch.setattr(pulse, "LOOK", 0.01)
    monkeypatch.setattr(pulse, "GATHER", 0.001)
    shop.ledger.__class__ = Watched
    return shop.ledger  # type: ignore[return-value]


@pytest.fixture
def pulses(monkeypatch) -> list[pulse.Pulse]:
    """The pulses of all jobs so far."""
    monkeypatch.setattr(pulse, "LOOK", 0.01)
    made: list[pulse.Pulse] = []

    def recorded(*args: Any, **options: Any) -> pulse.Pulse:
        made.append(pulse.Pulse(*args, **options))
        return made[-1]

    monkeypatch.setattr("weft.service.worker.loop.Pulse", recorded)
    return made


def test_a_claim_is_renewed_before_it_ends(shop: Shop, watched: Watched) -> None:
    job, until = shop.queued(reads("last")), []

    def wait() -> None:
        for _ in range(3):
            until.append(shop.job(job).until)
            shop.clock.ahead += shop.settings.lease_seconds / 2
            watched.look()
            assert watched.expire(shop.clock()) == []

    shop.does(wait)
    shop.one()
    assert until == sorted(set(until))
    assert shop.job(job).state == "done"
    assert shop.job(job).attempts == 1


def test_a_job_that_is_cancelled_while_it_runs_stops(shop: Shop, pulses) -> None:
    job = shop.queued(reads("first", "last"))

    def cancel() -> None:
        shop.ledger.step(job.id, CANCEL, shop.clock())
        until(lambda: pulses[0].cancelling)

    shop.does(cancel)
    worker = shop.one()
    assert shop.end(job).state == "cancelled"
    assert isinstance(shop.error(job), CancelledError)
    assert shop.objects.names("") == []
    assert not worker.spoilt


@pytest.mark.parametrize("ends", ["done", "failed", "cancelled"])
def test_the_seconds_of_a_job_are_those_that_it_was_drawn(make, pulses, ends: str) -> None:
    """Jobs of a batch are claimed together, and some wait for others."""
    shop = make(lease_seconds=400.0)
    job = shop.queued(reads("first", "last"))
    worker = shop.worker()
    claimed = worker.claim()
    assert claimed is not None

    def act() -> None:
        time.sleep(0.05)
        if ends == "failed":
            raise ValueError("it does not")
        if ends == "cancelled":
            shop.ledger.step(job.id, CANCEL, shop.clock())
            until(lambda: pulses[0].cancelling)

    shop.clock.ahead += shop.settings.lease_seconds / 2
    shop.does(act)
    worker.do(claimed)
    assert shop.job(job).state == ends
    (used,) = shop.ledger.usage("ann")
    assert 0.05 <= used.seconds < shop.settings.lease_seconds / 2


def test_a_job_that_is_cancelled_too_late_is_done(shop: Shop, monkeypatch) -> None:
    monkeypatch.setattr(pulse, "LOOK", 1000.0)
    job = shop.queued(reads("last"))
    shop.does(lambda: shop.ledger.step(job.id, CANCEL, shop.clock()))
    shop.one()
    assert shop.job(job).state == "done"
    assert torch.equal(shop.saved(job)["h"], shop.last())


def test_a_worker_whose_claim_is_lost_lets_go(shop: Shop, pulses) -> None:
    job = shop.queued(reads("first", "last"))

    def lose() -> None:
        shop.ledger.release("w", shop.clock())
        until(lambda: pulses[0].lost)

    shop.does(lose)
    shop.one()
    assert shop.job(job).state == "queued"
    assert shop.objects.names("results/") == []
    shop.does(None)
    shop.one(holder="another")
    assert (shop.job(job).state, shop.job(job).attempts) == ("done", 2)
    assert torch.equal(shop.saved(job)["last"], shop.last())


def test_the_first_result_stays_whoever_is_said_to_have_made_it(shop: Shop, monkeypatch) -> None:
    """A worker that is slow, not dead, writes its result after the job was given to another."""
    monkeypatch.setattr(pulse, "LOOK", 1000.0)
    job = shop.queued(reads("last"))
    shop.does(lambda: shop.ledger.release("w", shop.clock()))
    shop.one()
    assert shop.job(job).state == "queued"
    first = shop.objects.get(f"results/{job.id}")
    shop.does(None)
    shop.one(holder="another")
    done = shop.job(job)
    assert done.state == "done"
    assert shop.objects.get(f"results/{job.id}") == first
    assert (done.result_bytes, done.result_sha256) == (
        len(first),
        hashlib.sha256(first).hexdigest(),
    )
    assert [type(event).__name__ for event in shop.events(job)].count("EndEvent") == 1


def test_two_workers_on_one_job_give_one_end(shop: Shop, watched: Watched) -> None:
    """The lease of a worker ends while it draws; the job is done by another one meanwhile."""
    job = shop.queued(reads("last"))

    def overtaken() -> None:
        shop.does(None)
        watched.release("w", shop.clock())
        shop.one(holder="another")

    shop.does(overtaken)
    shop.one()
    assert shop.end(job).state == "done"
    assert shop.job(job).attempts == 2
    assert torch.equal(shop.saved(job)["h"], shop.last())


def test_a_job_that_its_workers_die_of_fails_after_some(make) -> None:
    shop = make(attempts=3)
    job = shop.queued(reads("last"))
    for _ in range(3):
        assert shop.worker().claim() is not None
        shop.ledger.release("w", shop.clock())
    assert shop.worker().claim() is None
    error = shop.error(job)
    assert isinstance(error, WorkerLostError) and "3 times" in error.message


def test_a_store_that_fails_for_a_moment_ends_no_job(shop: Shop, watched, monkeypatch, caplog):
    job, failures = shop.queued(reads("last")), threading.Semaphore(0)

    def fail(*_: object) -> None:
        failures.release()
        raise sqlite3.OperationalError("database is locked")

    def wait() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(watched, "renew", fail)
            shop.clock.ahead += shop.settings.lease_seconds / 2
            assert failures.acquire(timeout=60)
        watched.look()

    shop.does(wait)
    shop.one()
    assert shop.job(job).state == "done"
    assert "missed a beat" in caplog.text


# -- the loop ------------------------------------------------------------------------------------


def test_a_worker_waits_for_its_bell_and_ends_when_told(shop: Shop) -> None:
    worker = shop.worker()
    with threads_started() as threads:
        thread = threading.Thread(target=worker.run)
        thread.start()
        jobs = [shop.queued(reads("last")) for _ in range(3)]  # the shell rings
        until(lambda: all(shop.job(job).state == "done" for job in jobs))
        worker.stop()
        thread.join(60)
    assert not thread.is_alive()
    assert not running(threads, "pulse")


def test_jobs_that_follow_each_other_have_one_pulse_thread(shop: Shop, monkeypatch) -> None:
    monkeypatch.setattr(pulse, "IDLE", 1000.0)
    worker, beating = shop.worker(), set()
    shop.does(lambda: beating.update(one for one in threads if one.name == "pulse"))
    with threads_started() as threads:
        thread = threading.Thread(target=worker.run)
        thread.start()
        for _ in range(5):
            job = shop.queued(reads("last"))
            until(lambda job=job: shop.job(job).state == "done")
        assert len(running(threads, "pulse")) == 1
        monkeypatch.setattr(pulse, "IDLE", 0.0)
        monkeypatch.setattr(pulse, "LOOK", 0.01)
        until(lambda: not running(threads, "pulse"))  # nobody has a job any more
        job = shop.queued(reads("last"))
        until(lambda: shop.job(job).state == "done")
        worker.stop()
        thread.join(60)
    assert len(beating) == 2
    assert not running(threads, "pulse")


def test_a_worker_that_is_told_to_end_finishes_the_job_in_hand(shop: Shop) -> None:
    jobs = [shop.queued(reads("last")) for _ in range(2)]
    worker = shop.worker()
    shop.does(worker.stop)
    worker.run()
    assert [shop.job(job).state for job in jobs] == ["done", "queued"]


def test_jobs_are_drawn_in_the_order_in_which_they_came(shop: Shop) -> None:
    jobs = [shop.queued(reads("last")) for _ in range(3)]
    claimed = [shop.worker().claim() for _ in range(3)]
    assert [job.id for job in claimed if job] == [job.id for job in jobs]


def test_what_has_no_number_yet_is_not_rounded_away(shop: Shop) -> None:
    """The bits of a result are those that PyTorch gives: nan and signed zeros too."""
    built = Builder()
    h = built.read("first", (3, 8))
    built.save("h", built.mul(h, float("nan")))
    built.save("z", built.mul(h, -0.0))
    job = shop.queued(built)
    shop.one()
    saved = shop.saved(job)
    assert torch.isnan(saved["h"]).all()
    assert torch.equal(torch.signbit(saved["z"]), torch.signbit(shop.first() * -0.0))


def test_the_model_is_called_with_what_was_sent(shop: Shop) -> None:
    job = shop.queued(reads("last"), x=2 * X)
    shop.one()
    with torch.no_grad():
        assert torch.equal(shop.saved(job)["h"], shop.net(2 * X))


def test_a_result_that_finds_no_room_says_so(shop: Shop, monkeypatch) -> None:
    job = shop.queued(reads("last"))

    def full(*args: Any, **options: Any) -> bool:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(shop.objects, "put", full)
    shop.one()
    assert "no room on its disk" in shop.error(job).message
    monkeypatch.undo()
    again = shop.queued(reads("last"))
    shop.one()
    assert shop.job(again).state == "done"
