"""Hostile bodies for OpenAI's routes: each is refused by name, and nothing of it is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.service.hostile import FORBIDDEN
from weft.testing import tiny_path
from weft.testing.service import Server, serve


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve() as server:
        tokenizer = AutoTokenizer.from_pretrained(tiny_path())
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        server.add("tiny", AutoModelForCausalLM.from_pretrained(tiny_path()), tokenizer)
        yield server


def body(**changes: Any) -> bytes:
    return json.dumps({"model": "tiny", "prompt": "one", "max_tokens": 1, **changes}).encode()


def text(more: str) -> bytes:
    return b'{"model":"tiny","prompt":"one","max_tokens":1,' + more.encode() + b"}"


def chat(messages: Any, **changes: Any) -> bytes:
    return json.dumps({"model": "tiny", "messages": messages, **changes}).encode()


DEEP = "[" * 20_000 + "]" * 20_000
LONG = "9" * 5_000
GRAPH = {"nodes": [{"kind": "call", "op": "os.system", "args": ["ls"]}]}
TEXTS = {
    "huge n": body(n=10**9),
    "n beyond 64 bits": text(f'"n":{LONG}'),
    "negative n": body(n=-1),
    "n as a text": body(n="2"),
    "n as a float": body(n=2.5),
    "n as true": body(n=True),
    "many prompts": body(prompt=["a"] * 100_000),
    "prompts of nested lists": body(prompt=[[["a"]]]),
    "prompts of mixed kinds": body(prompt=["a", [1], 2]),
    "prompts with an empty one": body(prompt=[[1], []]),
    "a prompt of nothing": body(prompt=[]),
    "a prompt that is an object": body(prompt={"a": 1}),
    "negative tokens": body(prompt=[5, -1]),
    "tokens beyond 64 bits": text(f'"echo":false,"prompt":[{LONG}]').replace(
        b'"prompt":"one",', b""
    ),
    "tokens that the model has not": body(prompt=[10**6]),
    "tokens that are true": body(prompt=[True, False]),
    "tokens that are floats": body(prompt=[1.5]),
    "a field twice": text('"n":1,"n":2'),
    "NaN": text('"temperature":NaN'),
    "infinity": text('"top_p":Infinity'),
    "a number of 5,000 digits": text(f'"temperature":{LONG}'),
    "a number beyond floats": text('"temperature":1e999'),
    "deep nesting": text(f'"stop":{DEEP}'),
    "deep nesting of the prompt": text(f'"echo":true,"prompt":{DEEP}').replace(
        b'"prompt":"one",', b""
    ),
    "a huge list of stops": body(stop=["a"] * 100_000),
    "a huge stop": body(stop="a" * 1_000_000),
    "an empty stop": body(stop=[""]),
    "half a character as the prompt": text('"prompt":"\\ud800"').replace(b'"prompt":"one",', b""),
    "half a character as a stop": text('"stop":"\\udc00"'),
    "half a character as a field": text('"\\ud800":1'),
    "bytes that are no UTF-8": b'{"model":"tiny","prompt":"\xff\xfe"}',
    "no JSON": b"model=tiny&prompt=one",
    "no object": b"[1]",
    "nothing": b"",
    "a huge number of tops": body(logprobs=10**6),
    "tops as a text": body(logprobs="all"),
    "tops as NaN": text('"logprobs":NaN'),
    "echo as a number": body(echo=1),
    "best of many": body(best_of=10**9),
    "a model that is a path": body(model="../../etc/passwd"),
    "a model that is a list": body(model=["tiny"]),
    "a huge seed": text(f'"seed":{LONG}'),
    "more tokens than there may be": body(max_tokens=10**12),
    "a graph that calls the system": body(weft={"graph": GRAPH}),
    "an edit that is a path": body(weft={"edit": "../../keys"}),
    "options of streams that nest": body(stream=True, stream_options={"include_usage": [[]]}),
    "a field of many characters": text('"' + "x" * 100_000 + '":1'),
}
CHATS = {
    "a role that is an object": chat([{"role": {"a": 1}, "content": "x"}]),
    "a message that is a text": chat(["x"]),
    "messages that are an object": chat({"role": "user"}),
    "content that nests": chat([{"role": "user", "content": [[[["x"]]]]}]),
    "content that is a number": chat([{"role": "user", "content": 3}]),
    "content of half a character": chat([{"role": "user", "content": "\ud800"}]),
    "half a character as a field of a message": chat([{"role": "user", "\ud800": "x"}]),
    "half a character as a role": chat([{"role": "\ud800", "content": "x"}]),
    "100,000 messages": chat([{"role": "user", "content": ""}] * 100_000),
    "top_logprobs that are none": chat([{"role": "user", "content": "x"}], top_logprobs=-3),
}
CASES = [("/v1/completions", *one) for one in TEXTS.items()]
CASES += [("/v1/chat/completions", *one) for one in CHATS.items()]


@pytest.mark.parametrize(("path", "what", "data"), CASES, ids=[one[1] for one in CASES])
def test_a_hostile_body_is_refused_by_name(
    server: Server, path: str, what: str, data: bytes
) -> None:
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    reply = httpx.post(server.url + path, content=data, headers=headers, timeout=60)
    assert 400 <= reply.status_code < 500, (reply.status_code, reply.text[:500])
    told = reply.json()["error"]
    assert told["message"] and told["type"] and told["code"]
    assert told["code"] != "travel"  # which only a client says
    assert reply.headers["x-request-id"] in told["message"]
    assert len(reply.content) < 4_000
    assert not FORBIDDEN.search(reply.text), reply.text
    jobs = server.ledger.jobs("local", 10)
    assert all(job.state == "failed" for job in jobs), jobs
