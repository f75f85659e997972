"""OpenAI's interface, driven by OpenAI's own client: the same tokens as `model.generate` here."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import weft
from tests.service.processes import until
from weft.service.gateway.openai.texts import Text
from weft.service.store.interface import Key
from weft.testing import tiny_path
from weft.testing.service import Server, serve

PROMPT = "The capital of France is"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}answer{% endif %}"
)


@pytest.fixture(scope="module")
def net() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_path())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(tiny_path())
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def model(net: Any, tokenizer: Any) -> weft.LanguageModel:
    return weft.LanguageModel(net, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def server(net: Any, tokenizer: Any) -> Iterator[Server]:
    with serve() as server:
        server.add("tiny", AutoModelForCausalLM.from_pretrained(tiny_path()), tokenizer)
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def wanted(net: Any, tokenizer: Any) -> str:
    """What `generate` of transformers adds to the prompt: plain, without Weft."""
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    made = net.generate(ids, max_new_tokens=9, do_sample=False)[0]
    whole = tokenizer.decode(made, skip_special_tokens=True)
    assert whole.startswith(PROMPT)
    return whole[len(PROMPT) :]


def test_models(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("org/other")
    assert refused.value.code == "model_not_found"


def test_a_completion_is_what_transformers_gives(
    client: openai.OpenAI, model: Any, wanted: str
) -> None:
    reply = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=9, temperature=0)
    (choice,) = reply.choices
    assert choice.text == wanted
    assert choice.finish_reason == "stop"
    assert reply.usage is not None
    count = len(model.tokenizer(PROMPT)["input_ids"])
    assert reply.usage.prompt_tokens == count
    assert reply.usage.total_tokens == count + reply.usage.completion_tokens
    ids = model.tokenizer(PROMPT)["input_ids"]
    again = client.completions.create(model="tiny", prompt=ids, max_tokens=2, temperature=0)
    assert again.choices[0].finish_reason == "length"
    assert wanted.startswith(again.choices[0].text)
    assert again.usage and again.usage.completion_tokens == 2


def test_a_seeded_completion_is_that_of_generate(client: openai.OpenAI, model: Any) -> None:
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.7, "top_p": 0.9}
    for seed in (3, 4):
        with model.generate(PROMPT, **options, top_k=None, seed=seed) as tracer:
            ids = tracer.result.save()
        whole = model.tokenizer.decode(ids[0], skip_special_tokens=True)
        asked = {"temperature": 1.7, "top_p": 0.9, "seed": seed, "max_tokens": 12}
        reply = client.completions.create(model="tiny", prompt=PROMPT, **asked)
        assert PROMPT + reply.choices[0].text == whole


def test_without_a_seed_draws_differ(client: openai.OpenAI) -> None:
    asked = {"model": "tiny", "prompt": PROMPT, "temperature": 2.0, "max_tokens": 16}
    texts = {client.completions.create(**asked).choices[0].text for _ in range(4)}
    assert len(texts) > 1


def test_a_stream_is_the_same_text_in_pieces(
    client: openai.OpenAI, model: Any, wanted: str
) -> None:
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 9, "temperature": 0}
    options: Any = {"include_usage": True}
    pieces = list(client.completions.create(**asked, stream=True, stream_options=options))
    *texts, last = pieces
    assert "".join(piece.choices[0].text for piece in texts) == wanted
    assert texts[-1].choices[0].finish_reason == "stop"
    assert last.usage is not None and not last.choices
    assert last.usage == client.completions.create(**asked).usage


def test_a_stream_comes_while_the_text_is_made(server: Server, client: openai.OpenAI) -> None:
    """The model waits again and again until something of the text has come."""
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 100, "temperature": 2.0, "seed": 1}
    passes, came = itertools.count(), threading.Semaphore(0)

    def wait(*_: Any) -> None:
        if next(passes) in (30, 60):
            assert came.acquire(timeout=60)

    net = server._workers["tiny"].worker._net
    hook = net.lm_head.register_forward_pre_hook(wait)
    texts = []
    try:
        for piece in client.completions.create(**asked, stream=True):
            texts.append(piece.choices[0].text)
            if texts[-1]:
                came.release()
    finally:
        hook.remove()
    assert len([text for text in texts if text]) > 2
    whole = client.completions.create(**asked).choices[0].text
    assert "".join(texts) == whole
    assert len(whole) > 50


def test_a_stop_string_ends_the_text_before_it(
    client: openai.OpenAI, model: Any, wanted: str
) -> None:
    stop = wanted[3:5]
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 9, "temperature": 0, "stop": stop}
    reply = client.completions.create(**asked)
    assert reply.choices[0].text == wanted[:3]
    assert reply.choices[0].finish_reason == "stop"
    pieces = list(client.completions.create(**asked, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == wanted[:3]


CHAT: list[Any] = [
    {"role": "system", "content": "one"},
    {"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "text", "text": " x"}]},
]


def test_a_chat_goes_through_the_models_template(
    client: openai.OpenAI, net: Any, tokenizer: Any
) -> None:
    text = "system one user two x answer"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    made = net.generate(ids, max_new_tokens=8, do_sample=False)[0]
    answer = tokenizer.decode(made[ids.shape[1] :], skip_special_tokens=True)
    asked: Any = {"model": "tiny", "messages": CHAT, "temperature": 0, "max_completion_tokens": 8}
    reply = client.chat.completions.create(**asked)
    said = reply.choices[0].message
    assert said.role == "assistant"
    assert (said.content or "").strip() == answer.strip()
    pieces = list(client.chat.completions.create(**asked, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == said.content
    assert pieces[-1].choices[0].finish_reason == reply.choices[0].finish_reason


def test_a_chat_without_a_length_goes_to_the_end(client: openai.OpenAI, model: Any) -> None:
    reply = client.chat.completions.create(model="tiny", messages=CHAT, temperature=0)
    assert reply.usage is not None
    assert reply.choices[0].finish_reason in ("stop", "length")
    whole = reply.usage.total_tokens
    assert whole <= model.config.max_position_embeddings


def test_the_async_client(server: Server, wanted: str) -> None:
    async def ask() -> str:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=server.key) as client:
            stream = await client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=9, temperature=0, stream=True
            )
            return "".join([piece.choices[0].text async for piece in stream])

    assert asyncio.run(ask()) == wanted


# -- interventions --------------------------------------------------------------------------------


def edited(model: Any) -> Any:
    v = torch.linspace(-2, 2, model.config.hidden_size)
    with model.edit() as found:
        model.model.layers[1].mlp.output[:, -1] *= -9
        model.model.layers[2].output[:] += v
    return found


def put(server: Server, path: str, data: bytes, key: str | None = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key or server.key}"}
    return httpx.put(f"{server.url}{path}", content=data, headers=headers, timeout=60)


def test_a_saved_edit_acts_as_the_edited_model_does(
    server: Server, client: openai.OpenAI, model: Any, wanted: str, tmp_path: Path
) -> None:
    other = edited(model)
    with other.generate(PROMPT, max_new_tokens=9, do_sample=False) as tracer:
        ids = tracer.result.save()
    mad = model.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert mad != PROMPT + wanted
    other.save_edits(tmp_path / "mad.weft")
    data = (tmp_path / "mad.weft").read_bytes()
    assert put(server, "/api/edits/mad", data).status_code == 201
    assert put(server, "/api/edits/mad", data).status_code == 200
    body: Any = {"weft": {"edit": "mad"}}
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 9, "temperature": 0}
    reply = client.completions.create(**asked, extra_body=body)
    assert PROMPT + reply.choices[0].text == mad
    pieces = list(client.completions.create(**asked, extra_body=body, stream=True))
    assert PROMPT + "".join(piece.choices[0].text for piece in pieces) == mad
    bare = client.completions.create(**asked)
    assert bare.choices[0].text == wanted


def test_a_recorded_graph_acts_and_brings_back_what_it_saves(
    server: Server, client: openai.OpenAI, model: Any, tmp_path: Path
) -> None:
    with model.generate(PROMPT, max_new_tokens=7, do_sample=False) as tracer:
        model.model.layers[1].mlp.output[:, -1] *= -9
        norms = weft.save([])
        for _ in tracer.iter[:]:
            norms.append(model.model.layers[2].output[:, -1].norm())
        tracer.stream(model.model.layers[2].output[:, -1].norm())
        h = model.model.layers[2].output.save("h")
        ids = tracer.result.save("ids")
    tracer.graph.save(tmp_path / "g.weft")
    graph = base64.b64encode((tmp_path / "g.weft").read_bytes()).decode()
    body: Any = {"weft": {"graph": graph}}
    asked = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "extra_body": body}
    wanted = model.tokenizer.decode(ids[0], skip_special_tokens=True)
    reply = client.completions.create(**asked)
    assert PROMPT + reply.choices[0].text == wanted
    told = (reply.model_extra or {})["weft"]
    job = weft.Job.get(told["job"], remote=server.url)
    assert torch.equal(job.result("h"), h)
    assert job.result("ids").tolist() == ids.tolist()
    assert base64.b64decode(told["result"])[8:9] == b"{"
    pieces = list(client.completions.create(**asked, stream=True))
    assert PROMPT + "".join(piece.choices[0].text for piece in pieces) == wanted
    with pytest.raises(openai.BadRequestError, match="recorded for 7 new tokens") as refused:
        client.completions.create(**asked, max_tokens=3)
    assert refused.value.param == "max_tokens"


def test_an_edit_and_a_graph_go_together(
    server: Server, client: openai.OpenAI, model: Any, tmp_path: Path
) -> None:
    other = edited(model)
    other.save_edits(tmp_path / "both.weft")
    assert put(server, "/api/edits/both", (tmp_path / "both.weft").read_bytes()).status_code == 201
    with other.generate(PROMPT, max_new_tokens=5, do_sample=False) as tracer:
        model.model.layers[0].output[:, -1] *= 3
        h = model.model.layers[3].output.save("h")
        ids = tracer.result.save("ids")
    with model.generate(PROMPT, max_new_tokens=5, do_sample=False) as bare:
        model.model.layers[0].output[:, -1] *= 3
        model.model.layers[3].output.save("h")
    bare.graph.save(tmp_path / "g.weft")
    graph = base64.b64encode((tmp_path / "g.weft").read_bytes()).decode()
    body: Any = {"weft": {"graph": graph, "edit": "both"}}
    asked = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "extra_body": body}
    reply = client.completions.create(**asked)
    wanted = model.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert PROMPT + reply.choices[0].text == wanted
    data = base64.b64decode((reply.model_extra or {})["weft"]["result"])
    assert h.numpy().tobytes() in data


def test_edits_belong_to_their_owner(server: Server, tmp_path: Path, model: Any) -> None:
    key = "weft_ann"
    server.ledger.add_key(Key("ann", hashlib.sha256(key.encode()).hexdigest(), 0.0))
    edited(model).save_edits(tmp_path / "e.weft")
    data = (tmp_path / "e.weft").read_bytes()
    path, own = f"{server.url}/api/edits/mine", {"Authorization": f"Bearer {server.key}"}
    assert put(server, "/api/edits/mine", data).status_code == 201
    assert httpx.get(path, headers=own, timeout=60).content == data
    assert (
        httpx.get(path, headers={"Authorization": f"Bearer {key}"}, timeout=60).status_code == 404
    )
    assert put(server, "/api/edits/mine", b"x" + data).status_code == 422
    assert put(server, "/api/edits/a.b", data).status_code == 400
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as ann:
        body: Any = {"weft": {"edit": "mine"}}
        with pytest.raises(openai.NotFoundError, match="no edit 'mine'"):
            ann.completions.create(model="tiny", prompt="one", extra_body=body)
    names = httpx.get(f"{server.url}/api/edits", headers=own, timeout=60).json()["edits"]
    assert "mine" in [one["name"] for one in names]
    assert httpx.delete(path, headers=own, timeout=60).status_code == 204
    assert httpx.delete(path, headers=own, timeout=60).status_code == 404


# -- refusals -------------------------------------------------------------------------------------

REFUSED = [
    ({"n": 0}, "n"),
    ({"logprobs": 21}, "logprobs"),
    ({"prompt": ["a", 3]}, "prompt"),
    ({"best_of": 3}, "best_of"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"temperature": 3}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"seed": -1}, "seed"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"user": "x"}, "user"),
    ({"extra_body": {"top_k": 3}}, "top_k"),
    ({"extra_body": {"weft": {"graphs": 1}}}, "weft"),
    ({"extra_body": {"weft": {"graph": "%%"}}}, "weft.graph"),
    ({"extra_body": {"weft": {"graph": {"nodes": [{"kind": "save"}]}}}}, "weft.graph"),
]


@pytest.mark.parametrize(("changes", "param"), REFUSED, ids=[one[1] for one in REFUSED])
def test_what_is_not_offered_is_refused_by_name(
    client: openai.OpenAI, changes: dict[str, Any], param: str
) -> None:
    asked: Any = {"model": "tiny", "prompt": "one", **changes}
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**asked)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"
    assert refused.value.request_id and refused.value.request_id in str(refused.value)


def test_values_that_change_nothing_are_taken(client: openai.OpenAI) -> None:
    idle: Any = {"n": 1, "presence_penalty": 0.0, "logit_bias": {}, "echo": False, "user": None}
    reply = client.completions.create(model="tiny", prompt="one", max_tokens=1, **idle)
    assert len(reply.choices) == 1


def test_chat_refuses_what_it_has_not(client: openai.OpenAI) -> None:
    image = {"type": "image_url", "image_url": {"url": "http://x"}}
    for messages, param in (
        ([], "messages"),
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": [image]}], "messages[0].content"),
        ([{"role": "user", "content": "x", "name": "y"}], "messages[0].name"),
    ):
        asked: Any = {"model": "tiny", "messages": messages}
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**asked)
        assert refused.value.param == param


def test_keys_models_and_limits(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="one")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="no", max_retries=0) as nobody:
        with pytest.raises(openai.AuthenticationError) as refused:
            nobody.models.list()
        assert refused.value.code == "invalid_api_key"
    slow = hashlib.sha256(b"weft_slow").hexdigest()
    server.ledger.add_key(Key("slow", slow, 0.0, limits={"requests_per_minute": 1}))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="weft_slow", max_retries=0) as one:
        one.models.list()
        with pytest.raises(openai.RateLimitError) as full:
            one.models.list()
    assert int(full.value.response.headers["retry-after"]) > 0
    assert full.value.type == "rate_limit_error"


def test_a_failed_generation_is_an_error_in_a_stream_too(
    client: openai.OpenAI, model: Any, tmp_path: Path
) -> None:
    with model.generate("one two three four five", max_new_tokens=3) as tracer:
        for _ in tracer.iter[0]:
            model.model.layers[1].output[:, 4] *= 2
        tracer.result.save("ids")
    tracer.graph.save(tmp_path / "g.weft")  # its prompt is longer than the one it will meet
    graph = base64.b64encode((tmp_path / "g.weft").read_bytes()).decode()
    asked: Any = {"model": "tiny", "prompt": "one", "extra_body": {"weft": {"graph": graph}}}
    with pytest.raises(openai.APIStatusError) as failed:
        client.completions.create(**asked)
    assert 400 <= failed.value.status_code < 500
    with pytest.raises(openai.APIError):
        list(client.completions.create(**asked, stream=True))


def test_who_goes_away_cancels_the_job(server: Server, client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": PROMPT, "temperature": 2.0, "max_tokens": 100}
    asked["stop"] = ["\x01"]
    stream = client.completions.create(**asked, stream=True)
    next(iter(stream))
    id = stream.response.headers["weft-job"]
    stream.close()
    until(lambda: server.ledger.job(id).ended is not None, "the end of the job")
    assert server.ledger.job(id).state in ("cancelled", "done")


# -- text -----------------------------------------------------------------------------------------


async def letters(rows: Sequence[tuple[int, ...]]) -> tuple[str, ...]:
    """Bytes as ids; a text loses a space at its beginning, as with some tokenizers."""
    return tuple([bytes(row).decode(errors="replace").removeprefix(" ") for row in rows])


def spoken(text: str, prompt: str, size: int, *stops: str) -> list[str]:
    async def speak() -> list[str]:
        found = Text(letters, prompt.encode(), stops)
        data = text.encode()
        parts = [await found.add(data[at : at + size]) for at in range(0, len(data), size)]
        return [*parts, await found.end()]

    return asyncio.run(speak())


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_only_whole_characters_come(size: int) -> None:
    text = " Ünï 日本語 🙂 e\u0301 x"
    parts = spoken(text, "before ", size)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_nothing_of_a_stop_string_comes(size: int) -> None:
    assert "".join(spoken("one, two; three", "x", size, "; t", "zz")) == "one, two"
    assert "".join(spoken("one, two; t", "x", size, "; tz")) == "one, two; t"
    assert spoken("日本語", "x", 9, "本") == ["日", ""]
