"""Limits of keys at the door, models that a key may use, and what is counted of its owner."""

from __future__ import annotations

import hashlib
from typing import Any

import httpx
import pytest

from tests.service.gate import (
    ANN,
    BOB,
    MODEL,
    MSGPACK,
    PRINT,
    House,
    card_of,
    frame,
    submit_of,
)
from tests.service.jobs import CANCEL, FAILED
from weft.graph.node import Graph, Read, Ref, Write
from weft.graph.site import Site
from weft.service.gateway.meter import Meter, Stored
from weft.service.jobs.limits import Bucket, in_words, take
from weft.service.jobs.usage import KEY_LIMITS, Usage, day_of, total, until_tomorrow
from weft.service.store.interface import Key
from weft.service.store.memory import MemoryLedger, MemoryObjects
from weft.settings import NAMES, Settings
from weft.wire import frames
from weft.wire.codec import encode_edits
from weft.wire.messages import OpenSession, UsageList, decode, encode

NOON = 12 * 3600.0 + 20_000 * 86_400.0


@pytest.fixture
def house() -> House:
    return House()


def with_key(house: House, name: str, owner: str = "eve", **fields: Any) -> str:
    house.ledger.add_key(Key(owner, hashlib.sha256(name.encode()).hexdigest(), 0.0, **fields))
    return name


def at(house: House, now: float) -> None:
    house.app.gateway.clock = lambda: now


def refused(said: httpx.Response, name: str, value: float) -> int:
    """The limit and its value stand in the refusal; seconds after which to come back."""
    assert said.status_code == 429, said.text
    assert said.json()["code"] == "limit"
    assert f"the limit {name} is {value:g}" in said.json()["message"]
    assert said.json()["fix"]
    return int(said.headers["retry-after"])


def edit_file() -> bytes:
    site = Site("layer", "output")
    read = Read(site=site, shape=(1, 2, 4), dtype="float32")
    graph = Graph(nodes=(read, Write(site=site, value=Ref(0))))
    return encode_edits(graph, {}, PRINT)


def used(house: House, owner: str = "eve") -> Usage:
    house.app.gateway.meter.flush()
    return total(house.ledger.usage(owner))


# -- requests --------------------------------------------------------------------------------------


def test_a_bucket_fills_by_itself() -> None:
    waits, bucket = [], Bucket()
    for now in (0.0, 0.0, 0.0, 10.0, 29.0, 30.0, 30.0, 1000.0, 1000.0, 1000.0):
        wait, bucket = take(bucket, 2, 60.0, now)
        waits.append(wait)
    assert waits == pytest.approx([0.0, 0.0, 30.0, 20.0, 1.0, 0.0, 30.0, 0.0, 0.0, 30.0])


def test_so_many_requests_a_minute_and_no_more(house: House) -> None:
    few = with_key(house, "few", limits={"requests_per_minute": 3})
    at(house, NOON)
    for _ in range(3):
        assert house.ask("GET", "/api/jobs", few).is_success
    seconds = refused(house.ask("GET", "/api/jobs", few), "requests_per_minute", 3)
    assert seconds == 20
    at(house, NOON + seconds - 0.1)
    assert house.ask("GET", "/api/jobs", few).status_code == 429
    at(house, NOON + seconds)
    assert house.ask("GET", "/api/jobs", few).is_success
    assert house.ask("GET", "/api/jobs", ANN).is_success  # others' requests are others'


def test_two_keys_of_an_owner_have_one_account(house: House) -> None:
    keys = [with_key(house, name, limits={"requests_per_minute": 2}) for name in ("k1", "k2")]
    at(house, NOON)
    said = [house.ask("GET", "/api/jobs", keys[n % 2]).status_code for n in range(3)]
    assert said == [200, 200, 429]


# -- bytes -----------------------------------------------------------------------------------------


def test_bytes_up_and_down_are_those_of_bodies(house: House) -> None:
    eve = with_key(house, "e")
    body = encode(submit_of())
    reply = house.submit(submit_of(), eve)
    first = used(house)
    assert (first.up, first.down, first.requests) == (len(body), len(reply.content), 1)
    other = house.ask("GET", "/api/models", eve)
    assert used(house).down == first.down + len(other.content)


