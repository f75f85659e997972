"""Generations of encoder-decoders: the encoder runs in step 0, the decoder at each.

The oracle is `transformers`' own `generate` with hooks. It runs the encoder before its first
forward of the model, so hooks on encoder modules count one call, and hooks on decoder modules one
for each token.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers

import weft
from tests.families import zoo
from tests.language.generated import generated
from weft.errors import InputError, NotReachedError, RecordingError
from weft.testing.same import bitwise, moves

NEW = 5
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
ORACLE = {**GREEDY, "min_new_tokens": None}
IDS = torch.tensor(zoo.tokens(7, seed=1))
SHORT = torch.tensor(zoo.tokens(4, seed=2))


@cache
def built(name):
    with torch.random.fork_rng(devices=[]):
        net = _t5() if name == "t5" else _bart()
    zoo.randomize(net, 0)
    return net.eval()


def _t5():
    config = transformers.T5Config(
        vocab_size=zoo.VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def _bart():
    config = transformers.BartConfig(
        vocab_size=zoo.VOCAB, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_position_embeddings=40, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


ENCODER = {"t5": "encoder.block", "bart": "model.encoder.layers"}
DECODER = {"t5": "decoder.block", "bart": "model.decoder.layers"}
CROSS = {
    "t5": "decoder.block.1.layer.1.EncDecAttention",
    "bart": "model.decoder.layers.1.encoder_attn",
}


@pytest.fixture(params=["t5", "bart"])
def name(request):
    return request.param


@pytest.fixture
def net(name):
    return built(name)


@pytest.fixture
def model(net):
    return weft.LanguageModel(net)


def hidden(value):
    return value[0] if isinstance(value, tuple) else value


def adding(v, at):
    def add(step, value):
        if at in (None, step):
            hidden(value)[:, -1] += v

    return add


@pytest.mark.parametrize("use_cache", [True, False])
def test_tokens_and_values_are_those_of_generate(name, net, model, use_cache):
    enc, dec = f"{ENCODER[name]}.1", f"{DECODER[name]}.1"
    keys = {f"{enc}.output": None, f"{dec}.output": None, f"{CROSS[name]}.output": None}
    seen = generated(net, IDS, keys, **GREEDY, use_cache=use_cache)
    with model.generate(IDS, **GREEDY, use_cache=use_cache) as tracer:
        encoded = hidden(model.get(enc).output).save()
        decoded, crossed = weft.save([]), weft.save([])
        for _ in tracer.iter[:]:
            decoded.append(hidden(model.get(dec).output))
            crossed.append(hidden(model.get(CROSS[name]).output))
        ids = tracer.result.save()
    bitwise(ids, seen.result)
    assert ids.shape == (1, 1 + NEW)
    bitwise(encoded, hidden(seen[f"{enc}.output", 0]))
    bitwise(list(decoded), [hidden(seen[f"{dec}.output", step]) for step in range(NEW)])
    bitwise(list(crossed), [hidden(seen[f"{CROSS[name]}.output", step]) for step in range(NEW)])


def test_edits_in_both_halves(name, net, model, v):
    enc, dec = f"{ENCODER[name]}.0", f"{DECODER[name]}.0"
    keys = {f"{enc}.output": adding(v, 0), f"{dec}.output": adding(v, 2)}
    seen = generated(net, IDS, {**keys, f"{DECODER[name]}.1.output": None}, **GREEDY)
    with model.generate(IDS, **GREEDY) as tracer:
        found = weft.save([])
        for step in tracer.iter[:]:
            if step == 0:
                hidden(model.get(enc).output)[:, -1] += v
            if step == 2:
                hidden(model.get(dec).output)[:, -1] += v
            found.append(hidden(model.get(f"{DECODER[name]}.1").output))
        ids = tracer.result.save()
    bitwise(ids, seen.result)
    want = [hidden(seen[f"{DECODER[name]}.1.output", step]) for step in range(NEW)]
    bitwise(list(found), want)
    plain = generated(net, IDS, {f"{DECODER[name]}.1.output": None}, **GREEDY)
    moves(found[2], hidden(plain[f"{DECODER[name]}.1.output", 2]))


def test_a_model_that_is_known_as_data_and_one_as_a_server_would(name, net, model, place, v):
    """The first has neither weights nor a forward here, the second all but the network."""
    dec = f"{DECODER[name]}.0"
    seen = generated(net, IDS, {f"{dec}.output": adding(v, None)}, **GREEDY)
    for one, where in ((place.language(net), {}), (model, {"remote": "local"})):
        with one.generate(IDS, **GREEDY, **where) as tracer:
            encoded = hidden(one.get(f"{ENCODER[name]}.1").output).save()
            for _ in tracer.iter[:]:
                hidden(one.get(dec).output)[:, -1] += v
                assert hidden(one.get(dec).output).shape == (1, 1, 32)
            ids = tracer.result.save()
        assert encoded.shape == (1, 7, 32)
        bitwise(ids, seen.result)
        with one.generate(IDS, **GREEDY, **where, use_cache=False) as tracer:
            lengths = [hidden(one.get(dec).output).shape[1] for _ in tracer.iter[:]]
            tracer.result.save()
        assert lengths == [1, 2, 3, 4, 5]


def test_a_template_acts_at_every_step_of_the_decoder(name, net, model, v):
    dec = f"{DECODER[name]}.0"
    seen = generated(net, IDS, {f"{dec}.output": adding(v, None)}, **GREEDY)
    with model.generate(IDS, **GREEDY) as tracer:
        hidden(model.get(dec).output)[:, -1] += v
        ids = tracer.result.save()
    bitwise(ids, seen.result)


def test_a_template_of_the_encoder_belongs_to_step_0(name, model, v):
    enc = model.get(f"{ENCODER[name]}.0")
    with (
        pytest.raises(RecordingError, match="not valid at step 1") as caught,
        model.generate(IDS, **GREEDY) as tracer,
    ):
        hidden(enc.output)[:] += v
        tracer.result.save()
    assert "tracer.iter[0]" in str(caught.value)
    with pytest.raises(NotReachedError), model.generate(IDS, **GREEDY) as tracer:
        for _ in tracer.iter[1]:
            enc.output.save()


def test_a_padded_batch(name, net, model):
    pad = net.config.pad_token_id
    ids = torch.cat([IDS, torch.cat([SHORT, torch.full((1, 3), pad)], 1)])
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    seen = generated(net, ids, {f"{DECODER[name]}.1.output": None}, attention_mask=mask,
                     **GREEDY, pad_token_id=pad)  # fmt: skip
    with model.generate([IDS[0], SHORT[0]], **GREEDY) as tracer:
        assert tracer.lengths == (7, 4)
        found = hidden(model.get(f"{DECODER[name]}.1").output).save()
        result = tracer.result.save()
    bitwise(result, seen.result)
    bitwise(found, hidden(seen[f"{DECODER[name]}.1.output", 0]))
    alone = generated(net, SHORT, {}, **GREEDY).result
    bitwise(result[1:], alone)


def test_invokes_each_with_its_own_encoder(name, net, model, v):
    """The second decoder gets what the first prompt's encoder gives."""
    enc = f"{ENCODER[name]}.1.output"
    taken = hidden(generated(net, IDS, {enc: None}, **GREEDY)[enc, 0])[:, :4]

    def put(step, value):
        hidden(value)[:] = taken

    expected = generated(net, SHORT, {enc: put}, **GREEDY).result
    with model.generate(**GREEDY) as tracer:
        with tracer.invoke(IDS):
            h = hidden(model.get(f"{ENCODER[name]}.1").output)[:, :4]
            one = tracer.result.save()
        with tracer.invoke(SHORT):
            for _ in tracer.iter[0]:
                hidden(model.get(f"{ENCODER[name]}.1").output)[:] = h
            two = tracer.result.save()
        plan = tracer.plan()
    bitwise([one, two], [generated(net, IDS, {}, **GREEDY).result, expected])
    assert "0 alone; 1 alone" in str(plan)


