"""Schemathesis drives every route from the app's own OpenAPI document, over real HTTP.

Its checks: no 5xx, only documented statuses, content types, headers and bodies, what does not fit
the document is refused, what fits is not, no route with a key answers without one. Bounded, and the
same requests each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec import Struct
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from tests.service.gate import (
    BOB,
    MODEL,
    PRINT,
    House,
    bearer,
    card_of,
    frame,
    live,
    submit_of,
)
from tests.service.test_gateway_questions import ANSWERS, QUERIES, checker
from weft.service.gateway.app import ROUTES
from weft.service.gateway.entry import Entry
from weft.settings import Settings
from weft.wire import frames
from weft.wire.messages import ErrorReport, MissingQuery, decode, encode

EXAMPLES = 25
SAID_BY_A_SCHEMA = "positive_data_acceptance"
"""Not for bodies: a schema does not know of digests, base64, the grammar, or that 1.0 is no int."""

bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@dataclass
class Town:
    """A live house with jobs in every state, and its document."""

    house: House
    url: str
    schema: Any
    session: requests.Session
    jobs: dict[str, str]

    def operation(self, entry: Entry) -> Any:
        return self.schema[entry.path][entry.method]

    def case(self, label: str, **parts: Any) -> Any:
        """A request of our own."""
        method, path = label.split()
        if "body" in parts:
            raw = isinstance(parts["body"], bytes)
            parts["media_type"] = "application/octet-stream" if raw else "application/json"
        return self.schema[path][method].Case(**parts)

    def call(self, case: Any, without: Sequence[str] = (), accept: str = "*/*") -> Any:
        """The reply to a case, after every check."""
        headers = bearer() | {"Accept": accept}
        by: dict[str, Any] = {"base_url": self.url, "session": self.session, "headers": headers}
        reply = case.call(**by, timeout=60)
        checks = [CHECKS.get_one(name) for name in CHECKS.get_all_names() if name not in without]
        case.validate_response(reply, checks, headers=headers, transport_kwargs=by)
        return reply


@pytest.fixture(scope="module")
def town() -> Iterator[Town]:
    load_all_checks()
    house = House(Settings(price_seconds=60.0))
    house.ledger.put_card(card_of("other"))
    jobs = {"done": house.job(request_id="done")}
    house.do()
    jobs["running"] = house.job(request_id="running")
    house.price()
    house.begin()
    jobs["cancelled"] = house.job(request_id="cancelled")
    house.ask("POST", f"/api/jobs/{jobs['cancelled']}/cancel")
    jobs["bob's"] = house.job(BOB)
    answers = {type(QUERIES[what]).__name__: encode(answer) for what, answer in ANSWERS.items()}
    answering = checker(house, lambda question: (answers[question.kind], True))
    with answering, live(house) as url, requests.Session() as session:
        document = session.get(f"{url}/openapi.json").json()
        yield Town(house, url, schemathesis.openapi.from_dict(document), session, jobs)


def named(entry: Entry) -> str:
    return f"{entry.method} {entry.path}"


def test_the_document_has_every_route(town: Town) -> None:
    labels = {found.ok().label for found in town.schema.get_all_operations()}
    assert labels == {named(entry) for entry in ROUTES}


# -- what it makes up ------------------------------------------------------------------------------

KEYED = [entry for entry in ROUTES if entry.key]


@pytest.mark.parametrize("entry", ROUTES, ids=named)
def test_what_fits_the_document(town: Town, entry: Entry) -> None:
    operation = town.operation(entry)
    without = [SAID_BY_A_SCHEMA] if entry.takes is not None else []
    known = st.sampled_from(known_ids(town, entry))

    @bounded
    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE), id=known)
    def run(case: Any, id: str | None) -> None:
        if id is not None and "id" in case.path_parameters:
            case.path_parameters["id"] = id
        town.call(case, without=without)

    run()


def known_ids(town: Town, entry: Entry) -> list[str | None]:
    """Ids of jobs that are there, where the route gives an answer at once."""
    waits = entry.path in ("/api/jobs/{id}", "/api/jobs/{id}/events") and entry.method == "GET"
    if "sessions" in entry.path:
        own = town.house.session(request_id=f"r{ROUTES.index(entry)}")  # another route closes its
        return [None, own, "0" * 26]
    if "{id}" not in entry.path:
        return [None]
    if entry.method == "DELETE":
        return [None, town.house.job(request_id="to-be-deleted"), town.jobs["running"]]
    states = ("done", "cancelled", "bob's") if waits else tuple(town.jobs)
    return [None, *(town.jobs[state] for state in states)]


@pytest.mark.parametrize("entry", KEYED, ids=named)
def test_what_does_not_fit_the_document(town: Town, entry: Entry) -> None:
    operation = town.operation(entry)

    @bounded
    @given(case=operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def run(case: Any) -> None:
        town.call(case)

    run()


@pytest.mark.parametrize("entry", KEYED, ids=named)
def test_nothing_is_said_without_a_key(town: Town, entry: Entry) -> None:
    operation = town.operation(entry)
    before = town.house.stored()

    @settings(bounded, max_examples=5)
    @given(case=operation.as_strategy(), key=st.sampled_from((None, "weft_old", "weft_other")))
    def run(case: Any, key: str | None) -> None:
        case.headers = {}
        if "id" in case.path_parameters:
            case.path_parameters["id"] = town.jobs["done"]
        headers = {} if key is None else bearer(key)
        reply = case.call(base_url=town.url, session=town.session, headers=headers)
        assert reply.status_code == 401
        assert decode(reply.content, ErrorReport, "json").code == "access"

    run()
    assert town.house.stored() == before


# -- what people ask -------------------------------------------------------------------------------

CONSTANT = frame(1, 2, 3)
DIGEST = frames.digest(CONSTANT)
RESULT = "GET /api/jobs/{id}/result"


def plain(message: Struct) -> Any:
    """As JSON has it."""
    return msgspec.to_builtins(message)


def job(**changes: Any) -> dict[str, Any]:
    return {"body": plain(submit_of(**changes))}


_ASKED: dict[str, tuple[str, dict[str, Any], int]] = {
    "a card": ("GET /api/card", {"query": {"model": MODEL}}, 200),
    "a card that is there": (
        "GET /api/card",
        {"query": {"model": MODEL}, "headers": {"If-None-Match": f'"{PRINT}-json"'}},
        304,
    ),
    "tables": ("GET /api/tables", {"query": {"model": MODEL}}, 200),
    "no such model": ("GET /api/card", {"query": {"model": "x"}}, 404),
    "a signature": ("POST /api/signature", {"body": plain(QUERIES["signature"])}, 200),
    "a module": ("POST /api/apply", {"body": plain(QUERIES["apply"])}, 200),
    "tokens": ("POST /api/tokens", {"body": plain(QUERIES["tokens"])}, 200),
    "a job": ("POST /api/jobs", job(request_id="new"), 201),
    "a job that was there": ("POST /api/jobs", job(request_id="done"), 200),
    "another job of the same id": ("POST /api/jobs", job(request_id="done", strict=False), 409),
    "a job for another model": ("POST /api/jobs", job(fingerprint="0" * 64), 409),
    "a job without its constant": ("POST /api/jobs", job(constants={"c0": "0" * 64}), 422),
    "missing": (
        "POST /api/constants/missing",
        {"body": plain(MissingQuery(digests=("0" * 64,)))},
        200,
    ),
    "two jobs": ("GET /api/jobs", {"query": {"limit": 2}}, 200),
    "a job's state": ("GET /api/jobs/{id}", {"id": "done", "query": {"wait": 1.5}}, 200),
    "events": ("GET /api/jobs/{id}/events", {"id": "done"}, 200),
    "later events": (
        "GET /api/jobs/{id}/events",
        {"id": "done", "headers": {"Last-Event-ID": "2"}},
        200,
    ),
    "a result": (RESULT, {"id": "done"}, 200),
    "a part of a result": (RESULT, {"id": "done", "query": {"name": ["h"]}}, 200),
    "a range of a result": (RESULT, {"id": "done", "headers": {"Range": "bytes=5-9"}}, 206),
    "nothing of a result": (RESULT, {"id": "done", "headers": {"Range": "bytes=99999-"}}, 416),
    "no save of a result": (RESULT, {"id": "done", "query": {"name": ["x"]}}, 404),
    "no result yet": (RESULT, {"id": "running"}, 409),
    "no result ever": (RESULT, {"id": "cancelled"}, 409),
    "somebody else's result": (RESULT, {"id": "bob's"}, 404),
    "cancelled again": ("POST /api/jobs/{id}/cancel", {"id": "cancelled"}, 200),
    "deleted too early": ("DELETE /api/jobs/{id}", {"id": "running"}, 409),
}


@pytest.mark.parametrize(("label", "parts", "status"), _ASKED.values(), ids=_ASKED.keys())
def test_what_people_ask(town: Town, label: str, parts: dict[str, Any], status: int) -> None:
    parts = dict(parts)
    if "id" in parts:
        parts["path_parameters"] = {"id": town.jobs[parts.pop("id")]}
    case = town.case(label, **parts)
    assert town.call(case).status_code == status


def test_an_upload_is_taken_once(town: Town) -> None:
    body = frames.write({"x": CONSTANT})
    path = {"digest": DIGEST}
    for status in (201, 200):
        case = town.case("PUT /api/constants/{digest}", path_parameters=path, body=body)
        assert town.call(case).status_code == status


def test_a_job_is_deleted_once(town: Town) -> None:
    path = {"id": town.house.job(request_id="short-lived")}
    for label, status in (
        ("POST /api/jobs/{id}/cancel", 200),
        ("DELETE /api/jobs/{id}", 204),
        ("DELETE /api/jobs/{id}", 404),
    ):
        assert town.call(town.case(label, path_parameters=path)).status_code == status


def test_events_follow_at_once(town: Town) -> None:
    case = town.case("POST /api/jobs", **job(request_id="done"))
    reply = town.call(case, accept="text/event-stream")
    assert reply.status_code == 200
    assert reply.content.startswith(b"event: accepted\n")