@pytest.mark.parametrize(
    ("name", "most", "verb"),
    [("up_bytes_per_day", 800, "send"), ("down_bytes_per_day", 250, "fetch")],
)
def test_bytes_of_a_day(house: House, name: str, most: int, verb: str) -> None:
    eve = with_key(house, "e", limits={name: most})
    at(house, NOON)
    said = [house.submit(submit_of(request_id=f"r{n}"), eve) for n in range(4)]
    assert said[0].status_code == 201
    last = said[-1]
    assert refused(last, name, most) == 12 * 3600 == until_tomorrow(NOON)
    assert verb in last.json()["message"] and "12 hours" in last.json()["fix"]
    assert house.ask("GET", "/api/usage", eve).is_success  # why, one may always ask
    at(house, NOON + 12 * 3600)
    assert house.submit(submit_of(request_id="r9"), eve).status_code == 201


def test_bytes_of_a_day_outlive_the_gateway(house: House) -> None:
    eve = with_key(house, "e", limits={"down_bytes_per_day": 300})
    at(house, NOON)
    while house.ask("GET", "/api/models", eve).is_success:
        pass
    house.app.gateway.meter.flush()
    house.app.gateway.meter = Meter(house.ledger, lambda: NOON)
    refused(house.ask("GET", "/api/models", eve), "down_bytes_per_day", 300)


# -- jobs ------------------------------------------------------------------------------------------


def test_the_queue_of_one_key_is_as_long_as_it_may_be(house: House) -> None:
    eve = with_key(house, "e", limits={"queued_jobs": 2})
    said = [house.submit(submit_of(request_id=f"r{n}"), eve) for n in range(3)]
    assert [one.status_code for one in said] == [201, 201, 429]
    assert "2 jobs of this key wait" in said[2].json()["message"]
    seconds = refused(said[2], "queued_jobs", 2)
    assert f"in {in_words(seconds)} there may be room" in said[2].json()["fix"]
    assert house.submit(submit_of(request_id="r9"), ANN).status_code == 201


def test_sessions_that_are_open_at_once(house: House) -> None:
    eve = with_key(house, "e", limits={"sessions": 1})
    said = []
    for number in range(2):
        content = encode(OpenSession(request_id=f"s{number}", model=MODEL, fingerprint=PRINT))
        said.append(house.ask("POST", "/api/sessions", eve, content=content, headers=MSGPACK))
    assert said[0].status_code == 201
    seconds = refused(said[1], "sessions", 1)
    assert f"in {in_words(seconds)} there may be room" in said[1].json()["fix"]


def test_seconds_of_a_day(house: House) -> None:
    eve = with_key(house, "e", limits={"run_seconds_per_day": 5})
    at(house, NOON)
    house.ledger.add_usage([Usage(owner="eve", day=day_of(NOON), model=MODEL, seconds=4.9)])
    assert house.submit(submit_of(request_id="r1"), eve).status_code == 201
    house.ledger.add_usage([Usage(owner="eve", day=day_of(NOON), model=MODEL, seconds=0.1)])
    said = house.submit(submit_of(request_id="r2"), eve)
    assert refused(said, "run_seconds_per_day", 5) == 12 * 3600
    assert house.submit(submit_of(request_id="r1"), eve).status_code == 200  # that was let in
    at(house, NOON + 86_400)
    assert house.submit(submit_of(request_id="r2"), eve).status_code == 201


def test_nodes_and_bytes_of_one_request(house: House) -> None:
    few = with_key(house, "few", limits={"nodes": 1})
    said = house.submit(submit_of(), few)
    assert said.status_code == 413 and "the limit nodes is 1" in said.json()["message"]
    short = with_key(house, "short", limits={"body_bytes": 10})
    assert "body_bytes is 10" in house.submit(submit_of(), short).json()["message"]


def test_weight_and_limits_travel_with_the_job(house: House) -> None:
    eve = with_key(house, "e", weight=3.0, limits={"result_bytes": 7})
    job = house.ledger.job(house.job(eve))
    assert job is not None
    assert (job.weight, job.limits, job.nodes) == (3.0, {"result_bytes": 7}, 2)


