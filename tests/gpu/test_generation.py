"""Generations on a GPU: the tokens that `generate` of transformers gives there."""

from __future__ import annotations

import pytest
import torch

import weft
from tests.gpu import place
from tests.gpu.place import DEVICE, IS_CUDA
from tests.language.generated import generated
from weft.testing.same import bitwise

pytestmark = pytest.mark.gpu

IDS = place.tokens(9)
ON = IDS.to(DEVICE)
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
AT = "model.layers.1.output"


@pytest.fixture(scope="module")
def net():
    return place.net("llama")


@pytest.fixture
def model(net):
    return weft.LanguageModel(net)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("ids", [IDS, ON], ids=["ids on the cpu", "ids on the device"])
def test_greedy(model, net, ids, cache):
    with model.generate(ids, **OPTIONS, use_cache=cache) as tracer:
        found = tracer.result.save()
    assert found.device == ON.device
    bitwise(found, generated(net, ON, {}, **OPTIONS, use_cache=cache).result)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_greedy_in_half_precision_with_an_edit_at_each_step(dtype):
    net = place.larger("llama", dtype)
    model, v = weft.LanguageModel(net), torch.linspace(-2, 2, 256, dtype=dtype)
    with model.generate(IDS, **OPTIONS) as tracer:
        model.model.layers[1].output[:, -1] += v
        seen = []
        for _ in tracer.iter[:]:
            seen.append(model.model.layers[2].output)
        seen = weft.save(seen)
        found = tracer.result.save()
    on = v.to(DEVICE)

    def add(step, h):
        h[:, -1] += on

    key = "model.layers.2.output"
    expected = generated(net, ON, {AT: add, key: None}, **OPTIONS)
    bitwise(found, expected.result)
    bitwise(list(seen), [expected[key, step] for step in range(6)])


def test_prompts_padded_on_the_left(model, net):
    rows = [IDS[0].tolist(), IDS[0, 4:].tolist()]
    with model.generate(rows, **OPTIONS) as tracer:
        found = tracer.result.save()
    ids = torch.tensor([rows[0], [0] * 4 + rows[1]], device=DEVICE)
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5], device=DEVICE)
    with torch.no_grad():
        bitwise(found, net.generate(ids, attention_mask=mask, **OPTIONS))


def test_draws_are_keyed_and_penalties_are_those_of_transformers(model, net):
    def once(seed, **options):
        with model.generate(IDS, **{**OPTIONS, "do_sample": True}, seed=seed, **options) as tracer:
            logits = model.lm_head.output.save()
            ids = tracer.result.save()
        return ids, logits

    before = torch.cuda.get_rng_state() if IS_CUDA else None
    one, same, other = once(3), once(3), once(4)
    bitwise(one, same)
    assert not torch.equal(one[0], other[0])
    assert before is None or torch.equal(before, torch.cuda.get_rng_state())
    penalties = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    with model.generate(IDS, **OPTIONS, **penalties) as tracer:
        found = tracer.result.save()
    bitwise(found, generated(net, ON, {}, **OPTIONS, **penalties).result)


def test_results_and_streams_where_they_are_asked_for(model, net):
    heard = []
    with model.generate(IDS, **OPTIONS, device="cpu") as tracer:
        tracer.stream(model.lm_head.output[:, -1].argmax(-1), to=heard.append)
        found = tracer.result.save()
    assert found.device.type == "cpu" and all(one.device.type == "cpu" for one in heard)
    expected = generated(net, ON, {}, **OPTIONS).result.cpu()
    bitwise(found, expected)
    bitwise(torch.stack(heard, 1), expected[:, 9:])


def test_it_ends_where_a_condition_holds(model, net):
    expected = generated(net, ON, {}, **OPTIONS).result
    with model.generate(IDS, **OPTIONS) as tracer:
        for _ in tracer.iter[2]:
            tracer.stop_if(model.lm_head.output.isfinite().all())
        found = tracer.result.save()
    assert found.shape[1] < expected.shape[1]
    bitwise(found, expected[:, : found.shape[1]])


def test_loopback_gives_the_same(model):
    def once(remote):
        with model.generate(IDS, **OPTIONS, remote=remote) as tracer:
            model.model.layers[1].output[:, -1] += 1
            tracer.result.save("ids")
            model.lm_head.output.save("logits")
        return tracer.results

    here, there = once(False), once("local")
    for name in here:
        bitwise(there[name].cpu(), here[name].cpu())


def test_an_encoder_decoder():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    net = transformers.T5ForConditionalGeneration(config).eval().to(DEVICE)
    model = weft.LanguageModel(net)
    options = {"max_new_tokens": 4, "do_sample": False}
    with model.generate(IDS, **options) as tracer:
        found = tracer.result.save()
    with torch.no_grad():
        bitwise(found, net.generate(ON, **options))
