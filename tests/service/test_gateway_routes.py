"""What the server says of itself and its models, and who may ask."""

from __future__ import annotations

import re

import httpx
import pytest
from msgspec.structs import replace
from starlette.responses import Response

from tests.service.gate import ANN, MODEL, OLD, OPS, PRINT, House, bearer, card_of, live
from weft.service.gateway import app
from weft.service.gateway.app import ROUTES
from weft.service.gateway.entry import Entry
from weft.service.store.interface import Card, Note
from weft.settings import Settings
from weft.wire.messages import (
    ErrorReport,
    Health,
    Hello,
    ModelCard,
    ModelList,
    ServerStatus,
    Tables,
    decode,
)


@pytest.fixture
def house() -> House:
    return House()


def named(entry: Entry) -> str:
    return f"{entry.method} {entry.path}"


def test_the_handshake_needs_no_key(house: House) -> None:
    said = decode(house.ask("GET", "/api/hello", None).content, Hello, "json")
    assert said.protocols == (1,)
    assert said.limits.body_bytes == house.settings.body_bytes


def test_an_answer_comes_in_the_form_that_is_preferred(house: House) -> None:
    packed = house.ask("GET", "/api/hello", headers={"Accept": "application/msgpack"})
    assert packed.headers["content-type"] == "application/msgpack"
    assert decode(packed.content, Hello).version == "0.1.0"
    both = "application/msgpack;q=0.2, application/json"
    assert house.ask("GET", "/api/hello", headers={"Accept": both}).json()["version"] == "0.1.0"


def test_health_is_ready_when_every_model_is(house: House) -> None:
    early = house.ask("GET", "/health", None)
    assert early.status_code == 503
    assert early.headers["retry-after"]
    house.ledger.put_card(card_of("other"))
    house.app.gateway.looked = (-1e9, {})  # what was found out is kept for a moment
    late = house.ask("GET", "/health", None)
    assert late.status_code == 200
    assert decode(late.content, Health, "json").ready


def test_health_is_not_ready_while_it_drains(house: House) -> None:
    house.ledger.put_card(card_of("other"))
    house.app.gateway.drain()
    said = house.ask("GET", "/health", None)
    assert (said.status_code, said.json()["parts"]["gateway"]) == (503, "draining")


def test_health_says_when_the_store_fails(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Card]:
        raise OSError("disk /dev/secret is gone")

    monkeypatch.setattr(house.ledger, "cards", broken)
    said = house.ask("GET", "/health", None)
    assert (said.status_code, said.json()["parts"]["store"]) == (503, "failing")
    assert "secret" not in said.text


def test_health_names_no_model(house: House) -> None:
    assert MODEL not in house.ask("GET", "/health", None).text


def test_models_are_listed_whatever_state_they_are_in(house: House) -> None:
    house.ledger.put_card(Card("other", "failed", reason="no such file"))
    said = decode(house.ask("GET", "/api/models").content, ModelList, "json")
    assert [(info.id, info.state) for info in said.models] == [
        (MODEL, "ready"),
        ("other", "failed"),
    ]
    assert said.models[1].reason == "no such file"


def test_status_counts_jobs(house: House) -> None:
    house.job()
    house.job(request_id="r2")
    house.price()
    house.begin()
    said = decode(house.ask("GET", "/api/status").content, ServerStatus, "json")
    assert [(one.id, one.waiting, one.running) for one in said.models] == [
        (MODEL, 1, 1),
        ("other", 0, 0),
    ]


