"""Two people with keys at one gateway: what is one's is, for the other, not there.

Every route that names something by an id or a digest is tried, also those that are added later:
the answer about somebody else's must be the answer about nothing, and leave it as it is. What has
no name in its path is tried by hand below. A question's answer, a merged forward and a decode loop
have no id that could be asked for; their neighbours are in `tests/run` and `tests/engine`.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from typing import Any

import httpx
import pytest

from tests.service.gate import ANN, BOB, MODEL, MSGPACK, House, frame, submit_of
from weft.service.gateway.app import ROUTES
from weft.service.gateway.entry import Entry
from weft.service.jobs.life import Failed
from weft.settings import Settings
from weft.wire import frames
from weft.wire.messages import MissingQuery, Seat, Tokens, TokensQuery, decode, encode
from weft.wire.reports import report_of

SECRET = "anns-secret"
DOORS = [entry for entry in ROUTES if entry.key and "{" in entry.path]
QUERIES = {"/api/jobs/{id}": "?wait=0"}


@pytest.fixture
def house() -> House:
    return House(Settings(sessions=2, session_seconds=50.0))


def owned(house: House, entry: Entry) -> str:
    """Something of Ann's that a path of this route could name."""
    if entry.path.startswith("/api/sessions"):
        return house.session()
    if "{digest}" in entry.path:
        mine = frames.write({"x": frame(1, 2, 3)})
        house.objects.put(f"constants/ann/{frames.digest(frame(1, 2, 3))}", mine)
        return frames.digest(frame(1, 2, 3))
    id = house.job()
    house.price()
    job = house.begin()
    house.log(job, SECRET)
    house.finish(job)
    return id


def absent(name: str) -> str:
    """A name of the same form that nobody has."""
    return "".join("1" if letter != "1" else "2" for letter in name)


IDS = ("weft-request-id", "x-request-id")


def told(reply: httpx.Response, name: str) -> tuple[Any, ...]:
    """All that an answer says, without the name that was asked for and the answer's own id."""
    text = reply.text.replace(name, "NAME")
    for id in [reply.headers[one] for one in IDS if one in reply.headers]:
        text = text.replace(id, "ID")
    heads = {k: v for k, v in reply.headers.items() if k not in (*IDS, "date")}
    return reply.status_code, text, heads


def as_bob(house: House, entry: Entry, name: str) -> httpx.Response:
    path = re.sub(r"\{\w+\}", name, entry.path) + QUERIES.get(entry.path, "")
    request: dict[str, Any] = {}
    if entry.method in ("POST", "PUT") and entry.takes is not None:
        bytes_ = isinstance(entry.takes, str)
        request["content"] = frames.write({"x": frame(1, 2, 3)}) if bytes_ else b"\x80"
        request["headers"] = {"Content-Type": entry.takes} if bytes_ else MSGPACK
    return house.ask(entry.method, path, BOB, **request)


@pytest.mark.parametrize("entry", DOORS, ids=lambda entry: f"{entry.method} {entry.path}")
def test_what_is_somebody_elses_is_not_there(house: House, entry: Entry) -> None:
    name = owned(house, entry)
    before = house.stored()
    theirs, nothing = (as_bob(house, entry, one) for one in (name, absent(name)))
    assert SECRET not in theirs.text
    if "{digest}" in entry.path:  # whoever has the bytes may send them; they are his own then
        assert theirs.status_code == 201
        assert nothing.status_code == 400
        assert f"constants/bob/{name}" in house.stored()
        assert set(before) <= set(house.stored())
        return
    assert theirs.status_code in (400, 404, 422), theirs.text
    assert told(theirs, name) == told(nothing, absent(name))
    assert house.stored() == before
    if "session" in entry.path:
        assert house.ask("GET", f"/api/sessions/{name}").json()["state"] == "open"
    else:
        assert house.ask("GET", f"/api/jobs/{name}").json()["state"] == "done"


def test_the_doors_are_many() -> None:
    assert len(DOORS) >= 9


