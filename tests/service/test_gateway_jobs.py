"""Submitting, idempotency, ownership, cancelling, deleting; what the store holds afterwards."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.service.gate import (
    ANN,
    BOB,
    IDS,
    MODEL,
    MSGPACK,
    PRINT,
    House,
    bearer,
    frame,
    live,
    submit_of,
)
from weft.graph.node import Const, Graph
from weft.service.store.interface import Card
from weft.settings import Settings
from weft.wire import frames
from weft.wire.messages import (
    JobInfo,
    JobList,
    Missing,
    MissingQuery,
    PlainInputs,
    Submit,
    decode,
    encode,
)


@pytest.fixture
def house() -> House:
    return House()


def test_a_job_is_in_the_store_before_it_is_acknowledged(house: House) -> None:
    reply = house.submit(submit_of())
    info = decode(reply.content, JobInfo, "json")
    assert (reply.status_code, info.state, info.model, info.ahead) == (201, "received", MODEL, 0)
    assert reply.headers["location"] == f"/api/jobs/{info.id}"
    assert house.stored() == [f"submits/{info.id}", f"job {info.id}"]
    assert decode(house.objects.get(f"submits/{info.id}"), Submit) == submit_of()


def test_the_checker_is_rung(house: House) -> None:
    house.job()
    assert house.bells.checker.wait(0)


def test_a_job_may_come_as_json(house: House) -> None:
    reply = house.ask(
        "POST",
        "/api/jobs",
        content=encode(submit_of(frame(1)), "json"),
        headers={"Content-Type": "application/json; charset=utf-8"},
    )
    assert reply.status_code == 201, reply.text
    stored = decode(house.objects.get(f"submits/{reply.json()['id']}"), Submit)
    assert frames.read(stored.tensors)[0].keys() == {"input_ids"}


def test_constants_are_kept_beside_the_job_under_their_owner(house: House) -> None:
    info = house.submit(submit_of(frame(1, 2))).json()
    digest = frames.digest(frame(1, 2))
    assert f"constants/ann/{digest}" in house.stored()
    stored = decode(house.objects.get(f"submits/{info['id']}"), Submit)
    assert stored.constants == {"c0": digest}
    assert frames.read(stored.tensors)[0] == {"input_ids": IDS}
    tensors, _ = frames.read(house.objects.get(f"constants/ann/{digest}"))
    assert tensors == {"x": frame(1, 2)}
    job = house.ledger.job(info["id"])
    assert job is not None
    assert job.constants == (digest,)


def test_missing_constants_are_named(house: House) -> None:
    reply = house.submit(submit_of(frame(1), frame(2), send=False))
    digests = sorted(frames.digest(one) for one in (frame(1), frame(2)))
    assert (reply.status_code, reply.json()["code"]) == (409, "no-such")
    assert reply.json()["missing"] == digests
    assert house.stored() == []


def test_somebody_elses_constants_are_missing(house: House) -> None:
    house.submit(submit_of(frame(1)), BOB)
    reply = house.submit(submit_of(frame(1), send=False), ANN)
    assert reply.json()["missing"] == [frames.digest(frame(1))]


def test_a_constant_is_uploaded_once(house: House) -> None:
    digest = frames.digest(frame(1, 2))
    path, data = f"/api/constants/{digest}", frames.write({"x": frame(1, 2)})
    headers = {"Content-Type": "application/octet-stream"}
    query = encode(MissingQuery(digests=(digest,)))

    def missing(key: str = ANN) -> tuple[str, ...]:
        said = house.ask("POST", "/api/constants/missing", key, content=query, headers=MSGPACK)
        return decode(said.content, Missing, "json").digests

    assert missing() == (digest,)
    assert house.ask("PUT", path, content=data, headers=headers).status_code == 201
    assert house.ask("PUT", path, content=data, headers=headers).status_code == 200
    assert missing() == ()
    assert missing(BOB) == (digest,)
    assert house.objects.get(f"constants/ann/{digest}") == data
    assert house.submit(submit_of(frame(1, 2), send=False)).status_code == 201


def test_the_same_request_is_the_same_job(house: House) -> None:
    first = house.submit(submit_of(frame(1)))
    # Now the constant is there, and need not travel again.
    again = house.submit(submit_of(frame(1), send=False))
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json()["id"] == first.json()["id"]
    assert len([name for name in house.stored() if name.startswith("submits/")]) == 1


def test_the_same_id_from_somebody_else_is_another_job(house: House) -> None:
    assert house.job(ANN) != house.job(BOB)


def test_another_request_under_the_same_id_is_refused(house: House) -> None:
    house.job()
    before = house.stored()
    for other in (
        submit_of(strict=False),
        submit_of(tensors=frames.write({"input_ids": frame(1)})),
    ):
        reply = house.submit(other)
        assert (reply.status_code, reply.json()["code"]) == (409, "message")
    assert house.stored() == before


def test_what_was_acknowledged_stays_so(house: House) -> None:
    """Also when it would be refused by now: the model fails, the constants are gone."""
    id = house.submit(submit_of(frame(1))).json()["id"]
    house.objects.delete(f"constants/ann/{frames.digest(frame(1))}")
    house.ledger.put_card(Card(MODEL, "failed", reason="no memory"))
    reply = house.submit(submit_of(frame(1), send=False))
    assert (reply.status_code, reply.json()["id"]) == (200, id)


def test_equal_requests_at_once_are_one_job(house: House) -> None:
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: house.submit(submit_of(frame(1))), range(16)))
    assert sorted(reply.status_code for reply in replies) == [200] * 15 + [201]
    assert len({reply.json()["id"] for reply in replies}) == 1
    assert len(house.stored()) == 3


def test_a_job_waits_for_a_model_that_is_loading(house: House) -> None:
    reply = house.submit(submit_of(model="other", fingerprint="0" * 64))
    assert reply.status_code == 201


def test_a_model_that_is_not_served_is_refused(house: House) -> None:
    reply = house.submit(submit_of(model="gpt9"))
    assert (reply.status_code, reply.json()["code"]) == (404, "wrong-model")
    assert reply.json()["fix"] == "the models it has: tiny, other"
    assert house.stored() == []


def test_a_model_that_could_not_be_loaded_is_refused(house: House) -> None:
    house.ledger.put_card(Card("other", "failed", reason="no such file"))
    reply = house.submit(submit_of(model="other"))
    assert (reply.status_code, reply.json()["code"]) == (503, "model-not-ready")
    assert "no such file" in reply.json()["message"]


def test_a_graph_for_another_model_is_refused(house: House) -> None:
    reply = house.submit(submit_of(fingerprint="0" * 64))
    assert (reply.status_code, reply.json()["code"]) == (409, "other-model")
    assert "remote=True" in reply.json()["fix"]


def test_too_many_waiting_jobs_are_refused() -> None:
    house = House(Settings(queued_jobs=2))
    house.job(request_id="1")
    house.job(request_id="2")
    before = house.stored()
    reply = house.submit(submit_of(request_id="3"))
    assert (reply.status_code, reply.json()["code"]) == (429, "limit")
    assert int(reply.headers["retry-after"]) > 0
    assert house.stored() == before
    assert house.submit(submit_of(request_id="2")).status_code == 200
    assert house.submit(submit_of(), BOB).status_code == 201


def test_a_draining_server_takes_no_jobs_but_answers(house: House) -> None:
    id = house.job()
    house.app.gateway.drain()
    reply = house.submit(submit_of(request_id="r2"))
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
    assert house.ask("GET", f"/api/jobs/{id}").status_code == 200


def test_a_limit_names_itself_its_value_and_what_was_asked() -> None:
    house = House(Settings(nodes=1))
    reply = house.submit(submit_of())
    assert (reply.status_code, reply.json()["code"]) == (413, "limit")
    assert "2 nodes" in reply.json()["message"]
    assert "limit nodes is 1" in reply.json()["message"]


def test_a_refused_graph_names_the_users_line(house: House) -> None:
    good = submit_of()
    bad = Graph(
        nodes=(*good.graph.nodes, Const(key="c", shape=(-1,), dtype="float32")),
        where=good.graph.where,
    )
    reply = house.submit(submit_of(graph=bad))
    assert (reply.status_code, reply.json()["code"]) == (422, "graph")
    assert reply.json()["line"] == "mine.py:3: h.save()"


def test_inputs_of_other_modules_are_numbered(house: House) -> None:
    inputs = PlainInputs()
    tensors = frames.write({"in.0": frame(1), "in.1": frame(2)})
    assert house.submit(submit_of(inputs=inputs, tensors=tensors)).status_code == 201
    odd = frames.write({"in.0": frame(1), "in.2": frame(2)})
    reply = house.submit(submit_of(request_id="r2", inputs=inputs, tensors=odd))
    assert (reply.status_code, reply.json()["code"]) == (400, "message")


def test_jobs_are_listed_newest_first_in_pages(house: House) -> None:
    ids = [house.job(request_id=str(number)) for number in range(5)]
    house.job(BOB)
    first = decode(house.ask("GET", "/api/jobs?limit=3").content, JobList, "json").jobs
    assert [job.id for job in first] == ids[:1:-1]
    rest = house.ask("GET", f"/api/jobs?limit=3&before={first[-1].id}").json()["jobs"]
    assert [job["id"] for job in rest] == [ids[1], ids[0]]


def test_a_job_is_told_with_its_place_price_and_end(house: House) -> None:
    house.job(request_id="before")
    id = house.job()
    assert house.ask("GET", f"/api/jobs/{id}").json()["ahead"] == 1
    house.do()
    data = house.do()
    said = decode(house.ask("GET", f"/api/jobs/{id}").content, JobInfo, "json")
    assert said.state == "done"
    assert said.price is not None
    assert said.result is not None
    assert (said.result.bytes, said.result.names) == (len(data), ("h", "k"))
    assert said.expires == 4.0 + house.settings.keep_seconds


def test_waiting_ends_with_the_job() -> None:
    house = House()
    id = house.job()

    async def both() -> httpx.Response:
        waiting = asyncio.create_task(house._ask("GET", f"/api/jobs/{id}?wait=60", ANN))
        while not house.app.gateway.watch.waiting:  # noqa: ASYNC110
            await asyncio.sleep(0)
        house.do()
        return await waiting

    assert asyncio.run(both()).json()["state"] == "done"
    assert house.app.gateway.watch.waiting == 0


def test_waiting_ends_with_the_time(house: House) -> None:
    id = house.job()
    assert house.ask("GET", f"/api/jobs/{id}?wait=0.01").json()["state"] == "received"


def test_a_waiting_job_is_cancelled_at_once(house: House) -> None:
    id = house.job()
    said = decode(house.ask("POST", f"/api/jobs/{id}/cancel").content, JobInfo, "json")
    assert said.state == "cancelled"
    assert said.error is not None
    assert said.error.code == "cancelled"
    assert house.objects.names("submits/") == []


def test_a_running_job_is_told_to_stop(house: House) -> None:
    id = house.job()
    house.price()
    job = house.begin()
    assert house.ask("POST", f"/api/jobs/{id}/cancel").json()["state"] == "running"
    assert job.token is not None
    assert not house.ledger.renew(id, job.token, 1e12)
    assert house.bells.worker(MODEL).wait(0)


def test_a_finished_job_stays_what_it_is(house: House) -> None:
    id = house.job()
    house.do()
    assert house.ask("POST", f"/api/jobs/{id}/cancel").json()["state"] == "done"


def test_only_a_finished_job_can_be_deleted(house: House) -> None:
    id = house.job()
    early = house.ask("DELETE", f"/api/jobs/{id}")
    assert (early.status_code, early.json()["code"]) == (409, "not-finished")
    house.do()
    gone = house.ask("DELETE", f"/api/jobs/{id}")
    assert (gone.status_code, gone.content) == (204, b"")
    assert house.stored() == []
    assert house.ask("DELETE", f"/api/jobs/{id}").status_code == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""),
        ("GET", "?wait=30"),
        ("GET", "/events"),
        ("GET", "/result"),
        ("GET", "/result?name=h"),
        ("POST", "/cancel"),
        ("DELETE", ""),
    ],
)
def test_a_job_of_somebody_else_is_not_there(house: House, method: str, path: str) -> None:
    id = house.job()
    house.do()
    theirs = house.ask(method, f"/api/jobs/{id}{path}", BOB)
    nobodys = house.ask(method, f"/api/jobs/nosuchjob{path}", BOB)
    assert theirs.status_code == nobodys.status_code == 404
    assert theirs.json()["message"] == nobodys.json()["message"]
    assert house.ask("GET", f"/api/jobs/{id}").json()["state"] == "done"


def test_others_do_not_see_a_job_in_their_list(house: House) -> None:
    house.job()
    assert house.ask("GET", "/api/jobs", BOB).json() == {"jobs": []}


def test_a_submission_over_http_is_followed_on_the_same_connection(house: House) -> None:
    """The way in which a client runs one block."""
    with live(house) as url, httpx.Client(base_url=url, headers=bearer(), timeout=60) as client:
        assert client.get(f"/api/card?model={MODEL}").json()["info"]["fingerprint"] == PRINT
        for number in range(3):
            message = encode(submit_of(request_id=str(number)))
            headers = MSGPACK | {"Accept": "text/event-stream"}
            with client.stream("POST", "/api/jobs", content=message, headers=headers) as reply:
                lines = reply.iter_lines()
                assert next(lines) == "event: accepted"
                id = accepted(next(lines)).id
                data = house.do()
                assert "event: end" in list(lines)
            assert client.get(f"/api/jobs/{id}/result").content == data


def accepted(line: str) -> JobInfo:
    return decode(line.removeprefix("data: ").encode(), JobInfo, "json")
