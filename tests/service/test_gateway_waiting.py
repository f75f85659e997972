"""What is told of a job that waits, and how long one that is over is kept."""

from __future__ import annotations

import json
import time

import httpx
import pytest

from tests.service.gate import ANN, BOB, MODEL, House, bearer, live, submit_of
from tests.service.jobs import job as a_job
from weft.client.events import Message, Parser
from weft.service.gateway.watch import POLL_SECONDS
from weft.service.jobs.pace import seconds_each
from weft.service.store.models import WorkerMemory
from weft.settings import Settings
from weft.wire.messages import ProgressEvent, decode

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def house() -> House:
    return House(Settings(keep_seconds=100.0, longest_keep_seconds=5000.0))


def ran(begun: float, ended: float):
    return a_job(begun, state="done", ended=ended, stages={"run": ended - begun})


# -- how fast --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spans", "each"),
    [
        ([], None),
        ([(0, 2)], 2.0),
        ([(0, 2), (10, 14)], 3.0),
        ([(0, 1), (0, 1), (0, 1), (0, 1)], 0.25),
        ([(0, 2), (1, 3)], 1.5),
        ([(0, 10), (2, 3), (11, 12)], 11 / 3),
    ],
)
def test_jobs_side_by_side_count_for_the_time_that_passed(spans, each) -> None:
    assert seconds_each([ran(*span) for span in spans]) == each


