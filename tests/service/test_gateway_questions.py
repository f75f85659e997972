"""Questions that only the checker can answer: asked through the store, waited for, given back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
from msgspec import Struct

from tests.service.gate import MODEL, MSGPACK, PRINT, House
from weft.errors import InputError
from weft.service.store.interface import Card, Question
from weft.settings import Settings
from weft.wire.messages import (
    Applied,
    ApplyQuery,
    LanguageInputs,
    SignatureQuery,
    SourceQuery,
    SourceText,
    Tables,
    Tokens,
    TokensQuery,
    decode,
    encode,
)
from weft.wire.reports import report_of

QUERIES: dict[str, Struct] = {
    "signature": SignatureQuery(
        model=MODEL, fingerprint=PRINT, inputs=LanguageInputs(given=("input_ids",))
    ),
    "apply": ApplyQuery(model=MODEL, fingerprint=PRINT, path="layer", layouts=()),
    "source": SourceQuery(model=MODEL, fingerprint=PRINT, path="layer"),
    "tokens": TokensQuery(model=MODEL, texts=("a b",)),
}
ANSWERS = {
    "signature": Tables(data=b"\x01"),
    "apply": Applied(data=b"\x02"),
    "source": SourceText(digest="0" * 64, text="def f(): a()", operations=(("a_0", 0, ""),)),
    "tokens": Tokens(rows=((1, 2),)),
}


@contextlib.contextmanager
def checker(house: House, answer: Callable[[Question], tuple[bytes, bool]]) -> Iterator[list]:
    """Answers questions on a thread, as the checker does."""
    seen: list[Question] = []
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            house.bells.checker.wait(0.02)
            while (question := house.ledger.next_question()) is not None:
                seen.append(question)
                house.ledger.answer(question.id, *answer(question))
                house.bells.gateway.ring()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def test_nobody_waits_for_a_checker_that_has_been_told_to_stop() -> None:
    """One that asks later is told at once, one that waits a moment after: not for price_seconds."""
    house = House(Settings(price_seconds=20.0))
    drain = threading.Timer(0.3, house.app.gateway.drain)
    drain.start()
    for _ in range(2):
        reply = ask(house, "tokens", QUERIES["tokens"])
        assert reply.status_code == 503 and reply.headers["retry-after"]
        assert "about to stop" in reply.json()["message"]
    drain.join()


def test_a_question_in_hand_is_answered_also_by_a_server_that_stops() -> None:
    house, expected = House(Settings(price_seconds=100.0)), ANSWERS["tokens"]

    def last(question: Question) -> tuple[bytes, bool]:
        house.app.gateway.drain()
        return encode(expected), True

    with checker(house, last):
        assert ask(house, "tokens", QUERIES["tokens"]).status_code == 200


def ask(house: House, what: str, query: Struct):
    return house.ask("POST", f"/api/{what}", content=encode(query), headers=MSGPACK)


@pytest.mark.parametrize("what", QUERIES)
def test_the_checkers_answer_is_given(what: str) -> None:
    house, query, expected = House(), QUERIES[what], ANSWERS[what]
    with checker(house, lambda question: (encode(expected), True)) as seen:
        reply = ask(house, what, query)
    assert decode(reply.content, type(expected), "json") == expected
    assert [(one.kind, one.owner, one.body) for one in seen] == [
        (type(query).__name__, "ann", encode(query))
    ]
    assert house.app.gateway.watch.waiting == 0


@pytest.mark.parametrize("what", QUERIES)
def test_the_checkers_refusal_is_given(what: str) -> None:
    house = House()
    report = encode(report_of(InputError("no such token", fix="use another")))
    with checker(house, lambda question: (report, False)):
        reply = ask(house, what, QUERIES[what])
    assert reply.status_code == 422
    assert reply.json()["code"] == "input"
    assert reply.json()["fix"] == "use another"
    assert reply.json()["request_id"] == reply.headers["weft-request-id"]


@pytest.mark.parametrize("what", QUERIES)
def test_waiting_for_an_answer_has_a_limit(what: str) -> None:
    house = House(Settings(price_seconds=0.01))
    reply = ask(house, what, QUERIES[what])
    assert (reply.status_code, reply.json()["code"]) == (503, "time-limit")
    assert "price_seconds" in reply.json()["message"]
    assert reply.headers["retry-after"]


@pytest.mark.parametrize("what", QUERIES)
def test_nothing_is_asked_of_a_model_that_is_not_there(what: str) -> None:
    house = House()
    house.ledger.put_card(Card(MODEL, "failed", reason="gone"))
    assert ask(house, what, QUERIES[what]).json()["code"] == "model-not-ready"
    house.ledger.drop_cards()
    assert ask(house, what, QUERIES[what]).status_code == 503
    assert house.ledger.next_question() is None


def test_the_fingerprint_is_compared() -> None:
    house = House()
    query = ApplyQuery(model=MODEL, fingerprint="0" * 64, path="layer", layouts=())
    assert ask(house, "apply", query).json()["code"] == "other-model"
    assert house.ledger.next_question() is None


def test_a_broken_answer_is_a_mistake_of_the_servers() -> None:
    house = House()
    with checker(house, lambda question: (b"\xc1", True)):
        reply = ask(house, "tokens", QUERIES["tokens"])
    assert (reply.status_code, reply.json()["code"]) == (500, "server")
