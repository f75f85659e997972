"""What the sessions of one key may keep together on a worker, so that there is room for others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from tests.service.shop import MODEL, Shop
from tests.service.test_worker_rooms import keeps, run
from weft.errors import LimitError
from weft.service.jobs.life import Job
from weft.service.store.sessions import Session
from weft.wire.messages import Kept

VALUE = 256
"""Bytes that a small value counts for."""


@pytest.fixture
def shop() -> Iterator[Shop]:
    """Room for ten values, and so for five of one key; two sessions of ann's, one of bob's."""
    shop = Shop(all_session_bytes=10 * VALUE)
    for id, owner in (("s", "ann"), ("t", "ann"), ("u", "bob")):
        now = shop.clock()
        session = Session(
            id=id, owner=owner, request_id=id, model=MODEL, created=now, until=now + 1e4
        )
        shop.ledger.open_session(session, 9)
    yield shop
    shop.close()


def kept(shop: Shop, session: str, numbers: range, **limits: float) -> list[Job]:
    """Requests of a session that keep a value each."""
    owner = "bob" if session == "u" else "ann"
    jobs = [keeps(shop, number, session) for number in numbers]
    for job in jobs:
        row = shop.ledger._rows[job.id]
        row.job = replace(row.job, owner=owner, limits=limits)
        shop.ledger._lines.arrive(row.job, shop.ledger._jobs(), shop.clock())
    return jobs


def states(shop: Shop, jobs: list[Job]) -> list[str]:
    return [shop.job(job).state for job in jobs]


def test_sessions_of_one_key_have_half_and_others_the_rest(shop: Shop) -> None:
    worker = shop.worker()
    mine = [*kept(shop, "s", range(1, 4)), *kept(shop, "t", range(1, 4))]
    run(shop, worker)
    assert states(shop, mine) == ["done"] * 5 + ["failed"]
    error = shop.error(mine[-1])
    assert isinstance(error, LimitError)
    assert "would keep 1.5 KB" in error.message
    assert "the limit key_session_bytes is 1.2 KB" in error.message
    assert (
        error.fix is not None and "end other sessions" in error.fix and "120 seconds" in error.fix
    )
    theirs = kept(shop, "u", range(1, 7))
    run(shop, worker)
    assert states(shop, theirs) == ["done"] * 5 + ["failed"]
    assert "key_session_bytes" in str(shop.error(theirs[-1]))


def test_what_was_kept_before_stays(shop: Shop) -> None:
    worker = shop.worker()
    kept(shop, "s", range(1, 6))
    over = kept(shop, "t", range(1, 2))
    run(shop, worker)
    assert states(shop, over) == ["failed"]
    assert len(worker._rooms._rooms["s"].values) == 5
    assert worker._rooms._rooms["t"].values == {}
    drop = keeps(shop, 6, "s", drops=(Kept(number=1, name="h"), Kept(number=2, name="h")))
    run(shop, worker)
    assert states(shop, [drop]) == ["done"]
    more = kept(shop, "t", range(2, 4))
    run(shop, worker)
    assert states(shop, more) == ["done", "failed"]


def test_the_limit_of_a_key_is_its_own(shop: Shop) -> None:
    worker = shop.worker()
    few = kept(shop, "s", range(1, 4), key_session_bytes=2.0 * VALUE)
    many = kept(shop, "u", range(1, 8), key_session_bytes=7.0 * VALUE)
    run(shop, worker)
    assert states(shop, few) == ["done", "done", "failed"]
    assert states(shop, many) == ["done"] * 7


def test_nobody_has_more_than_there_is_for_all(shop: Shop) -> None:
    worker = shop.worker()
    kept(shop, "s", range(1, 5))
    run(shop, worker)  # before the others: whose turn it is follows what jobs took
    many = kept(shop, "u", range(1, 8), key_session_bytes=100.0 * VALUE)
    run(shop, worker)
    assert states(shop, many) == ["done"] * 6 + ["failed"]
    assert "all_session_bytes" in str(shop.error(many[-1]))


def test_a_session_that_is_over_leaves_its_room_at_once(shop: Shop) -> None:
    worker: Any = shop.worker()
    kept(shop, "s", range(1, 6))
    run(shop, worker)
    worker._rooms.sweep(shop.clock())  # it looks from time to time, and has just done so
    shop.ledger.end_session("s", shop.clock())
    more = kept(shop, "t", range(1, 3))
    run(shop, worker)
    assert states(shop, more) == ["done", "done"]
