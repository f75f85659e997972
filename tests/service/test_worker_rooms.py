"""Rooms: what requests of sessions leave on a worker, and how it is made again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from tests.run.graphs import Builder
from tests.service.jobs import PRICED
from tests.service.shop import MODEL, Shop, reads
from weft.errors import FailedRunError, LimitError, MessageError, SessionLostError
from weft.service.jobs.life import Job
from weft.service.store.requests import submit_of
from weft.service.store.sessions import Session
from weft.service.store.sweep import sweep
from weft.service.worker import rooms
from weft.wire.messages import Kept, Seat, encode


@pytest.fixture
def shop() -> Iterator[Shop]:
    shop = Shop(session_bytes=3000, key_session_bytes=9000, all_session_bytes=4500)
    for id in ("s", "t"):
        now = shop.clock()
        shop.ledger.open_session(
            Session(id=id, owner="ann", request_id=id, model=MODEL, created=now, until=now + 100), 9
        )
    yield shop
    shop.close()


def seated(shop: Shop, number: int, built: Builder, session: str = "s", **seat: Any) -> Job:
    """Request `number` of a session, as the checker leaves it."""
    uses: dict[str, Kept] = seat.get("uses", {})
    built.constants = {k: v for k, v in built.constants.items() if k not in uses}
    job = shop.received(built)
    submit = submit_of(shop.objects, job)
    submit = replace(submit, seat=Seat(id=session, number=number, **seat))
    shop.objects.delete(f"submits/{job.id}")
    shop.objects.put(f"submits/{job.id}", encode(submit))
    row = shop.ledger._rows[job.id]
    row.job = replace(row.job, session=session, request_id=f"{session}-{number}")
    shop.ledger.seat(session, number, job.id, shop.clock() + 100)
    return shop.ledger.step(job.id, PRICED, shop.clock())


def keeps(shop: Shop, number: int, session: str = "s", **seat: Any) -> Job:
    return seated(shop, number, reads("first"), session, keeps=("h",), **seat)


def doubles(shop: Shop, number: int, of: int, session: str = "s", **seat: Any) -> Job:
    """Keeps twice what an earlier request has kept."""
    built = Builder()
    h = built.const(torch.zeros(3, 8))
    built.save("h", built.call("mul", h, 2.0))
    (key,) = built.constants
    uses = {key: Kept(number=of, name="h")}
    return seated(shop, number, built, session, keeps=("h",), uses=uses, **seat)


def brings(shop: Shop, number: int, of: int, session: str = "s", **seat: Any) -> Job:
    built = Builder()
    h = built.const(torch.zeros(3, 8))
    built.save("x", h)
    (key,) = built.constants
    return seated(shop, number, built, session, uses={key: Kept(number=of, name="h")}, **seat)


def run(shop: Shop, worker: Any) -> None:
    while (job := worker.claim()) is not None:
        worker.do(job)


def passes(shop: Shop) -> list[int]:
    """Counts real passes of the model from now on."""
    count: list[int] = []
    shop.does(lambda: count.append(1))
    return count


def test_what_one_request_keeps_another_uses(shop: Shop) -> None:
    first, second, third = keeps(shop, 1), doubles(shop, 2, 1), brings(shop, 3, 2)
    worker = shop.worker()
    run(shop, worker)
    assert shop.saved(first) == {} == shop.saved(second)
    torch.testing.assert_close(shop.saved(third)["x"], 2 * shop.first(), rtol=0, atol=0)
    assert set(worker._rooms._rooms["s"].values) == {
        Kept(number=1, name="h"),
        Kept(number=2, name="h"),
    }


def test_a_new_worker_makes_again_what_is_wanted_and_no_more(shop: Shop) -> None:
    """Of five requests: the one that is held, and what it was made of."""
    for number in (1, 2):
        keeps(shop, number)
    doubles(shop, 3, 1)
    keeps(shop, 4, drops=(Kept(number=1, name="h"), Kept(number=2, name="h")))
    run(shop, shop.worker())
    last = brings(shop, 5, 3, drops=(Kept(number=4, name="h"),))
    worker, drawn = shop.worker(), []
    again = worker._rooms._again

    def counted(job: Job, *rest: Any) -> Any:
        drawn.append(job.request_id)
        return again(job, *rest)

    worker._rooms._again = counted
    run(shop, worker)
    assert drawn == ["s-1", "s-3", "s-4"]
    torch.testing.assert_close(shop.saved(last)["x"], 2 * shop.first(), rtol=0, atol=0)
    assert set(worker._rooms._rooms["s"].values) == {Kept(number=3, name="h")}


def test_the_log_is_gone_through_from_where_values_were_written_down(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeps(shop, 1)
    doubles(shop, 2, 1)
    first = shop.worker()
    run(shop, first)
    assert shop.objects.names("rooms/") == []
    with monkeypatch.context() as patch:
        patch.setattr(rooms, "WRITE", 0.0)
        doubles(shop, 3, 2, drops=(Kept(number=1, name="h"),))
        doubles(shop, 4, 3)
        run(shop, first)
    assert shop.objects.names("rooms/") == ["rooms/s/4"]  # the one before it is gone
    doubles(shop, 5, 4, drops=(Kept(number=2, name="h"),))
    run(shop, first)
    last = brings(shop, 6, 5)
    for number in (1, 2, 3):
        job = shop.ledger.find("ann", f"s-{number}")
        assert job is not None
        shop.objects.delete(f"submits/{job.id}")
    worker, drawn = shop.worker(), []
    again = worker._rooms._again
    worker._rooms._again = lambda job, *rest: (drawn.append(job.request_id), again(job, *rest))[1]
    run(shop, worker)
    assert drawn == ["s-5"]
    torch.testing.assert_close(shop.saved(last)["x"], 16 * shop.first(), rtol=0, atol=0)
    assert {one.number for one in worker._rooms._rooms["s"].values} == {3, 4, 5}


def test_a_snapshot_that_cannot_be_read_is_none(shop: Shop, caplog: Any) -> None:
    keeps(shop, 1)
    run(shop, shop.worker())
    shop.objects.put("rooms/s/1", b"broken")
    last = brings(shop, 2, 1)
    run(shop, shop.worker())
    torch.testing.assert_close(shop.saved(last)["x"], shop.first(), rtol=0, atol=0)
    assert "cannot be read" in caplog.text


def test_snapshots_go_with_their_session(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "WRITE", 0.0)
    for session in ("s", "t"):
        keeps(shop, 1, session)
    run(shop, shop.worker())
    shop.ledger.end_session("s", shop.clock())
    shop.objects._times = dict.fromkeys(shop.objects._times, 0.0)
    sweep(shop.ledger, shop.objects, shop.clock(), shop.settings)
    assert shop.objects.names("rooms/") == ["rooms/t/1"]


def test_a_value_of_a_request_that_failed(shop: Shop) -> None:
    def fail() -> None:
        raise ValueError("not today")

    shop.does(fail)
    first = seated(shop, 1, reads("last"), keeps=("h",))
    worker = shop.worker()
    run(shop, worker)
    shop.does(None)
    second, third = doubles(shop, 2, 1), brings(shop, 3, 2)
    run(shop, worker)
    assert shop.job(first).state == "failed"
    for job, number in ((second, 1), (third, 2)):
        error = shop.error(job)
        assert isinstance(error, FailedRunError)
        assert f"request {number}" in error.message and "not today" in error.message


def test_what_cannot_be_made_again_is_lost_by_name(shop: Shop) -> None:
    first = keeps(shop, 1)
    doubles(shop, 2, 1)
    run(shop, shop.worker())
    shop.objects.delete(f"submits/{first.id}")
    third, fourth = brings(shop, 3, 2), keeps(shop, 4)
    run(shop, shop.worker())
    error = shop.error(third)
    assert isinstance(error, SessionLostError) and "request 2" in error.message
    assert shop.job(fourth).state == "done"  # it does not need it


def test_the_limit_of_a_key_is_its_own(shop: Shop) -> None:
    """Each value counts for 256 bytes: two fit into the 600 of this key, whatever others may."""
    worker = shop.worker()
    jobs = [keeps(shop, number) for number in (1, 2, 3)]
    for job in jobs:
        row = shop.ledger._rows[job.id]
        row.job = replace(row.job, limits={"session_bytes": 600.0})
    run(shop, worker)
    assert [shop.job(job).state for job in jobs] == ["done", "done", "failed"]
    assert "session_bytes is 600 B" in str(shop.error(jobs[-1]))


def test_limits_and_nothing_half_applied(shop: Shop) -> None:
    """8 rows of 3 numbers are 96 bytes, which count for 256."""
    worker = shop.worker()
    for number in range(1, 12):
        keeps(shop, number)
    over = keeps(shop, 12)
    run(shop, worker)
    assert isinstance(shop.error(over), LimitError)
    assert "session_bytes" in str(shop.error(over))
    room = worker._rooms._rooms["s"]
    assert {one.number for one in room.values} == set(range(1, 12))
    fits = keeps(shop, 13, drops=(Kept(number=1, name="h"),))
    run(shop, worker)
    assert shop.job(fits).state == "done"
    assert {one.number for one in room.values} == {*range(2, 12), 13}
    others = [keeps(shop, number, "t") for number in range(1, 8)]
    run(shop, worker)
    states = [shop.job(job).state for job in others]
    assert states == ["done"] * 6 + ["failed"]
    assert "all_session_bytes" in str(shop.error(others[-1]))


@pytest.mark.parametrize(
    "like", [torch.zeros(3, 4), torch.zeros(3, 8).long()], ids=["shape", "dtype"]
)
def test_a_value_is_what_the_graph_says(shop: Shop, like: torch.Tensor) -> None:
    """Who recorded it may be mistaken, or lie; the checker had only his word."""
    keeps(shop, 1)
    built = Builder()
    built.save("x", built.const(like))
    (key,) = built.constants
    wrong = seated(shop, 2, built, uses={key: Kept(number=1, name="h")})
    run(shop, shop.worker())
    error = shop.error(wrong)
    assert isinstance(error, MessageError) and "float32[3, 8]" in error.message


def test_what_is_no_save_of_a_tensor_cannot_stay(shop: Shop) -> None:
    job = seated(shop, 1, reads("first"), keeps=("nothing",))
    run(shop, shop.worker())
    assert isinstance(shop.error(job), MessageError)


def test_a_room_goes_with_its_session(shop: Shop) -> None:
    worker = shop.worker()
    keeps(shop, 1)
    keeps(shop, 1, "t")
    run(shop, worker)
    worker._rooms.sweep(shop.clock())
    assert len(worker._rooms) == 2
    shop.ledger.end_session("s", shop.clock())
    worker._rooms.sweep(shop.clock() + 10)
    assert list(worker._rooms._rooms) == ["t"]
    worker._rooms.sweep(shop.clock() + 1000)
    assert len(worker._rooms) == 0