def test_a_card_is_not_sent_twice(house: House) -> None:
    first = house.ask("GET", f"/api/card?model={MODEL}")
    assert decode(first.content, ModelCard, "json").info.fingerprint == PRINT
    tag = first.headers["etag"]
    again = house.ask("GET", f"/api/card?model={MODEL}", headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")


def test_tables_are_those_of_the_card(house: House) -> None:
    said = house.ask("GET", f"/api/tables?model={MODEL}")
    assert decode(said.content, Tables, "json").data == b"tables"


@pytest.mark.parametrize("path", ["/api/card", "/api/tables"])
def test_a_model_that_is_not_there_is_named_with_those_that_are(house: House, path: str) -> None:
    unknown = house.ask("GET", f"{path}?model=nope")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "wrong-model")
    assert MODEL in unknown.json()["fix"]
    loading = house.ask("GET", f"{path}?model=other")
    assert (loading.status_code, loading.headers["retry-after"]) == (503, "5")


def test_every_request_has_an_id_of_its_own(house: House) -> None:
    good, bad = house.ask("GET", "/api/hello"), house.ask("GET", "/api/nothing")
    assert good.headers["weft-request-id"] != bad.headers["weft-request-id"]
    report = decode(bad.content, ErrorReport, "json")
    assert report.request_id == bad.headers["weft-request-id"]


def test_an_unknown_path_is_an_error_report(house: House) -> None:
    said = house.ask("GET", "/api/nothing/here")
    assert (said.status_code, said.json()["code"]) == (404, "no-such")


def test_a_wrong_method_says_which_are_right(house: House) -> None:
    said = house.ask("PATCH", "/api/jobs")
    assert (said.status_code, said.headers["allow"]) == (405, "GET, POST")


@pytest.mark.parametrize("entry", ROUTES, ids=named)
def test_a_key_is_needed_where_the_table_says_so(house: House, entry: Entry) -> None:
    path = entry.path.replace("{id}", "x").replace("{digest}", "0" * 64)
    for key in (None, "weft_wrong", OLD, ""):
        said = house.ask(entry.method, path, key)
        assert (said.status_code == 401) == entry.key
        if entry.key:
            assert said.headers["www-authenticate"].startswith("Bearer")
            assert said.json()["code"] == "access"


def test_only_these_need_no_key() -> None:
    free = {entry.path for entry in ROUTES if not entry.key}
    health = {"/health", "/health/live", "/health/ready"}
    assert free == {*health, "/openapi.json", "/docs", "/api/hello"}


@pytest.mark.parametrize(
    "header", ["Basic {}", "Bearer", "Bearer {}x", "Bearer {} {}", "{}", "Bearer\t{}", "bearer"]
)
def test_a_key_is_taken_as_a_bearer_only(house: House, header: str) -> None:
    said = house.ask("GET", "/api/jobs", None, headers={"Authorization": header.format(ANN, ANN)})
    assert said.status_code == 401


def test_wrong_revoked_and_missing_keys_read_the_same(house: House) -> None:
    answers = [house.ask("GET", "/api/jobs", key).json() for key in (None, OLD, "weft_wrong")]
    assert len({(one["code"], one["message"], one["fix"]) for one in answers}) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:80", "[::1]:9", "LOCALHOST", "127.9.9.9"])
def test_loopback_names_are_answered(house: House, host: str) -> None:
    assert house.ask("GET", "/api/hello", headers={"Host": host}).status_code == 200


def test_more_hosts_can_be_allowed() -> None:
    house = House(Settings(bind="10.0.0.7", allowed_hosts="weft.example.org, b.example.org"))
    for host in ("10.0.0.7:8765", "weft.example.org", "b.example.org:1"):
        assert house.ask("GET", "/api/hello", headers={"Host": host}).status_code == 200
    assert house.ask("GET", "/api/hello", headers={"Host": "10.0.0.8"}).status_code == 403


def test_who_binds_all_addresses_is_reached_by_any_address_but_not_by_any_name() -> None:
    house = House(Settings(bind="0.0.0.0"))
    assert house.ask("GET", "/api/hello", headers={"Host": "192.0.2.7"}).status_code == 200
    assert house.ask("GET", "/api/hello", headers={"Host": "evil.example"}).status_code == 403


