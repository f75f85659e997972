"""Sessions at the gateway: whose they are, the order of their requests, and when they are over."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from msgspec import msgpack

from tests.service.gate import BOB, MSGPACK, PRINT, House, submit_of
from weft.graph.node import Const, Graph, Ref, Save
from weft.settings import Settings
from weft.wire.messages import Kept, OpenSession, Seat, Submit, encode


@pytest.fixture
def house() -> House:
    return House(Settings(sessions=2, session_seconds=50.0))


def seated(house: House, session: str, number: int, **changes: Any) -> Submit:
    seat = {name: changes.pop(name) for name in list(changes) if name in Seat.__struct_fields__}
    seat = Seat(**{"id": session, "number": number, **seat})
    return submit_of(request_id=f"{session}-{number}", seat=seat, **changes)


def test_a_session_from_beginning_to_end(house: House) -> None:
    id = house.session()
    assert house.session() == id  # the same request
    info = house.ask("GET", f"/api/sessions/{id}").json()
    assert (info["state"], info["model"], info["seconds"]) == ("open", "tiny", 50.0)
    for number in (1, 2):
        reply = house.submit(seated(house, id, number))
        assert reply.status_code == 201, reply.text
        assert house.submit(seated(house, id, number)).status_code == 200  # said again
    jobs = [house.ledger.find("ann", f"{id}-{number}") for number in (1, 2)]
    assert [(job.session, job.after) for job in jobs] == [(id, None), (id, jobs[0].id)]
    before = house.ask("GET", f"/api/sessions/{id}").json()["until"]
    assert house.ask("POST", f"/api/sessions/{id}/renew").json()["until"] >= before
    ended = house.ask("DELETE", f"/api/sessions/{id}").json()
    assert (ended["state"], ended["last"], ended.get("failed", [])) == ("closed", 2, [])
    for reply in (
        house.ask("POST", f"/api/sessions/{id}/renew"),
        house.submit(seated(house, id, 3)),
    ):
        assert (reply.status_code, reply.json()["code"]) == (410, "session-lost")
        assert "it was closed" in reply.json()["message"]
    assert house.submit(seated(house, id, 2)).status_code == 200  # what was acknowledged stays so
    assert house.ask("DELETE", f"/api/sessions/{id}").json()["state"] == "closed"


def test_to_anybody_else_it_is_not_there(house: House) -> None:
    id = house.session()
    house.submit(seated(house, id, 1, keeps=()))
    theirs = [
        house.ask("GET", f"/api/sessions/{id}", BOB),
        house.ask("POST", f"/api/sessions/{id}/renew", BOB),
        house.ask("DELETE", f"/api/sessions/{id}", BOB),
        house.submit(seated(house, id, 2), BOB),
        house.submit(seated(house, id, 2, same="0" * 64, graph=Graph(())), BOB),
    ]
    never = house.ask("GET", "/api/sessions/0h0000000000000000000000", BOB)
    for reply in (*theirs, never):
        assert (reply.status_code, reply.json()["code"]) == (404, "no-such")
        assert reply.json()["message"] == never.json()["message"]
    assert house.ask("GET", f"/api/sessions/{id}").json()["state"] == "open"


def test_it_expires_when_nobody_is_heard_of(house: House) -> None:
    id = house.session()
    house.app.gateway.clock = lambda: 1e12
    assert house.ask("GET", f"/api/sessions/{id}").json()["state"] == "expired"
    reply = house.submit(seated(house, id, 1))
    assert reply.status_code == 410 and "session_seconds" in reply.json()["message"]


def test_how_many_a_key_may_have(house: House) -> None:
    for name in ("a", "b"):
        house.session(request_id=name)
    house.session(BOB, request_id="c")
    content = encode(OpenSession(request_id="d", model="tiny", fingerprint=PRINT))
    reply = house.ask("POST", "/api/sessions", content=content, headers=MSGPACK)
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "5")
    assert "sessions" in reply.json()["message"]


USES = {"c0": Kept(number=1, name="h")}
GRAPH = Graph((Const(key="c0", shape=(2,), dtype="float32"), Save(name="x", value=Ref(0))))


@pytest.mark.parametrize(
    ("number", "changes", "says"),
    [
        (3, {}, "came after request 1"),
        (2, {"request_id": "mine"}, "called after its number"),
        (2, {"model": "other"}, "another model"),
        (2, {"graph": GRAPH}, "not both in the graph"),
        (2, {"uses": USES}, "not both in the graph"),
        (2, {"graph": GRAPH, "uses": {"c0": Kept(number=2, name="h")}}, "of a later one"),
        (2, {"drops": (Kept(number=9, name="h"),)}, "of a later one"),
        (2, {"same": "0" * 64}, "and has one itself"),
    ],
)
def test_what_is_no_next_request(house: House, number: int, changes: Any, says: str) -> None:
    id = house.session()
    assert house.submit(seated(house, id, 1)).status_code == 201
    message = seated(house, id, number, **{k: v for k, v in changes.items() if k != "request_id"})
    if "request_id" in changes:
        message = submit_of(request_id="mine", seat=message.seat)
    reply = house.submit(message)
    assert 400 <= reply.status_code < 500
    assert says in reply.json()["message"]
    assert house.submit(seated(house, id, 2, graph=GRAPH, uses=USES)).status_code == 201


def test_a_graph_is_named_by_its_hash(house: House) -> None:
    id, other = house.session(), house.session(request_id="other")
    whole = seated(house, id, 1)
    digest = hashlib.sha256(msgpack.encode(whole.graph)).hexdigest()
    house.submit(whole)
    assert house.submit(seated(house, id, 2, same=digest, graph=Graph(()))).status_code == 201
    stored = [house.ledger.find("ann", f"{id}-{number}") for number in (1, 2)]
    graphs = [
        msgpack.decode(house.objects.get(f"submits/{job.id}"), type=Submit).graph for job in stored
    ]
    assert graphs == [whole.graph, whole.graph]
    reply = house.submit(seated(house, other, 1, same=digest, graph=Graph(())))
    assert reply.status_code == 409 and reply.json()["missing"] == [digest]


def test_what_has_not_run_when_it_ends_is_cancelled(house: House) -> None:
    id, other = house.session(), house.session(request_id="other")
    for session in (id, other):
        house.submit(seated(house, session, 1))
        house.submit(seated(house, session, 2))
    house.price()
    house.begin()  # the first one runs
    house.ask("DELETE", f"/api/sessions/{id}")
    found = [house.ledger.find("ann", f"{s}-{n}") for s in (id, other) for n in (1, 2)]
    assert [job.state for job in found] == ["running", "cancelled", "received", "received"]
    assert [job.cancelling for job in found] == [True, False, False, False]


def test_what_failed_is_told_when_it_is_closed(house: House) -> None:
    id = house.session()
    house.submit(seated(house, id, 1))
    house.submit(seated(house, id, 2))
    house.ask("POST", f"/api/jobs/{house.ledger.find('ann', f'{id}-1').id}/cancel")
    ((number, job),) = house.ask("DELETE", f"/api/sessions/{id}").json()["failed"]
    assert (number, job["state"]) == (1, "cancelled")