def test_what_waits_is_told_its_place_and_when_it_may_begin(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [house.job(request_id=f"r{n}") for n in range(3)]
    told = house.ask("GET", f"/api/jobs/{ids[2]}").json()
    assert told["ahead"] == 2 and "estimate" not in told, "nothing was measured yet"
    house.do()
    monkeypatch.setattr(house.ledger, "recent", lambda model, limit: [ran(3.0, 4.0)])
    told = house.ask("GET", f"/api/jobs/{ids[2]}").json()
    assert (told["ahead"], told["estimate"]) == (1, 1.0)
    assert house.ask("GET", f"/api/jobs/{ids[1]}").json()["estimate"] == 0.0
    listed = house.ask("GET", "/api/jobs").json()["jobs"]
    assert [one.get("estimate") for one in listed] == [1.0, 0.0, None]


@pytest.mark.parametrize(
    ("row", "state", "estimate"),
    [
        ({"state": "cold"}, "cold", None),
        ({"state": "cold", "load_seconds": 8.0}, "cold", 8.0),
        ({"state": "cold", "files": 4, "cached": 4, "load_seconds": 8.0}, "warm", 8.0),
        ({"state": "loading", "load_seconds": 8.0, "weights": 4, "loaded": 3}, "loading", 2.0),
        ({"state": "ready", "load_seconds": 8.0}, None, 0.0),
    ],
)
def test_the_rest_of_a_load_counts_too(house: House, row, state, estimate) -> None:
    house.ledger.put_memory(WorkerMemory(model=MODEL, **row))
    told = house.ask("GET", f"/api/jobs/{house.job()}").json()
    assert (told.get("model_state"), told.get("estimate")) == (state, estimate)


# -- loads -----------------------------------------------------------------------------------------


def test_followers_of_a_waiting_job_see_the_load_and_then_the_rest(house: House) -> None:
    """Each figure once, without a number: none is an entry of the job's own stream."""
    house.ledger.put_memory(WorkerMemory(model=MODEL, state="loading", weights=100, loaded=10))
    id = house.job()
    seen: list[tuple[int | None, Message]] = []
    parser = Parser()
    with live(house) as url:
        path = f"{url}/api/jobs/{id}/events"
        with httpx.stream("GET", path, headers=bearer(), timeout=60) as reply:
            for piece in reply.iter_bytes():
                for message in parser.feed(piece):
                    seen.append((message.id, message))
                    if message.event == "progress":
                        goes_on(house, decode(message.data.encode(), ProgressEvent, "json"))
    loads = [
        decode(message.data.encode(), ProgressEvent, "json")
        for _, message in seen
        if message.event == "progress"
    ]
    assert [(one.kind, one.done, one.total) for one in loads] == [
        ("load", 10, 100),
        ("load", 60, 100),
    ]
    numbered = [number for number, message in seen if message.event != "progress"]
    assert numbered == list(range(1, len(numbered) + 1))
    assert [n for n, message in seen if message.event == "progress"] == [None, None]
    assert seen[-1][1].event == "end"


def test_a_load_that_begins_when_the_job_is_queued_is_seen_too(house: House) -> None:
    """The follower has waited in vain for more before, and hears nothing new of the job itself."""
    house.ledger.put_memory(WorkerMemory(model=MODEL, state="ready", weights=100))
    id = house.job()
    seen: list[Message] = []
    parser = Parser()
    with live(house) as url:
        path = f"{url}/api/jobs/{id}/events"
        with httpx.stream("GET", path, headers=bearer(), timeout=60) as reply:
            for piece in reply.iter_bytes():
                seen += parser.feed(piece)
                if len(seen) == 1:
                    time.sleep(4 * POLL_SECONDS)
                    house.ledger.put_memory(WorkerMemory(model=MODEL, state="cold", weights=100))
                    house.price()
                    house.bells.gateway.ring()
                if seen[-1].event == "progress":
                    break
    assert [message.event for message in seen] == ["state", "state", "progress"]


def goes_on(house: House, seen: ProgressEvent) -> None:
    """What happens when the follower has seen that."""
    if seen.done == 10:
        house.ledger.put_memory(WorkerMemory(model=MODEL, state="loading", weights=100, loaded=60))
    else:
        house.ledger.put_memory(WorkerMemory(model=MODEL, state="ready", weights=100, loaded=100))
        house.do()
        house.bells.gateway.ring()


# -- how long it is kept ---------------------------------------------------------------------------


def test_a_job_says_how_long_it_is_to_be_kept(house: House) -> None:
    id = house.job(keep_seconds=7.0)
    house.do()
    assert house.ask("GET", f"/api/jobs/{id}").json()["expires"] == 4.0 + 7.0
    usual = house.job(request_id="r2")
    house.do()
    assert house.ask("GET", f"/api/jobs/{usual}").json()["expires"] == 4.0 + 100.0


def test_the_server_has_a_limit_for_it(house: House) -> None:
    refused = house.submit(submit_of(keep_seconds=5001.0))
    assert refused.status_code == 413
    assert "longest_keep_seconds is 5000" in refused.json()["message"]
    assert house.stored() == []


def keep(house: House, id: str, seconds: object, key: str = ANN) -> httpx.Response:
    content = json.dumps({"seconds": seconds})
    return house.ask("POST", f"/api/jobs/{id}/keep", key, content=content, headers=JSON)


def test_it_can_be_kept_longer_later(house: House) -> None:
    id = house.job()
    house.do()
    assert keep(house, id, 3000).json()["expires"] == 4.0 + 3000.0
    assert keep(house, id, 5001).status_code == 413
    for wrong in (0, -1, "long", None, 1e11):
        assert keep(house, id, wrong).status_code == 400
    assert keep(house, id, 10, BOB).status_code == 404
    assert house.ask("GET", f"/api/jobs/{id}").json()["expires"] == 4.0 + 3000.0


PATHS = (
    ("GET", ""),
    ("GET", "/events"),
    ("GET", "/result"),
    ("POST", "/cancel"),
    ("DELETE", ""),
)


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_what_has_expired_is_said_to_have(house: House, method: str, path: str) -> None:
    id = house.job(keep_seconds=7.0)
    house.do()
    assert house.ledger.forget(100_000.0, 100.0)
    said = house.ask(method, f"/api/jobs/{id}{path}")
    assert said.status_code == 410 and said.json()["code"] == "no-such"
    assert "has expired" in said.json()["message"]
    assert "1970-01-01 00:00:04 UTC" in said.json()["message"], "when it ended"
    other = house.ask(method, f"/api/jobs/{id}{path}", BOB)
    assert other.status_code == 404, "for others it never was"
    assert keep(house, id, 10).status_code == 410
    house.ledger.drop_gone(200_000.0)
    assert house.ask(method, f"/api/jobs/{id}{path}").status_code == 404


def test_a_deleted_job_is_simply_not_there(house: House) -> None:
    id = house.job()
    house.do()
    house.ask("DELETE", f"/api/jobs/{id}")
    assert house.ask("GET", f"/api/jobs/{id}").status_code == 404