# -- jobs ------------------------------------------------------------------------------------------


def test_a_job_that_waits_or_runs_is_not_there_either(house: House) -> None:
    id = house.job()
    for act in (lambda: None, house.price, house.begin):
        act()
        for method, path in (
            ("GET", ""),
            ("GET", "/result"),
            ("GET", "/events"),
            ("POST", "/cancel"),
            ("DELETE", ""),
        ):
            theirs = house.ask(method, f"/api/jobs/{id}{path}", BOB)
            nothing = house.ask(method, f"/api/jobs/{absent(id)}{path}", BOB)
            assert told(theirs, id) == told(nothing, absent(id))
        job = house.ledger.job(id)
        assert job is not None and not job.cancelling


def test_headers_that_ask_for_more_change_nothing(house: House) -> None:
    id = owned(house, next(e for e in DOORS if e.path == "/api/jobs/{id}/result"))
    info = house.ask("GET", f"/api/jobs/{id}/result")
    tag = info.headers["etag"]
    for path, headers in (
        ("result", {"Range": "bytes=0-"}),
        ("result", {"If-None-Match": tag}),
        ("result", {"If-Range": tag, "Range": "bytes=1-"}),
        ("events", {"Last-Event-ID": "0", "Weft-Inline": "1000"}),
    ):
        for query in ("", "?name=h" if path == "result" else "?after=0"):
            theirs = house.ask("GET", f"/api/jobs/{id}/{path}{query}", BOB, headers=headers)
            other = f"/api/jobs/{absent(id)}/{path}{query}"
            nothing = house.ask("GET", other, BOB, headers=headers)
            assert theirs.status_code == 404
            assert told(theirs, id) == told(nothing, absent(id))


def test_a_list_has_ones_own_only(house: House) -> None:
    mine = [house.job(request_id=f"a{n}") for n in range(3)]
    his = house.job(BOB, request_id="b")
    for query in ("", "?limit=1000", f"?before={mine[-1]}", f"?before={absent(his)}&limit=5"):
        listed = house.ask("GET", f"/api/jobs{query}", BOB).json()["jobs"]
        assert {job["id"] for job in listed} <= {his}
        assert not any(id in json.dumps(listed) for id in mine)


def test_a_request_id_is_ones_own(house: House) -> None:
    """It neither brings the other's job, nor tells that there is one."""
    mine = house.job(request_id="the-same")
    reply = house.submit(submit_of(request_id="the-same"), BOB)
    assert reply.status_code == 201
    assert reply.json()["id"] != mine
    other = house.submit(submit_of(frame(9), request_id="the-same"), BOB)
    assert other.status_code == 409  # of his own, which was another request


def test_a_failure_tells_its_owner_only(house: House) -> None:
    id = house.job()
    house.price()
    job = house.begin()
    report = report_of(RuntimeError(SECRET), id)
    house.ledger.step(id, Failed(encode(report, "json")), 4.0, job.token)
    assert SECRET in house.ask("GET", f"/api/jobs/{id}").text
    for path in (f"/api/jobs/{id}", f"/api/jobs/{id}/result", "/api/jobs", "/api/status"):
        assert SECRET not in house.ask("GET", path, BOB).text


def test_a_full_queue_is_ones_own() -> None:
    house = House(Settings(queued_jobs=2))
    for number in range(2):
        house.job(request_id=f"a{number}")
    assert house.submit(submit_of(request_id="a2")).status_code == 429
    assert house.submit(submit_of(request_id="b0"), BOB).status_code == 201


# -- constants -------------------------------------------------------------------------------------


def test_a_digest_tells_nothing_and_brings_nothing(house: House) -> None:
    secret = frame(4, 2)
    digest = frames.digest(secret)
    data = frames.write({"x": secret})
    octets = {"Content-Type": "application/octet-stream"}
    assert house.ask("PUT", f"/api/constants/{digest}", content=data, headers=octets).is_success
    query = encode(MissingQuery(digests=(digest, "0" * 64)))
    reply = house.ask("POST", "/api/constants/missing", BOB, content=query, headers=MSGPACK)
    assert digest in reply.text and "0" * 64 in reply.text
    refused = house.submit(submit_of(secret, send=False), BOB)
    assert (refused.status_code, refused.json()["missing"]) == (409, [digest])
    assert house.submit(submit_of(secret, send=False)).status_code == 201


