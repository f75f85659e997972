"""Events over real HTTP: live, replayed, resumed, for many, and nothing left when all are gone."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.service.gate import BOB, MSGPACK, House, bearer, live, submit_of
from weft.service.gateway import events, watch
from weft.service.gateway.events import News, message
from weft.service.gateway.state import Gateway
from weft.service.gateway.watch import Follow
from weft.wire.messages import EndEvent, decode, encode


@pytest.fixture
def house() -> House:
    return House()


class Told:
    """One message of a stream."""

    def __init__(self, lines: list[str]) -> None:
        parts = [line.partition(": ") for line in lines]
        fields = {name: value for name, _, value in parts}
        self.seq = int(fields.get("id", 0))
        self.event = fields.get("event", "")
        self.data = fields.get("data", "")


def told(reply: httpx.Response) -> Iterator[Told]:
    """The messages of a stream, as they come; comments are left out."""
    lines: list[str] = []
    for line in reply.iter_lines():
        if line and not line.startswith(":"):
            lines.append(line)
        elif lines:
            yield Told(lines)
            lines = []


def kinds(reply: httpx.Response) -> list[tuple[int, str]]:
    return [(one.seq, one.event) for one in told(reply)]


def eventually(check) -> None:
    """Waits for something that another thread is about to do."""
    end = time.monotonic() + 60
    while not check():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_finished_job_is_replayed_from_its_beginning_to_its_end(house: House) -> None:
    id = house.job()
    house.do()
    reply = house.ask("GET", f"/api/jobs/{id}/events")
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert kinds(reply) == [(1, "state"), (2, "state"), (3, "state"), (4, "end")]
    last = list(told(reply))[-1]
    job = decode(last.data.encode(), EndEvent, "json").job
    assert (job.id, job.state) == (id, "done")
    assert job == decode(house.ask("GET", f"/api/jobs/{id}").content, type(job), "json")


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_follower_goes_on_after_what_it_has(house: House, after: int) -> None:
    id = house.job()
    house.do()
    by_query = house.ask("GET", f"/api/jobs/{id}/events?after={after}")
    by_header = house.ask("GET", f"/api/jobs/{id}/events", headers={"Last-Event-ID": str(after)})
    assert kinds(by_query) == kinds(by_header)
    assert [seq for seq, _ in kinds(by_query)] == list(range(after + 1, 5))


def test_who_resumes_beyond_the_end_is_told_that_it_is_over(house: House) -> None:
    id = house.job()
    house.do()
    assert kinds(house.ask("GET", f"/api/jobs/{id}/events?after=99")) == [(0, "end")]


def test_events_arrive_while_the_job_runs(house: House) -> None:
    id = house.job()
    with (
        live(house) as url,
        httpx.Client(base_url=url, headers=bearer(), timeout=60) as client,
        client.stream("GET", f"/api/jobs/{id}/events") as reply,
    ):
        stream = told(reply)
        assert json.loads(next(stream).data) == {"type": "state", "state": "received"}
        house.price()
        assert json.loads(next(stream).data)["state"] == "queued"
        job = house.begin()
        assert json.loads(next(stream).data)["state"] == "running"
        house.log(job, "a line\nand an id: 7")
        log = next(stream)
        assert (log.event, json.loads(log.data)["text"]) == ("log", "a line\nand an id: 7")
        house.finish(job)
        assert [one.event for one in stream] == ["end"]


def test_a_lost_connection_loses_nothing(house: House) -> None:
    id, seen = house.job(), []
    with live(house) as url, httpx.Client(base_url=url, headers=bearer(), timeout=60) as client:

        def one() -> None:
            last = {"Last-Event-ID": str(len(seen))}
            with client.stream("GET", f"/api/jobs/{id}/events", headers=last) as reply:
                seen.append(next(told(reply)))  # and the connection is dropped

        one()
        house.price()
        one()
        job = house.begin()
        for number in range(5):
            house.log(job, str(number))
        while len(seen) < 8:
            one()
        house.finish(job)
        one()
    assert [message.seq for message in seen] == list(range(1, 10))
    assert [json.loads(message.data)["text"] for message in seen[3:8]] == list("01234")


def test_many_follow_one_job(house: House) -> None:
    id = house.job()
    found: list[list[tuple[int, str]]] = []
    with live(house) as url:

        def follow() -> None:
            with (
                httpx.Client(base_url=url, headers=bearer(), timeout=60) as client,
                client.stream("GET", f"/api/jobs/{id}/events") as reply,
            ):
                found.append(kinds(reply))

        threads = [threading.Thread(target=follow) for _ in range(12)]
        for thread in threads:
            thread.start()
        eventually(lambda: house.app.gateway.watch.waiting == 12)
        house.do()
        for thread in threads:
            thread.join(60)
    assert found == [[(1, "state"), (2, "state"), (3, "state"), (4, "end")]] * 12


def test_who_goes_away_leaves_nothing_behind(house: House) -> None:
    id = house.job()
    with live(house) as url, httpx.Client(base_url=url, headers=bearer(), timeout=60) as client:
        for _ in range(3):
            with client.stream("GET", f"/api/jobs/{id}/events") as reply:
                stream = told(reply)
                next(stream)
                assert house.app.gateway.watch.waiting == 1
            eventually(lambda: house.app.gateway.watch.waiting == 0)


def test_silence_is_broken_by_a_heartbeat(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "BEAT_SECONDS", 0.01)
    id = house.job()
    with (
        live(house) as url,
        httpx.Client(base_url=url, headers=bearer(), timeout=60) as client,
        client.stream("GET", f"/api/jobs/{id}/events") as reply,
    ):
        comments = (line for line in reply.iter_lines() if line.startswith(":"))
        assert [next(comments), next(comments)] == [": still here"] * 2


def test_a_lost_ring_costs_a_poll_only(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(house.bells.gateway, "ring", lambda: None)
    id = house.job()
    with (
        live(house) as url,
        httpx.Client(base_url=url, headers=bearer(), timeout=60) as client,
        client.stream("GET", f"/api/jobs/{id}/events") as reply,
    ):
        stream = told(reply)
        next(stream)
        house.do()
        assert [one.event for one in stream] == ["state", "state", "end"]


def test_what_came_with_the_ring_is_not_looked_for_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []

    def look(gateway: Gateway, id: str, after: int, inline: int = 0) -> News:
        looked.append(after)
        return real(gateway, id, after, inline)

    real = events.look
    monkeypatch.setattr(events, "look", look)
    monkeypatch.setattr(events, "LOAD_SECONDS", 100.0)
    monkeypatch.setattr(watch, "POLL_SECONDS", 100.0)
    id = house.job()
    with (
        live(house) as url,
        httpx.Client(base_url=url, headers=bearer(), timeout=60) as client,
        client.stream("GET", f"/api/jobs/{id}/events") as reply,
    ):
        stream = told(reply)
        next(stream)
        follower = Follow(id, 1, 0)
        eventually(lambda: {w.follows for w in house.app.gateway.watch._waiters} == {follower})
        house.do()
        assert [one.event for one in stream] == ["state", "state", "end"]
    assert looked == [0]


def test_a_stream_ends_when_its_job_is_deleted(house: House) -> None:
    id = house.job()
    with (
        live(house) as url,
        httpx.Client(base_url=url, headers=bearer(), timeout=60) as client,
        client.stream("GET", f"/api/jobs/{id}/events") as reply,
    ):
        stream = told(reply)
        next(stream)
        house.ledger._rows.clear()
        assert list(stream) == []


def test_a_server_that_ends_lets_its_followers_go(house: House) -> None:
    id = house.job()
    with (
        live(house) as url,
        httpx.Client(base_url=url, headers=bearer(), timeout=60) as client,
        client.stream("GET", f"/api/jobs/{id}/events") as reply,
    ):
        stream = told(reply)
        next(stream)
        assert house.server is not None
        house.server.finish()
        assert list(stream) == []


def test_a_server_that_ends_tells_the_end_of_what_is_over(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its followers may not have heard of it yet: there is no other server to resume at."""
    monkeypatch.setattr(house.bells.gateway, "ring", lambda: None)
    monkeypatch.setattr(watch, "POLL_SECONDS", 100.0)
    id = house.job()
    with (
        live(house) as url,
        httpx.Client(base_url=url, headers=bearer(), timeout=60) as client,
        client.stream("GET", f"/api/jobs/{id}/events") as reply,
    ):
        stream = told(reply)
        next(stream)
        house.do()
        assert house.server is not None
        house.server.finish()
        assert [one.event for one in stream] == ["state", "state", "end"]


