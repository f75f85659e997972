"""Several choices, several prompts, `echo` and log-probabilities, by OpenAI's own client.

The oracles are `transformers` alone: its `generate`, and its logits in one forward.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import weft
from tests.service.gate import House
from tests.service.processes import until
from weft.service.gateway.errors import Refused
from weft.service.gateway.openai import following, routes
from weft.service.gateway.openai.jobs import Sent
from weft.service.store.interface import Key
from weft.service.store.models import WorkerMemory
from weft.testing import tiny_path
from weft.testing.service import Server, serve

PROMPTS = ["The capital of France is", "The capital of Italy is", "The capital of"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
GREEDY: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "temperature": 0}
DRAWN: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "temperature": 1.8, "seed": 11}


@pytest.fixture(scope="module")
def net() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_path())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(tiny_path())
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def server(tokenizer: Any) -> Iterator[Server]:
    with serve() as server:
        server.add("tiny", AutoModelForCausalLM.from_pretrained(tiny_path()), tokenizer)
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as client:
        yield client


def answered(net: Any, tokenizer: Any, prompt: str, tokens: int = 6) -> str:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = net.generate(ids, max_new_tokens=tokens, do_sample=False)
    before, whole = tokenizer.batch_decode([ids[0], made[0]], skip_special_tokens=True)
    return whole[len(before) :]


def scores(net: Any, ids: list[int]) -> torch.Tensor:
    """`[pos, token]`: the log-probabilities after each token."""
    with torch.no_grad():
        return net(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def changed(asked: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return asked | changes


def drawn(model: Any, seed: int) -> str:
    options = {"max_new_tokens": 9, "do_sample": True, "temperature": 1.8, "top_p": 1.0}
    with model.generate(PROMPTS[0], **options, top_k=None, seed=seed) as tracer:
        ids = tracer.result.save()
    return model.tokenizer.decode(ids[0], skip_special_tokens=True)[len(PROMPTS[0]) :]


# -- several choices ------------------------------------------------------------------------------


def test_prompts_give_choices_in_their_order(
    client: openai.OpenAI, net: Any, tokenizer: Any
) -> None:
    reply = client.completions.create(prompt=PROMPTS, n=2, **GREEDY)
    assert [choice.index for choice in reply.choices] == list(range(6))
    wanted = [answered(net, tokenizer, prompt) for prompt in PROMPTS]
    assert [choice.text for choice in reply.choices] == [text for text in wanted for _ in range(2)]
    alone = [client.completions.create(prompt=prompt, **GREEDY).usage for prompt in PROMPTS]
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == sum(one.prompt_tokens for one in alone if one)
    assert reply.usage.completion_tokens == 2 * sum(one.completion_tokens for one in alone if one)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    again = client.completions.create(prompt=ids, **GREEDY)
    assert [choice.text for choice in again.choices] == wanted


def test_a_choice_has_the_seed_of_the_one_before_and_one(
    client: openai.OpenAI, net: Any, tokenizer: Any
) -> None:
    model = weft.LanguageModel(net, tokenizer=tokenizer)
    reply = client.completions.create(prompt=PROMPTS[0], n=4, **DRAWN)
    texts = [choice.text for choice in reply.choices]
    assert texts == [drawn(model, 11 + number) for number in range(4)]
    assert len(set(texts)) > 1
    two = client.completions.create(prompt=[PROMPTS[1], PROMPTS[0]], n=2, **DRAWN)
    assert [choice.text for choice in two.choices[2:]] == texts[2:]
    unseeded = client.completions.create(prompt=PROMPTS[0], n=4, **changed(DRAWN, seed=None))
    assert len({choice.text for choice in unseeded.choices}) > 1
    assert client.completions.create(prompt="a", n=2, **changed(DRAWN, seed=2**63 - 1)).choices


def test_a_stream_has_all_choices(client: openai.OpenAI) -> None:
    asked: Any = {"prompt": PROMPTS[:2], "n": 2, **DRAWN}
    options: Any = {"include_usage": True}
    texts, reasons, last = [""] * 4, [""] * 4, None
    for piece in client.completions.create(**asked, stream=True, stream_options=options):
        for choice in piece.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] += choice.finish_reason or ""
        last = piece.usage
    whole = client.completions.create(**asked)
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert last == whole.usage


def test_a_chat_has_choices(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": PROMPTS[2]}]
    whole = client.chat.completions.create(messages=messages, n=3, **DRAWN)
    texts = ["", "", ""]
    for piece in client.chat.completions.create(messages=messages, n=3, **DRAWN, stream=True):
        for choice in piece.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) > 1


def test_choices_bring_back_what_their_graphs_saved(
    server: Server, client: openai.OpenAI, net: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = weft.LanguageModel(net, tokenizer=tokenizer)
    saved = []
    for prompt in PROMPTS[:2]:
        with model.generate(prompt, max_new_tokens=4, do_sample=False) as tracer:
            model.model.layers[1].mlp.output[:, -1] *= -9
            saved.append(model.model.layers[2].output[:, -1].save("h"))
    tracer.graph.save(tmp_path / "g.weft")
    body: Any = {"weft": {"graph": base64.b64encode((tmp_path / "g.weft").read_bytes()).decode()}}
    asked: Any = {"model": "tiny", "prompt": PROMPTS[:2], "temperature": 0, "extra_body": body}
    reply = client.completions.create(**asked, logprobs=1)
    for choice, h in zip(reply.choices, saved, strict=True):
        told = (choice.model_extra or {})["weft"]
        assert told["names"] == ["h"]
        found = weft.Job.get(told["job"], remote=server.url).result("h")
        assert torch.allclose(found, h, atol=1e-5)


def test_all_jobs_of_a_request_are_counted_limited_and_cancelled(
    server: Server, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.APIStatusError, match="the limit choices is 32") as many:
        client.completions.create(prompt=["a"] * 11, n=3, **GREEDY)
    assert many.value.request_id
    print_ = hashlib.sha256(b"weft_few").hexdigest()
    server.ledger.add_key(Key("few", print_, 0.0, limits={"choices": 2}))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="weft_few", max_retries=0) as few:
        with pytest.raises(openai.APIStatusError, match="the limit choices is 2"):
            few.completions.create(prompt="a", n=3, **GREEDY)
        few.completions.create(prompt="a", n=2, **GREEDY)
    assert len(server.ledger.jobs("few", 10)) == 2
    asked: Any = {"model": "tiny", "temperature": 2.0, "max_tokens": 100, "stop": ["\x01"]}
    stream = client.completions.create(prompt=PROMPTS, n=3, stream=True, **asked)
    next(iter(stream))
    ids = stream.response.headers["weft-job"].split(",")
    assert len(set(ids)) == 9
    stream.close()
    until(lambda: all(server.ledger.job(id).ended for id in ids), "the end of the jobs")
    assert {server.ledger.job(id).state for id in ids} <= {"cancelled", "done"}


def test_a_full_queue_leaves_none_of_a_requests_jobs(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.checker, "_claim", list)  # they wait, each of them
    print_ = hashlib.sha256(b"weft_queue").hexdigest()
    server.ledger.add_key(Key("queue", print_, 0.0, limits={"queued_jobs": 2}))
    one = openai.OpenAI(base_url=f"{server.url}/v1", api_key="weft_queue", max_retries=0)
    with one, pytest.raises(openai.RateLimitError, match="queued_jobs"):
        one.completions.create(prompt="a", n=20, **changed(GREEDY, max_tokens=60))
    until(lambda: all(job.ended for job in server.ledger.jobs("queue", 50)), "the end of the jobs")


# -- echo and log-probabilities -------------------------------------------------------------------


def test_echo_begins_with_the_prompt(client: openai.OpenAI, net: Any, tokenizer: Any) -> None:
    wanted = [prompt + answered(net, tokenizer, prompt) for prompt in PROMPTS]
    reply = client.completions.create(prompt=PROMPTS, echo=True, **GREEDY)
    assert [choice.text for choice in reply.choices] == wanted
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    texts = ["", "", ""]
    for piece in client.completions.create(prompt=ids, echo=True, stream=True, **GREEDY):
        texts[piece.choices[0].index] += piece.choices[0].text
    assert texts == wanted


@pytest.mark.parametrize("drawing", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("tops", [0, 3])
@pytest.mark.parametrize("echo", [False, True])
def test_log_probabilities_are_those_of_the_logits(
    client: openai.OpenAI, net: Any, tokenizer: Any, drawing: Any, tops: int, echo: bool
) -> None:
    asked: Any = {"prompt": PROMPTS[0], "logprobs": tops, "echo": echo, **drawing}
    (choice,) = client.completions.create(**asked).choices
    told = choice.logprobs
    assert told is not None and told.tokens is not None
    assert told.token_logprobs and told.text_offset is not None
    begun = tokenizer(PROMPTS[0])["input_ids"]
    text = choice.text if echo else PROMPTS[0] + choice.text
    ids = spelt(tokenizer, told.tokens) if echo else begun + spelt(tokenizer, told.tokens)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    rows = scores(net, ids)
    first = 0 if echo else len(begun)
    for number, at in enumerate(range(first, len(ids))):
        value = told.token_logprobs[number]
        if at == 0:
            assert value is None
            continue
        assert value == pytest.approx(rows[at - 1, ids[at]].item(), abs=1e-4)
        if tops:
            best = rows[at - 1].topk(tops)
            likely: Any = told.top_logprobs[number]  # type: ignore[index]
            values = sorted(likely.values(), reverse=True)[:tops]
            assert values == pytest.approx(best.values.tolist(), abs=1e-4)
            assert told.tokens[number] in likely
    assert told.top_logprobs is None or tops
    shown = choice.text
    for number, place in enumerate(told.text_offset):
        word = told.tokens[number]
        if not word.startswith("<"):
            assert shown[place : place + len(word)] == word
    streamed: dict[str, Any] = {}
    for piece in client.completions.create(**asked, stream=True):
        found = piece.choices[0].logprobs
        for name, values in (found.model_dump() if found else {}).items():
            streamed[name] = [*streamed.get(name, []), *(values or [])]
    assert streamed["tokens"] == told.tokens
    assert streamed["text_offset"] == told.text_offset
    both = zip(streamed["token_logprobs"], told.token_logprobs, strict=True)
    assert all(one == pytest.approx(two, abs=1e-4) for one, two in both)


def spelt(tokenizer: Any, tokens: list[str]) -> list[int]:
    """The ids of tokens by their text."""
    (a,) = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    before = len(tokenizer.decode([a]))  # a first token may lose its space
    names = {tokenizer.decode([a, id])[before:]: id for id in range(len(tokenizer))}
    marks = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    alone = {tokenizer.decode([id]): id for id in range(len(tokenizer))}
    return [(alone | names | marks)[token] for token in tokens]


def test_a_chat_tells_log_probabilities(client: openai.OpenAI, net: Any, tokenizer: Any) -> None:
    messages: Any = [{"role": "user", "content": PROMPTS[0]}]
    asked: Any = {"messages": messages, "logprobs": True, "top_logprobs": 2, **DRAWN}
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.logprobs is not None and choice.logprobs.content
    begun = tokenizer(PROMPTS[0], add_special_tokens=False)["input_ids"]
    ids = begun + spelt(tokenizer, [one.token for one in choice.logprobs.content])
    rows = scores(net, ids)
    for at, one in enumerate(choice.logprobs.content, len(begun) - 1):
        assert one.logprob == pytest.approx(rows[at, ids[at + 1]].item(), abs=1e-4)
        best = rows[at].topk(2)
        assert [two.logprob for two in one.top_logprobs] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )
        assert spelt(tokenizer, [two.token for two in one.top_logprobs]) == best.indices.tolist()
        assert bytes(one.bytes or ()).decode() == one.token
    found = []
    for piece in client.chat.completions.create(**asked, stream=True):
        told = piece.choices[0].logprobs
        found += [] if told is None else told.content or []
    assert [one.token for one in found] == [one.token for one in choice.logprobs.content]
    bare = client.chat.completions.create(**changed(asked, top_logprobs=None)).choices[0].logprobs
    assert bare is not None and bare.content and not bare.content[0].top_logprobs


def test_log_probabilities_are_those_of_the_edited_model(
    client: openai.OpenAI, net: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """The graph's own edit of a layer, held against a plain hook."""
    model = weft.LanguageModel(net, tokenizer=tokenizer)
    with model.generate(PROMPTS[0], max_new_tokens=5, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            model.model.layers[1].mlp.output[:] *= -3
        tracer.result.save("ids")
    tracer.graph.save(tmp_path / "g.weft")
    body: Any = {"weft": {"graph": base64.b64encode((tmp_path / "g.weft").read_bytes()).decode()}}
    asked: Any = {"model": "tiny", "prompt": PROMPTS[0], "temperature": 0, "extra_body": body}
    (choice,) = client.completions.create(**asked, logprobs=2).choices
    told = choice.logprobs
    assert told and told.tokens and told.token_logprobs
    begun = tokenizer(PROMPTS[0])["input_ids"]
    ids = begun + spelt(tokenizer, told.tokens)
    hook = net.model.layers[1].mlp.register_forward_hook(lambda module, given, out: out * -3)
    try:
        rows = scores(net, ids)
    finally:
        hook.remove()
    for at, value in enumerate(told.token_logprobs, len(begun) - 1):
        assert value == pytest.approx(rows[at, ids[at + 1]].item(), abs=1e-4)


def test_what_does_not_go_together_is_refused(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "a"}]
    for changes, param in (
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"extra_body": {"echo": True}}, "echo"),
    ):
        asked: Any = {"model": "tiny", "messages": messages, **changes}
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**asked)
        assert refused.value.param == param