def test_an_answer_that_has_begun(name, net, model):
    start = net.generation_config.decoder_start_token_id
    answer = torch.tensor([[start, 9, 11]])
    expected = net.generate(IDS, decoder_input_ids=answer, **GREEDY)
    with model.generate(IDS, decoder_input_ids=answer, **GREEDY) as tracer:
        h = hidden(model.get(f"{DECODER[name]}.0").output).save()
        ids = tracer.result.save()
    bitwise(ids, expected)
    assert h.shape == (1, 3, 32) and ids.shape == (1, 3 + NEW)


def test_sampling_stops_and_ends(name, net, model):
    options = {"do_sample": True, "seed": 4, "temperature": 1.3, "max_new_tokens": NEW}
    found = []
    for _ in range(2):
        with model.generate(IDS, **options) as tracer:
            found.append(tracer.result.save())
    bitwise(found[0], found[1])
    end = int(generated(net, IDS, {}, **GREEDY).result[0, 2])
    expected = generated(net, IDS, {}, **GREEDY, eos_token_id=end, pad_token_id=1).result
    with model.generate(IDS, **GREEDY, eos_token_id=end, pad_token_id=1) as tracer:
        seen = weft.save([])
        for _ in tracer.all():
            seen.append(hidden(model.get(f"{DECODER[name]}.0").output))
        ids = tracer.result.save()
    bitwise(ids, expected)
    assert len(seen) == ids.shape[1] - 1
    with model.generate(IDS, **GREEDY) as tracer:
        for step in tracer.iter[:]:
            if step == 1:
                tracer.stop_if(model.output.logits.norm() > 0)
        ids = tracer.result.save()
    assert ids.shape[1] == 1 + 1