# -- constants -------------------------------------------------------------------------------------


def test_bytes_of_constants_that_are_kept(house: House) -> None:
    one, two, three = frame(1, 2, 3), frame(4, 5), frame(6)
    size = len(frames.write({"x": one}))
    eve = with_key(house, "e", limits={"stored_bytes": 2 * size})
    media = {"Content-Type": "application/octet-stream"}

    def put(sent: Any) -> httpx.Response:
        path = f"/api/constants/{frames.digest(sent)}"
        return house.ask("PUT", path, eve, content=frames.write({"x": sent}), headers=media)

    assert put(one).status_code == 201
    assert house.submit(submit_of(two, request_id="r1"), eve).status_code == 201
    assert put(one).status_code == 200  # it is there
    said = house.submit(submit_of(three, request_id="r2"), eve)
    seconds = refused(said, "stored_bytes", 2 * size)
    assert 0 < seconds <= house.settings.keep_seconds
    refused(put(three), "stored_bytes", 2 * size)
    for name in house.objects.names("constants/eve/"):
        house.objects.delete(name)  # as the server does with what is not used any more
    assert put(three).status_code == 201


def test_what_is_stored_is_measured_when_it_seems_too_much() -> None:
    objects = MemoryObjects()
    stored = Stored(objects)
    objects.put("constants/ann/a", b"12345")
    assert stored.fits("ann", 4, 10)
    assert not stored.fits("ann", 6, 10)
    assert stored.fits("bob", 10, 10)
    objects.delete("constants/ann/a")
    assert stored.fits("ann", 6, 10)


def test_edits_are_kept_bytes_as_well(house: House) -> None:
    file = edit_file()
    eve = with_key(house, "e", limits={"stored_bytes": 2 * len(file)})

    def put(name: str) -> httpx.Response:
        media = {"Content-Type": "application/octet-stream"}
        return house.ask("PUT", f"/api/edits/{name}", eve, content=file, headers=media)

    assert [put(name).status_code for name in ("a", "b", "a")] == [201, 201, 200]
    refused(put("c"), "stored_bytes", 2 * len(file))
    refused(house.submit(submit_of(frame(1)), eve), "stored_bytes", 2 * len(file))
    assert house.ask("DELETE", "/api/edits/a", eve).status_code == 204
    assert put("c").status_code == 201


# -- models ----------------------------------------------------------------------------------------


def test_a_model_that_a_key_may_not_use_is_not_there(house: House) -> None:
    house.ledger.put_card(card_of("other"))
    some = with_key(house, "some", models=("other",))
    none = house.ask("GET", "/api/card?model=nothing", some)
    assert none.status_code == 404
    for path in (f"/api/card?model={MODEL}", f"/api/tables?model={MODEL}"):
        said = house.ask("GET", path, some)
        assert said.status_code == 404
        assert said.json()["message"].replace(MODEL, "nothing") == none.json()["message"]
        assert said.json()["fix"] == none.json()["fix"] == "the models it has: other"
    query = {"model": MODEL, "texts": ["a"]}
    assert house.ask("POST", "/api/tokens", some, json=query).status_code == 404
    assert house.submit(submit_of(), some).status_code == 404
    for path in ("/api/models", "/api/status"):
        assert [one["id"] for one in house.ask("GET", path, some).json()["models"]] == ["other"]
    allowed = house.submit(submit_of(model="other", fingerprint=PRINT), some)
    assert allowed.status_code == 201


# -- usage -----------------------------------------------------------------------------------------


def test_a_job_is_counted_when_it_is_over(house: House) -> None:
    house.job(BOB)
    assert total(house.ledger.usage("bob")) == total([])
    house.price()
    house.finish(house.begin())
    (row,) = house.ledger.usage("bob")
    assert (row.jobs, row.cost, row.seconds, row.model) == (1, 1.0, 1.0, MODEL)


