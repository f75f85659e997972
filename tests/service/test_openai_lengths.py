"""How many tokens a request in OpenAI's form has that does not say how many."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import weft
from weft.service.store.interface import Key
from weft.testing import tiny_path
from weft.testing.service import Server, serve

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
POSITIONS = 24
ONE = 5  # a token


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(tiny_path())
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def server(tokenizer: Any) -> Iterator[Server]:
    """`table` has so many positions and no more; neither model ends by itself."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=POSITIONS, n_embd=8, n_layer=1, n_head=1
    )
    table = GPT2LMHeadModel(config).eval()
    table.generation_config.eos_token_id = None
    tiny = AutoModelForCausalLM.from_pretrained(tiny_path())
    tiny.generation_config.eos_token_id = None
    with serve() as server:
        server.add("table", table, tokenizer)
        server.add("tiny", tiny, tokenizer)
        yield server


_names = (f"weft_{number}" for number in itertools.count())


def asked(server: Server, path: str, limits: dict[str, float], **body: Any) -> httpx.Response:
    """The answer to a key that has these limits."""
    name = next(_names)
    server.ledger.add_key(Key(name, hashlib.sha256(name.encode()).hexdigest(), 0.0, limits=limits))
    headers = {"Authorization": f"Bearer {name}"}
    body = {"temperature": 0, **body}
    return httpx.post(f"{server.url}/v1/{path}", json=body, headers=headers, timeout=60)


def made(said: httpx.Response) -> int:
    """So many tokens were generated."""
    assert said.status_code == 200, said.text
    assert said.json()["choices"][0]["finish_reason"] == "length"
    return said.json()["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    ("model", "begun", "limits", "tokens"),
    [
        ("tiny", 3, {}, 16),
        ("tiny", 3, {"new_tokens": 5}, 5),
        ("tiny", 3, {"new_tokens": 40}, 16),
        ("tiny", 250, {}, 6),
        ("table", 3, {}, 16),
        ("table", POSITIONS - 4, {}, 4),
        ("table", POSITIONS - 4, {"new_tokens": 3}, 3),
    ],
)
def test_a_text_has_sixteen_tokens_or_as_many_as_there_may_be(
    server: Server, model: str, begun: int, limits: dict[str, float], tokens: int
) -> None:
    said = asked(server, "completions", limits, model=model, prompt=[ONE] * begun)
    assert made(said) == tokens


@pytest.mark.parametrize(
    ("model", "limits", "tokens"),
    [("table", {}, POSITIONS), ("table", {"new_tokens": 5}, POSITIONS), ("tiny", {}, 256)],
)
def test_a_chat_has_as_many_as_there_may_be(
    server: Server, model: str, limits: dict[str, float], tokens: int
) -> None:
    messages = [{"role": "user", "content": "one two three"}]
    said = asked(server, "chat/completions", limits, model=model, messages=messages)
    begun = said.json()["usage"]["prompt_tokens"]
    assert made(said) == min(tokens - begun, limits.get("new_tokens", tokens))


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_what_is_said_is_held_to_the_limit(server: Server, path: str) -> None:
    prompts = {"prompt": [ONE], "messages": [{"role": "user", "content": "one"}]}
    name = "prompt" if path == "completions" else "messages"
    body = {"model": "tiny", "max_tokens": 6, name: prompts[name]}
    said = asked(server, path, {"new_tokens": 5}, **body)
    assert said.status_code == 413
    assert "the limit new_tokens is 5" in said.json()["error"]["message"]


def test_a_recorded_graph_has_the_length_that_it_was_recorded_with(
    server: Server, tmp_path: Path
) -> None:
    model = weft.LanguageModel(tiny_path())
    with model.generate("one two three", max_new_tokens=7, do_sample=False) as tracer:
        model.model.layers[1].output.save("h")
    tracer.graph.save(str(tmp_path / "graph.weft"))
    graph = base64.b64encode((tmp_path / "graph.weft").read_bytes()).decode()
    body = {"model": "tiny", "prompt": "one two three", "weft": {"graph": graph}}
    assert made(asked(server, "completions", {}, **body)) == 7
    said = asked(server, "completions", {"new_tokens": 5}, **body)
    assert said.status_code == 413  # it names seven steps: fewer would be another experiment


def test_a_prompt_beyond_the_positions_is_refused(server: Server) -> None:
    said = asked(server, "completions", {}, model="table", prompt=[ONE] * (POSITIONS + 1))
    assert said.status_code == 422
    assert f"this model has {POSITIONS}" in said.json()["message"]
    messages = [{"role": "user", "content": "one two three " * POSITIONS}]
    said = asked(server, "chat/completions", {}, model="table", messages=messages)
    assert (said.status_code, said.json()["error"]["param"]) == (400, "messages")
