"""Hostile requests of further kinds: numbers, names, replays, and what is sent for the tokenizer.

The table in docs/security.md lists all kinds, and `test_the_table` holds it against the tests.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.service.gate import MSGPACK, House, frame, submit_of
from tests.service.hostile import attacked, packed, post, refused
from weft.graph.node import Const, Graph, Log, Ref, Save
from weft.service.gateway.app import ROUTES
from weft.wire.messages import encode
from weft.wire.reports import escaped

ROOT = Path(__file__).parent.parent.parent
house = pytest.fixture(attacked)

CONST = Const(key="c0", shape=(1,), dtype="uint8")
DIGITS = "9" * 5_000


# -- numbers that no number holds ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Content-Length", "Last-Event-ID", "Weft-Inline"])
def test_a_number_of_five_thousand_digits_in_a_header(house: House, name: str) -> None:
    """Python itself refuses to read it, with an error that nobody here would explain."""
    id = "0" * 26
    if name == "Content-Length":
        reply = post(house, packed(), **{name: DIGITS})
    else:
        reply = house.ask("GET", f"/api/jobs/{id}/events", headers={name: DIGITS})
    refused(house, reply, 400, 404)


@pytest.mark.parametrize(
    "query", [f"limit={DIGITS}", f"before={DIGITS}", f"limit=-{DIGITS}", f"limit={DIGITS}e1"]
)
def test_a_number_of_five_thousand_digits_in_a_query(house: House, query: str) -> None:
    refused(house, house.ask("GET", f"/api/jobs?{query}"), 400)


@pytest.mark.parametrize("given", [DIGITS, f"-{DIGITS}", f"{DIGITS}.0", f"1e{DIGITS}"])
@pytest.mark.parametrize("where", ["protocol", "seed", "size"])
def test_a_number_of_five_thousand_digits_in_a_message(
    house: House, where: str, given: str
) -> None:
    text = encode(submit_of(frame(1)), "json").decode()
    if where == "seed":
        text = text.replace('"nodes":', f'"seed":{given},"nodes":', 1)
    elif where == "size":
        text = text.replace('"shape":[1]', f'"shape":[{given}]', 1)
    else:
        text = text.replace('"protocol":1', f'"protocol":{given}', 1)
    assert given in text
    headers = {"Content-Type": "application/json"}
    refused(house, house.ask("POST", "/api/jobs", content=text, headers=headers), 400)


# -- names -----------------------------------------------------------------------------------------

NAMES = {
    "a terminal's escape": "\x1b]0;owned\x07",
    "a new line": "h\nGET / HTTP/1.1",
    "a carriage return": "h\rhidden",
    "a zero": "h\x00x",
    "a delete": "h\x7f",
    "the second control set": "h\x9b31m",
    "text that runs backwards": "h\u202egpj.exe",
    "half a character": None,
    "nothing": "",
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_name_in_a_graph_that_shows_as_another(house: House, kind: str) -> None:
    name = NAMES[kind]
    data = packed(graph={"nodes": [msgspec.to_builtins(CONST), {"kind": "save", "name": "@@"}]})
    if name is None:
        data = data.replace(b"\xa2@@", b"\xa3\xed\xa0\x80")
    else:
        graph = Graph(nodes=(CONST, Save(name=name, value=Ref(0))))
        data = encode(submit_of(frame(1), graph=graph))
    refused(house, post(house, data), 400, 422)


@pytest.mark.parametrize("name", [name for name in NAMES.values() if name])
def test_a_model_that_shows_as_another_is_not_there(house: House, name: str) -> None:
    """What is repeated of it is escaped where it meets a terminal."""
    report = refused(house, post(house, packed(model=f"tiny{name}")), 404)
    shown = escaped(report.message)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)


def test_a_log_with_a_thousand_parts(house: House) -> None:
    graph = Graph(nodes=(CONST, Log(parts=(Ref(0),) * 100_000)))
    refused(house, post(house, encode(submit_of(frame(1), graph=graph))), 400, 413, 422)


# -- the same again --------------------------------------------------------------------------------


def test_a_request_id_used_for_another_request(house: House) -> None:
    first = house.submit(submit_of(request_id="again"))
    assert first.status_code == 201
    again = house.submit(submit_of(request_id="again"))
    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])
    other = house.submit(submit_of(frame(7), request_id="again"))
    assert other.status_code == 409
    assert len(house.ledger.jobs("ann")) == 1
    house.do()


@pytest.mark.parametrize(
    "ranges",
    [
        "bytes=0-0," + "1-1," * 2_000 + "2-2",
        "bytes=" + "-".join(["1"] * 1_000),
        "bytes=99999999999999999999-",
        "items=0-1",
        "bytes=\u0661-",
    ],
)
def test_a_flood_of_ranges_is_one_file(ranges: str) -> None:
    """Each range would be a part of an answer that is longer than the file."""
    house = House()
    id = house.job()
    data = house.do()
    reply = house.ask("GET", f"/api/jobs/{id}/result", headers={"Range": ranges.encode()})
    assert reply.status_code in (200, 416)
    assert len(reply.content) <= len(data)


# -- what is meant for the tokenizer, its template, and the sampler --------------------------------

TOKENS: dict[str, dict[str, Any]] = {
    "more texts than anybody has": {"texts": ["a"] * 70_000},
    "more chats than anybody has": {"chats": [[]] * 5_000},
    "a template of one's own": {"texts": ["a"], "chat_template": "{{ cycler.__init__ }}"},
    "options of the template's": {"texts": ["a"], "template_kwargs": {"tools": []}},
    "a message with a field of the template's": {
        "chats": [[{"role": "user", "content": "a", "tool_calls": [{"function": "f"}]}]]
    },
    "a message that is no text": {"chats": [[{"role": "user", "content": [{"type": "image"}]}]]},
    "ids that are none": {"rows": [[-1]]},
    "ids beyond 64 bits": {"rows": [[1.5]]},
    "a tokenizer's path": {"texts": ["a"], "tokenizer": "../../x"},
    "code from the hub": {"texts": ["a"], "trust_remote_code": True},
}


@pytest.mark.parametrize("given", TOKENS.values(), ids=TOKENS.keys())
def test_a_question_that_abuses_the_tokenizer(house: House, given: dict[str, Any]) -> None:
    data = msgspec.msgpack.encode({"model": "tiny", **given})
    refused(house, house.ask("POST", "/api/tokens", content=data, headers=MSGPACK), 400, 413)


SAMPLING: dict[str, dict[str, Any]] = {
    "a thousand stop strings": {"stop_strings": ["a"] * 1_000},
    "a stop string without end": {"stop_strings": ["a" * 10_000]},
    "an empty stop string": {"stop_strings": [""]},
    "a thousand words that are bad": {"bad_words_ids": [[1]] * 2_000},
    "more tokens than there are": {"max_new_tokens": 10**9},
    "tokens below zero": {"max_new_tokens": -1},
    "a temperature that is none": {"temperature": "nan"},
    "a temperature beyond all": {"temperature": 1e300},
    "a share above one": {"top_p": 2.0},
    "beams": {"num_beams": 100},
    "a generation of one's own": {"custom_generate": "evil/repo"},
    "a processor": {"logits_processor": ["x"]},
    "a configuration": {"generation_config": "../../x"},
    "an assistant": {"assistant_model": "evil/repo"},
    "a compiler": {"compile_config": {}},
    "a seed below zero": {"seed": -1},
}


@pytest.mark.parametrize("given", SAMPLING.values(), ids=SAMPLING.keys())
def test_a_generation_with_options_that_there_are_not(house: House, given: dict[str, Any]) -> None:
    refused(house, post(house, packed(generation=given)), 400)


# -- other doors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted({entry.path for entry in ROUTES if entry.key}))
def test_no_route_lets_anybody_in_without_a_key(house: House, path: str) -> None:
    for entry in (entry for entry in ROUTES if entry.path == path):
        place = re.sub(r"\{\w+\}", "x", path)
        for key in (None, "", "weft_nobody", "weft_old", "' OR 1=1 --", "weft_ann " * 500):
            reply = house.ask(entry.method, place, key or None)
            assert reply.status_code == 401, (entry.method, path, key, reply.text)
            refused(house, reply, 401)


@pytest.mark.parametrize(
    "scheme", ["Basic d2VmdF9hbm46", "Bearer", "bearer", "Token weft_ann", "Bearer weft_ann, x"]
)
def test_another_way_to_say_who_one_is(house: House, scheme: str) -> None:
    reply = house.ask("GET", "/api/jobs", None, headers={"Authorization": scheme})
    refused(house, reply, 401)


def test_a_cookie_is_no_key(house: House) -> None:
    headers = {"Cookie": "key=weft_ann; Authorization=Bearer weft_ann"}
    reply = house.ask("GET", "/api/jobs", None, headers=headers)
    refused(house, reply, 401)
    assert "set-cookie" not in reply.headers


def test_a_form_of_another_page_is_no_request(house: House) -> None:
    """What a browser sends without asking first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        headers = {"Content-Type": kind, "Origin": "https://evil.example"}
        reply = house.ask("POST", "/api/jobs", content=packed(), headers=headers)
        refused(house, reply, 403, 415)