def test_a_job_begun_again_is_counted_once(house: House) -> None:
    id = house.job(BOB)
    house.price()
    house.begin()
    house.ledger.release("worker", 50.0)
    assert total(house.ledger.usage("bob")) == total([])
    again = house.ledger.claim("queued", house.models, "worker", 60.0, 1e12)
    assert again is not None and again.id == id
    house.ledger.step(id, FAILED, 62.5, again.token)
    row = total(house.ledger.usage("bob"))
    assert (row.jobs, row.cost, row.seconds) == (1, 1.0, 2.5)


def test_a_job_that_its_workers_died_of_is_charged_for_all_of_them(house: House) -> None:
    at(house, 1.0)
    house.job(BOB)
    house.price()
    for begun in range(house.settings.attempts):
        assert house.ledger.claim("queued", house.models, "w", 100.0 * (begun + 1), 1e12)
        house.ledger.release("w", 100.0 * (begun + 1) + 10)
    row = total(house.ledger.usage("bob"))
    assert (row.jobs, row.seconds) == (1, 10.0 * house.settings.attempts)


def test_what_was_never_begun_costs_nothing(house: House) -> None:
    id = house.job(BOB)
    house.price()
    house.ledger.step(id, CANCEL, 3.0)
    assert total(house.ledger.usage("bob")) == total([])


def test_refusals_are_counted(house: House) -> None:
    few = with_key(house, "few", scopes=("read",), limits={"requests_per_minute": 2})
    at(house, NOON)
    assert house.ask("POST", "/api/jobs", few).status_code == 403
    for _ in range(3):
        house.ask("GET", "/api/jobs", few)
    assert used(house).refusals == 2


def test_usage_is_ones_own_and_the_admins(house: House) -> None:
    house.ledger.add_usage(
        [
            Usage(owner="ann", day="2026-01-01", model=MODEL, jobs=1),
            Usage(owner="ann", day="2026-01-02", model=MODEL, jobs=2),
            Usage(owner="bob", day="2026-01-02", model=MODEL, jobs=4),
        ]
    )
    boss = with_key(house, "boss", scopes=("admin",))
    since = "since=2026-01-01&until=2026-01-02"

    def jobs(key: str, query: str = since) -> list[int]:
        said = house.ask("GET", f"/api/usage?{query}", key)
        assert said.is_success, said.text
        return [row.jobs for row in decode(said.content, UsageList, "json").usage]

    assert jobs(ANN) == [1, 2]
    assert jobs(ANN, f"{since}&owner=ann") == [1, 2]
    assert jobs(ANN, "since=2026-01-02&until=2026-01-02") == [2]
    assert house.ask("GET", "/api/usage?owner=bob", ANN).status_code == 403
    assert house.ask("GET", "/api/usage?owner=*", ANN).status_code == 403
    assert jobs(boss, f"{since}&owner=bob") == [4]
    assert jobs(boss, f"{since}&owner=*") == [1, 2, 4]


def test_usage_tells_the_limits_of_the_key(house: House) -> None:
    eve = with_key(house, "e", weight=2.0, expires=4e9, limits={"nodes": 5})
    said = decode(house.ask("GET", "/api/usage", eve).content, UsageList, "json")
    assert said.limits["nodes"] == 5 and said.limits["queued_jobs"] == Settings().queued_jobs
    assert set(said.limits) == set(KEY_LIMITS) <= set(NAMES)
    assert (said.weight, said.expires) == (2.0, 4e9)


def test_what_cannot_be_written_down_is_written_later(monkeypatch) -> None:
    ledger = MemoryLedger()
    meter = Meter(ledger, lambda: NOON)
    add, broken = ledger.add_usage, True

    def fails(rows: Any) -> None:
        if broken:
            raise OSError("no space")
        add(rows)

    monkeypatch.setattr(ledger, "add_usage", fails)
    meter.count("ann", up=3)
    meter.flush()
    meter.count("ann", up=4)
    broken = False
    meter.flush()
    assert total(ledger.usage("ann")).up == 7 == meter.today("ann").up


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1, "1 second"), (90, "90 seconds"), (150, "3 minutes"), (12 * 3600, "12 hours")],
)
def test_times_in_words(seconds: int, text: str) -> None:
    assert in_words(seconds) == text
