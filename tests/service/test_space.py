"""Jobs are admitted by measured memory: they fit, they wait, or they are refused by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from msgspec.structs import replace

from tests.leftovers import ROUNDS
from tests.service.jobs import PRICED
from tests.service.shop import MODEL, Shop, reads
from tests.service.test_checker import checker
from weft.errors import WorkerMemoryError
from weft.service.jobs.life import Job
from weft.service.store.usage import Space
from weft.service.worker import space
from weft.service.worker.batch import Claims
from weft.service.worker.loop import Worker
from weft.service.worker.space import SHARE, Measured, Spaces, measured

GB = 1 << 30


@pytest.fixture
def shop() -> Iterator[Shop]:
    one = Shop()
    yield one
    one.close()


class Gauge:
    """What there is, as a test wants it."""

    def __init__(self, free: float, most: float) -> None:
        self.told = Measured(int(free / SHARE), int(most / SHARE))

    def __call__(self, device: torch.device) -> Measured:
        return self.told


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question is a new measure."""
    monkeypatch.setattr(space, "FRESH", 0.0)


def queued(shop: Shop, peak: int) -> Job:
    job = shop.received(reads("last"))
    return shop.ledger.step(job.id, replace(PRICED, peak=peak), shop.clock())


def worker(shop: Shop, gauge: Gauge, monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(space, "measured", gauge)
    return shop.worker()


def test_what_does_not_fit_now_waits_and_lets_others_pass(shop, monkeypatch) -> None:
    gauge = Gauge(100, 1000)
    large, small = queued(shop, 500), queued(shop, 50)
    hands = worker(shop, gauge, monkeypatch)
    first = hands.claim()
    assert first is not None and first.id == small.id
    assert hands.claim() is None
    gauge.told = Measured(1000, 1200)
    then = hands.claim()
    assert then is not None and then.id == large.id
    hands.do(then)
    assert torch.equal(shop.saved(then)["h"], shop.last())


def test_what_can_never_fit_is_refused_by_name(shop, monkeypatch) -> None:
    job = queued(shop, 5000)
    hands = worker(shop, Gauge(100, 1000), monkeypatch)
    claimed = hands.claim()
    assert claimed is not None and claimed.id == job.id
    hands.do(claimed)
    error = shop.error(job)
    assert isinstance(error, WorkerMemoryError)
    assert "5000 bytes" in error.message and MODEL in error.message and error.fix


def test_the_checker_refuses_it_before_it_waits(shop) -> None:
    shop.ledger.put_space(Space(MODEL, free=10, most=20))
    job = shop.received(reads("first", "last"))
    assert checker(shop).turn()
    assert isinstance(shop.error(job), WorkerMemoryError)
    shop.ledger.put_space(Space(MODEL, free=10, most=GB))
    again = shop.received(reads("first", "last"))
    assert checker(shop).turn()
    assert shop.job(again).state == "queued" and shop.job(again).peak > 20


def test_jobs_of_a_batch_fit_together(shop) -> None:
    gauge = Gauge(100, 1000)
    for _ in range(5):
        job = shop.received(reads("last"))
        shop.ledger.step(job.id, replace(PRICED, peak=40, tokens=1, lane="a"), shop.clock())
    spaces = Spaces(shop.ledger, MODEL, torch.device("cpu"), measure=gauge)
    store = shop.ledger, MODEL, "w", shop.settings, shop.clock, lambda seconds: None
    assert len(Claims(*store, spaces).next()) == 2
    gauge.told = Measured(1000, 1200)
    assert len(Claims(*store, spaces).next()) == 3


def test_what_was_measured_is_published(shop, monkeypatch) -> None:
    gauge = Gauge(100, 1000)
    worker(shop, gauge, monkeypatch)
    told = shop.ledger.space(MODEL)
    assert told is not None and (told.free, told.most) == pytest.approx((100, 1000), abs=1)


def test_the_most_is_what_was_there_once(shop) -> None:
    gauge = Gauge(100, 1000)
    spaces = Spaces(shop.ledger, MODEL, torch.device("cpu"), measure=gauge)
    spaces.now()
    gauge.told = Measured(50, 500)
    found = spaces.now()
    assert found is not None and found.most == pytest.approx(1000, abs=1)


def test_where_nobody_can_tell_nothing_is_held_to_it(shop, monkeypatch) -> None:
    monkeypatch.setattr(space, "measured", lambda device: None)
    job = queued(shop, 10 * GB)
    claimed = shop.worker().claim()
    assert claimed is not None and claimed.id == job.id
    assert shop.ledger.space(MODEL) is None


def test_memory_that_is_taken_is_not_free() -> None:
    """In one of some rounds: whatever else runs on this machine may give some back meanwhile."""
    now = measured(torch.device("cpu"))
    if now is None:
        pytest.skip("this system does not tell")
    assert 0 < now.free <= now.most + GB
    assert any(taken() >= SIZE * 0.9 for _ in range(ROUNDS))


SIZE = 256 << 20


def taken() -> int:
    """By how much less can be had while a tensor of `SIZE` bytes is there."""
    before = measured(torch.device("cpu"))
    tensor = torch.ones(SIZE // 4)
    after = measured(torch.device("cpu"))
    assert before is not None and after is not None and tensor.nbytes == SIZE
    return before.most - after.most