def test_a_method_that_is_smuggled(house: House) -> None:
    headers = MSGPACK | {"X-HTTP-Method-Override": "DELETE", "X-Forwarded-Host": "evil.example"}
    reply = house.ask("GET", "/api/jobs?_method=DELETE", headers=headers)
    refused(house, reply, 400)
    reply = house.ask("GET", "/api/jobs", headers=headers)
    assert (reply.status_code, reply.json()) == (200, {"jobs": []})


# -- the table -------------------------------------------------------------------------------------


def table() -> list[tuple[str, str, list[str]]]:
    """The rows of docs/security.md: a kind, where it is refused, its tests as `file.test`."""
    text = (ROOT / "docs" / "security.md").read_text()
    part = text.split("## Hostile requests")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", part, re.MULTILINE)
    return [(kind, where, re.findall(r"`([\w.]+)`", tests)) for kind, where, tests in rows[1:]]


def _named_in(path: Path) -> set[str]:
    """The names of the tests in a file."""
    tree = ast.parse(path.read_text())
    found = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {name for name in found if name.startswith("test_")}


def test_the_table() -> None:
    """Each kind has a test that is there; there are sixty and more; each place is a place."""
    files = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}
    rows = table()
    kinds = [kind for kind, _, _ in rows]
    assert len(kinds) == len(set(kinds)) >= 60
    for kind, where, tests in rows:
        assert where in ("front", "message", "grammar", "checker", "reader", "gateway"), kind
        assert tests, kind
        for name in tests:
            file, _, test = name.partition(".")
            assert f"test_{test}" in _named_in(files[f"test_{file}"]), name