def test_what_one_uploads_again_is_his_own(house: House) -> None:
    """Not the other's, which may be dropped at any time."""
    name = owned(house, next(e for e in DOORS if "{digest}" in e.path))
    theirs = as_bob(house, next(e for e in DOORS if "{digest}" in e.path), name)
    assert theirs.status_code == 201
    house.objects.delete(f"constants/bob/{name}")
    assert house.objects.size(f"constants/ann/{name}")


# -- sessions --------------------------------------------------------------------------------------


def test_a_seat_in_somebody_elses_session_is_none(house: House) -> None:
    mine = house.session()
    replies = []
    for name in (mine, absent(mine)):
        seat = Seat(id=name, number=1)
        replies.append(house.submit(submit_of(request_id=f"{name}-1", seat=seat), BOB))
    assert replies[0].status_code == 404
    assert told(replies[0], mine) == told(replies[1], absent(mine))
    assert house.ask("GET", f"/api/sessions/{mine}").json().get("last", 0) == 0


def test_sessions_are_counted_for_each(house: House) -> None:
    for number in range(2):
        house.session(request_id=f"s{number}")
    assert house.session(BOB, request_id="s0")


# -- what has no owner -----------------------------------------------------------------------------


def test_questions_at_once_get_their_own_answers(house: House) -> None:
    """Whoever asks meanwhile: each is told what he asked for."""
    ended = threading.Event()

    def checker() -> None:
        while not ended.wait(0.002):
            question = house.ledger.next_question()
            if question is not None:
                query = decode(question.body, TokensQuery)
                ids = tuple([tuple(map(ord, text)) for text in query.texts])
                house.ledger.answer(question.id, encode(Tokens(rows=ids)), True)
                house.bells.gateway.ring()

    async def ask(key: str, text: str) -> tuple[str, Any]:
        content = encode(TokensQuery(model=MODEL, texts=(text,)))
        headers = MSGPACK | {"Accept": "application/json"}
        reply = await house._ask("POST", "/api/tokens", key, content=content, headers=headers)
        assert reply.status_code == 200, reply.text
        return text, reply.json()["rows"]

    async def both() -> list[tuple[str, Any]]:
        asks = [ask(key, f"{key} {n}") for n in range(12) for key in (ANN, BOB)]
        return await asyncio.gather(*asks)

    hands = threading.Thread(target=checker)
    hands.start()
    try:
        for text, rows in asyncio.run(both()):
            assert rows == [list(map(ord, text))]
    finally:
        ended.set()
        hands.join()
    assert house.ledger.next_question() is None


def test_usage_of_others_is_refused_whoever_they_are(house: House) -> None:
    house.do() if house.job() else None
    replies = [house.ask("GET", f"/api/usage?owner={who}", BOB) for who in ("ann", "nobody", "*")]
    assert {reply.status_code for reply in replies} == {403}
    assert len({told(reply, "-")[1] for reply in replies}) == 1
    assert "ann" not in house.ask("GET", "/api/usage", BOB).text


@pytest.mark.parametrize("path", ["/api/status", "/api/hello", "/health", "/api/models"])
def test_what_all_may_see_names_nobody(house: House, path: str) -> None:
    id = house.job(request_id=SECRET)
    text = house.ask("GET", path, BOB).text
    assert id not in text and SECRET not in text and '"ann"' not in text


def test_a_price_and_a_state_say_nothing_of_neighbours(house: House) -> None:
    """Not even which jobs of whom come before one's own: only how many."""
    other = house.job(request_id="first")
    mine = house.job(BOB, request_id="second")
    text = house.ask("GET", f"/api/jobs/{mine}", BOB).text
    assert other not in text and "ann" not in text