def test_pages_of_other_origins_are_refused_by_default(house: House) -> None:
    said = house.ask("GET", "/api/hello", headers={"Origin": "https://a.example"})
    assert said.status_code == 403
    assert "access-control-allow-origin" not in said.headers


def test_listed_origins_may_ask() -> None:
    house = House(Settings(allowed_origins="https://a.example"))
    asked = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    before = house.ask("OPTIONS", "/api/jobs", None, headers=asked)
    assert before.status_code == 204
    assert "Authorization" in before.headers["access-control-allow-headers"]
    said = house.ask("GET", "/api/jobs", headers={"Origin": "https://a.example"})
    assert said.headers["access-control-allow-origin"] == "https://a.example"
    assert house.ask("GET", "/api/jobs", headers={"Origin": "null"}).status_code == 403


def test_another_protocol_is_refused_but_may_ask_what_is_spoken(house: House) -> None:
    other = {"Weft-Protocol": "2"}
    said = house.ask("GET", "/api/jobs", headers=other)
    assert (said.status_code, said.json()["code"]) == (400, "version-mismatch")
    assert house.ask("GET", "/api/hello", headers=other).status_code == 200
    assert house.ask("GET", "/api/jobs", headers={"Weft-Protocol": "1"}).status_code == 200


def test_the_page_runs_nothing(house: House) -> None:
    page = house.ask("GET", "/docs", None)
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert page.headers["x-frame-options"] == "DENY"
    assert "<script" not in page.text
    for entry in ROUTES:
        assert entry.path in page.text


SAFE = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


@pytest.mark.parametrize("key", [ANN, None])
@pytest.mark.parametrize("entry", ROUTES, ids=named)
def test_every_answer_has_an_id_and_headers_of_safety(
    house: House, entry: Entry, key: str | None
) -> None:
    reply = house.ask(entry.method, entry.path, key)
    assert SAFE.items() <= dict(reply.headers).items()
    assert re.fullmatch("[0-9a-f]{16}", reply.headers["weft-request-id"])
    assert "no-store" in reply.headers["cache-control"]
    assert "server" not in reply.headers


@pytest.mark.parametrize("entry", ROUTES, ids=named)
def test_a_mistake_of_ours_tells_nothing_but_its_number(
    entry: Entry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object) -> Response:
        raise RuntimeError("at /home/ann/secret.py:3, for weft_bob")

    monkeypatch.setattr(app, "ROUTES", [replace(one, handler=broken) for one in ROUTES])
    query = {"model": MODEL} if "model" in entry.query.__struct_fields__ else {}
    key = ANN if entry.scope in ("run", "read") else OPS
    said = House().ask(entry.method, entry.path, key, params=query)
    report = decode(said.content, ErrorReport, "json")
    assert (said.status_code, report.code) == (500, "server")
    assert report.request_id == said.headers["weft-request-id"]
    assert SAFE.items() <= dict(said.headers).items()
    assert not re.search(r"Traceback|secret|home|\.py|weft_bob|RuntimeError", said.text)
    (logged,) = [record for record in caplog.records if record.exc_info]
    assert logged.__dict__["request"] == report.request_id


def test_a_mistake_in_the_middle_of_an_answer_breaks_it_off(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said cannot be taken back; what follows is nothing, never the exception."""
    id = house.job()
    house.do()

    def broken(*_: object) -> list[Note]:
        raise RuntimeError("at /home/ann/secret.py")

    with live(house) as url:
        monkeypatch.setattr(house.ledger, "notes", broken)
        request = httpx.stream("GET", f"{url}/api/jobs/{id}/events", headers=bearer(), timeout=60)
        with pytest.raises(httpx.RemoteProtocolError), request as reply:
            assert reply.status_code == 200
            assert b"secret" not in reply.read()


def test_two_apps_share_nothing() -> None:
    one, other = House(), House()
    one.job()
    one.app.gateway.drain()
    assert other.stored() == []
    assert other.job()