def test_a_submission_is_acknowledged_as_the_first_event(house: House) -> None:
    headers = MSGPACK | {"Accept": "text/event-stream"}
    with (
        live(house) as url,
        httpx.Client(base_url=url, headers=bearer(), timeout=60) as client,
        client.stream("POST", "/api/jobs", content=encode(submit_of()), headers=headers) as reply,
    ):
        stream = told(reply)
        first = next(stream)
        assert (reply.status_code, first.event, first.seq) == (200, "accepted", 0)
        assert reply.headers["location"] == f"/api/jobs/{json.loads(first.data)['id']}"
        house.do()
        assert [one.seq for one in stream] == [1, 2, 3, 4]


def test_a_refused_submission_is_an_error_and_no_stream(house: House) -> None:
    accept = {"Accept": "text/event-stream"}
    reply = house.submit(submit_of(model="nope"), **accept)
    assert (reply.status_code, reply.json()["code"]) == (404, "wrong-model")


@pytest.mark.parametrize("last", ["-1", "x", "1.5", "9" * 30, "1, 2"])
def test_a_place_that_is_no_number_is_refused(house: House, last: str) -> None:
    id = house.job()
    reply = house.ask("GET", f"/api/jobs/{id}/events", headers={"Last-Event-ID": last})
    assert (reply.status_code, reply.json()["code"]) == (400, "message")


def test_nobody_follows_the_job_of_somebody_else(house: House) -> None:
    id = house.job()
    assert house.ask("GET", f"/api/jobs/{id}/events", BOB).status_code == 404


def test_an_event_cannot_forge_another() -> None:
    assert message("log", b"a\nevent: end\r\ndata: x\rid: 9", 3) == (
        b"id: 3\nevent: log\ndata: a\ndata: event: end\ndata: data: x\ndata: id: 9\n\n"
    )


def test_a_small_result_comes_with_the_end(house: House) -> None:
    id = house.job()
    data = house.do()
    with live(house) as url, httpx.Client(base_url=url, headers=bearer(), timeout=60) as client:

        def end(inline: str | None) -> EndEvent:
            more = {} if inline is None else {"Weft-Inline": inline}
            reply = client.get(f"/api/jobs/{id}/events", headers=more)
            last = [line for line in reply.text.splitlines() if line.startswith("data:")][-1]
            return decode(last.removeprefix("data: ").encode(), EndEvent, "json")

        assert end(str(len(data))).result == data
        for other in (None, "0", str(len(data) - 1)):
            assert end(other).result == b""
        house.objects.delete(f"results/{id}")
        assert end("60000").result == b""  # who fetches it hears that it is gone
        refused = client.get(f"/api/jobs/{id}/events", headers={"Weft-Inline": "-1"})
        assert refused.status_code == 400 and "Weft-Inline" in refused.text
