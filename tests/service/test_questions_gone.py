"""Questions whose clients have gone: those that are not begun are not begun any more."""

from __future__ import annotations

import http.client
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.gate import BOB, MODEL, MSGPACK, House, bearer, card_of, live
from tests.service.processes import until
from tests.service.test_gateway_questions import ANSWERS, QUERIES
from weft.service.store.interface import Ledger, Question
from weft.service.store.memory import MemoryLedger
from weft.service.store.sqlite import open_ledger
from weft.settings import Settings
from weft.wire.messages import (
    ModelCard,
    TokenizerCard,
    TokensQuery,
    decode,
    encode,
)


@pytest.fixture(params=["memory", "sqlite"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    found: Any = MemoryLedger() if request.param == "memory" else open_ledger(tmp_path / "l.sqlite")
    yield found
    found.close()


def question(id: str, owner: str = "ann", created: float = 1.0) -> Question:
    return Question(id, "TokensQuery", owner, b"what", created=created)


# -- the store -------------------------------------------------------------------------------------


def test_one_that_is_withdrawn_is_taken_by_nobody(ledger: Ledger) -> None:
    for id in ("a", "b"):
        ledger.ask(question(id))
    ledger.withdraw("a")
    ledger.withdraw("a")
    taken = ledger.next_question()
    assert taken is not None and taken.id == "b"
    assert ledger.next_question() is None


def test_what_is_in_hand_is_for_nobody(ledger: Ledger) -> None:
    ledger.ask(question("a"))
    assert ledger.next_question() is not None
    ledger.withdraw("a")
    ledger.answer("a", b"told", True)
    assert ledger.take_answer("a") is None
    ledger.reopen_questions()
    assert ledger.next_question() is None


# -- the gateway -----------------------------------------------------------------------------------

HEADERS = {"Authorization": "Bearer weft_ann"}


@pytest.fixture
def house() -> House:
    return House(Settings(price_seconds=1e6))


def waiting(house: House) -> list[str]:
    return list(house.ledger._questions)


def begun(url: str, path: str, body: bytes, **headers: str) -> http.client.HTTPConnection:
    """A request whose answer nobody has read yet."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request("POST", path, body, {**HEADERS, **headers})
    return connection


@pytest.mark.parametrize("kind", QUERIES)
def test_a_question_whose_client_goes_is_not_begun(house: House, kind: str) -> None:
    with live(house) as url:
        connection = begun(url, f"/api/{kind}", encode(QUERIES[kind]), **MSGPACK)
        until(lambda: waiting(house), "the question")
        connection.close()
        until(lambda: not waiting(house), "that it is withdrawn")
        assert house.ledger.next_question() is None


def test_what_others_ask_is_answered(house: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    body = encode(QUERIES["tokens"])
    with live(house) as url:
        mine = begun(url, "/api/tokens", body, **MSGPACK)
        (first,) = until(lambda: waiting(house), "mine")
        other = begun(url, "/api/tokens", body, **MSGPACK, **bearer(BOB))
        until(lambda: len(waiting(house)) == 2, "the other")
        mine.close()
        until(lambda: first not in waiting(house), "that mine is withdrawn")
        taken = house.ledger.next_question()
        assert taken is not None and taken.owner == "bob"
        house.ledger.answer(taken.id, encode(ANSWERS["tokens"]), True)
        house.bells.gateway.ring()
        said = other.getresponse()
        assert said.status == 200 and said.read()
        other.close()
    statuses = [one.status for one in caplog.records if one.message == "request"]
    assert sorted(statuses) == [200, 499]


def test_a_completion_whose_client_goes_asks_no_more_and_is_no_job(house: House) -> None:
    card = card_of()
    known = decode(card.card, ModelCard)
    told = ModelCard(info=known.info, modules=(), tokenizer=TokenizerCard(chat=True))
    house.ledger.put_card(type(card)(MODEL, "ready", card.fingerprint, encode(told), b""))
    body = httpx.Request("POST", "http://x", json={"model": MODEL, "prompt": "a"}).content
    with live(house) as url:
        connection = begun(url, "/v1/completions", body, **{"Content-Type": "application/json"})
        (id,) = until(lambda: waiting(house), "the question")
        assert house.ledger._questions[id].kind == TokensQuery.__name__
        connection.close()
        until(lambda: not waiting(house), "that it is withdrawn")
    assert house.ledger.jobs("ann") == []


def test_one_whose_time_is_over_is_withdrawn() -> None:
    house = House(Settings(price_seconds=0.01))
    body = encode(QUERIES["tokens"])
    said = house.ask("POST", "/api/tokens", content=body, headers=MSGPACK)
    assert said.status_code == 503
    assert waiting(house) == []