def test_a_trace_is_the_forward_of_step_0(name, net, model):
    with torch.no_grad():
        start = torch.tensor([[net.generation_config.decoder_start_token_id]])
        expected = net(IDS, decoder_input_ids=start, use_cache=False).logits
        more = net(IDS, decoder_input_ids=torch.tensor([[0, 5]]), use_cache=False).logits
    with model.trace(IDS):
        logits = model.output.logits.save()
    with model.trace(IDS, decoder_input_ids=[0, 5]):
        longer = model.output.logits.save()
    bitwise([logits, longer], [expected, more])


def test_what_does_not_fit_is_refused(name, model):
    cases = [
        ({"decoder_input_ids": [[1.5]]}, "token ids"),
        ({"decoder_input_ids": [[1], [2]]}, "2 rows"),
        ({"decoder_input_ids": [[1, 10**6]]}, "outside the vocabulary"),
        ({"position_ids": torch.arange(7)}, "take no position_ids"),
    ]
    for options, text in cases:
        with pytest.raises(InputError, match=text):
            model.generate(IDS, **GREEDY, **options)
    with (
        pytest.raises(InputError, match="not from embeddings"),
        model.generate(inputs_embeds=torch.zeros(1, 3, 32), **GREEDY) as tracer,
    ):
        tracer.result.save()


def test_left_padding(name, net, model):
    ids = torch.cat([IDS, torch.cat([torch.full((1, 3), 1), SHORT], 1)])
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    if name == "bart":
        with pytest.raises(InputError, match="padded on the left"):
            model.generate(ids, attention_mask=mask, **GREEDY)
        return
    with model.generate(ids, attention_mask=mask, **GREEDY) as tracer:
        result = tracer.result.save()
    bitwise(result[1:], generated(net, SHORT, {}, **GREEDY).result)


def test_an_empty_invoke_is_refused(model):
    with pytest.raises(InputError, match="whole batch"), model.generate(**GREEDY) as tracer:
        with tracer.invoke(IDS):
            pass
        with tracer.invoke():
            tracer.result.save()


def test_one_without_an_encoder_takes_no_answer(gpt2):
    with pytest.raises(InputError, match="take no decoder_input_ids"):
        gpt2.model.generate(IDS, decoder_input_ids=[1], **GREEDY)


def test_an_experiment_of_both_halves_runs_again_on_another_prompt(name, model, net, tmp_path):
    v = torch.linspace(-40, 40, 32)
    with model.generate(IDS, **GREEDY) as tracer:
        hidden(model.get(f"{DECODER[name]}.1").output)[:, -1] += v
        tracer.result.save("ids")
    tracer.graph.save(tmp_path / "kept.weft")
    experiment = weft.Experiment.load(tmp_path / "kept.weft")
    hooks = {f"{DECODER[name]}.1.output": adding(v, None)}
    for ids in (IDS, SHORT):
        expected = generated(net, ids, hooks, **ORACLE).result
        bitwise(experiment.run(model, ids)["ids"], expected)
    moves(expected.float(), generated(net, SHORT, {}, **ORACLE).result.float())