# -- waiting --------------------------------------------------------------------------------------


def test_who_asks_before_the_model_is_known_waits(
    server: Server, net: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and streamed; a quiet stream has comments meanwhile."""
    monkeypatch.setattr(routes, "BEAT_SECONDS", 0.3)
    with server.checker._lock:  # who may be about to tell of the model once more
        monkeypatch.setattr(server.checker, "_publish", lambda id: None)
    known = server.ledger.card("tiny")
    assert known is not None
    server.ledger.drop_card("tiny")
    asked = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 6, "temperature": 0}
    headers = {"Authorization": f"Bearer {server.key}"}
    url = f"{server.url}/v1/completions"
    body = asked | {"stream": True}
    with ThreadPoolExecutor() as threads:
        asking = threads.submit(httpx.post, url, json=asked, headers=headers, timeout=60)
        with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as stream:
            read = stream.iter_lines()
            lines = [next(line for line in read if line) for _ in range(3)]
            assert lines == [": tiny is being loaded"] * 3
            assert not asking.done()
            server.ledger.put_card(known)
            lines = list(read)
        whole = asking.result()
    assert (whole.status_code, stream.status_code) == (200, 200)
    wanted = answered(net, tokenizer, PROMPTS[0])
    assert whole.json()["choices"][0]["text"] == wanted
    pieces = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == wanted


def test_a_server_that_ends_gives_what_is_over() -> None:
    """Who waits for it may not have heard of it yet: there is no other server to wait at."""
    house = House()
    job = house.ledger.job(house.job())
    assert job is not None
    house.app.gateway.close()
    sent = Sent(job, ids=(), most=1, ends=frozenset(), stream=0)

    async def last() -> following.News:
        return [news async for news in following.followed(house.app.gateway, sent)][-1]

    with pytest.raises(Refused, match="about to stop"):
        asyncio.run(last())
    house.do()
    assert asyncio.run(last()).over == house.ledger.job(job.id)


def test_a_quiet_stream_has_comments(
    server: Server, net: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job waits for its model; what the load has come to is told."""
    monkeypatch.setattr(following, "BEAT_SECONDS", 0.2)
    server.add("quiet", net, tokenizer)
    server._end_worker("quiet")  # nobody is there to run it
    row = WorkerMemory(model="quiet", state="loading", weights=100, loaded=40)
    asked = {"model": "quiet", "prompt": PROMPTS[0], "max_tokens": 6, "stream": True}
    headers = {"Authorization": f"Bearer {server.key}"}
    url = f"{server.url}/v1/completions"
    found = []
    with httpx.stream("POST", url, json=asked, headers=headers, timeout=60) as reply:
        for line in reply.iter_lines():
            found += [line] if line.startswith(": ") else []
            if found[2:] and "loaded" in line:
                break
            if len(found) == 2:
                server.ledger.put_memory(row)
    assert found[0] in (": the job is received", ": the job is queued")
    assert found[-1] == ": quiet is being loaded: 40 of 100 bytes"
