"""`Model` and `LanguageModel` on architectures that are no text decoders: BERT, T5, ViT, Mamba.

The oracle is hooks by hand and autograd on the bare module.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
import transformers

import weft
from tests.families import zoo
from tests.language.autograd import gradients
from tests.language.hooks import with_hooks
from weft.errors import NotReachedError
from weft.testing.same import bitwise, bounded, moves

IDS = torch.tensor(zoo.tokens(7, seed=1))
MORE = torch.tensor(zoo.tokens(7, seed=2))
ANSWER = torch.tensor(zoo.tokens(4, seed=3))
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


@cache
def bert():
    config = transformers.BertConfig(vocab_size=zoo.VOCAB, **SPECIAL, **SMALL)
    return prepared(transformers.BertForMaskedLM(config))


@cache
def t5():
    config = transformers.T5Config(
        vocab_size=zoo.VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0, **SPECIAL,
    )  # fmt: skip
    return prepared(transformers.T5ForConditionalGeneration(config))


@cache
def vit():
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_channels=3, **SMALL)
    return prepared(transformers.ViTForImageClassification(config))


@cache
def mamba():
    config = transformers.MambaConfig(
        vocab_size=zoo.VOCAB, hidden_size=32, num_hidden_layers=3, state_size=8, time_step_rank=4,
        **SPECIAL,
    )  # fmt: skip
    return prepared(transformers.MambaForCausalLM(config))


def prepared(net):
    zoo.randomize(net, seed=0)
    return net.eval()


def zeroed(output):
    output[:, 2] = 0


def tripled(output):
    hidden = output[0] if isinstance(output, tuple) else output
    hidden[:, 1] *= 3


# -- BERT ------------------------------------------------------------------------------------------


def test_bert_is_read_and_edited():
    net = bert()
    model = weft.LanguageModel(net)
    with model.trace(IDS):
        before = model.bert.encoder.layer[0].output.save()
        model.bert.encoder.layer[1].attention.self.query.output[:, 2] = 0
        out = model.output.logits.save()
    hooks = {
        "bert.encoder.layer.0.output": None,
        "bert.encoder.layer.1.attention.self.query.output": zeroed,
    }
    seen = with_hooks(net, hooks, IDS)
    bitwise([before, out], [seen["bert.encoder.layer.0.output"], seen.result.logits])


def test_bert_pads_on_the_left_and_each_row_is_as_alone():
    net = bert()
    model = weft.LanguageModel(net)
    rows = zoo.tokens(12, 7, 3)
    with model.trace(rows) as tracer:
        layer = model.bert.encoder.layer[2].output.save()
        out = model.output.logits.save()
        lengths = tracer.lengths
    assert lengths == (12, 7, 3)
    for number, row in enumerate(rows):
        seen = with_hooks(net, {"bert.encoder.layer.2.output": None}, torch.tensor([row]))
        alone = [seen["bert.encoder.layer.2.output"], seen.result.logits]
        bounded([part[number : number + 1, -len(row) :] for part in (layer, out)], alone)


def test_invokes_of_bert_never_share_a_pass_in_which_tokens_would_see_padding():
    net = bert()
    model = weft.LanguageModel(net)
    prompts = [torch.tensor([row]) for row in zoo.tokens(9, 4)]
    with model.trace() as tracer:
        out = []
        for ids in prompts:
            with tracer.invoke(ids):
                out.append(model.output.logits.save())
    with torch.no_grad():
        bitwise(out, [net(ids).logits for ids in prompts])


# -- T5 --------------------------------------------------------------------------------------------


def test_t5_is_read_and_edited_in_both_its_halves():
    net = t5()
    model = weft.Model(net)
    with model.trace(input_ids=IDS, decoder_input_ids=ANSWER):
        model.encoder.block[0].output[0][:, 1] *= 3
        encoded = model.encoder.output.last_hidden_state.save()
        model.decoder.block[1].layer[1].EncDecAttention.q.output[:, 2] = 0
        out = model.output.logits.save()
    hooks = {
        "encoder.block.0.output": tripled,
        "encoder.output": None,
        "decoder.block.1.layer.1.EncDecAttention.q.output": zeroed,
    }
    seen = with_hooks(net, hooks, input_ids=IDS, decoder_input_ids=ANSWER)
    bitwise([encoded, out], [seen["encoder.output"].last_hidden_state, seen.result.logits])
    plain = with_hooks(net, {}, input_ids=IDS, decoder_input_ids=ANSWER).result.logits
    moves(out, plain)


def test_each_half_of_t5_has_an_embedding_and_the_shared_one_is_never_called():
    net = t5()
    model = weft.Model(net)
    with model.trace(input_ids=IDS, decoder_input_ids=ANSWER):
        model.decoder.embed_tokens.output[:, 1] *= 3
        out = model.output.logits.save()
        weight = model.shared.weight.save()
        with pytest.raises(NotReachedError, match="never called"):
            model.shared.output
    hooks = {"decoder.embed_tokens.output": tripled}
    seen = with_hooks(net, hooks, input_ids=IDS, decoder_input_ids=ANSWER)
    bitwise([out, weight], [seen.result.logits, net.shared.weight.detach()])


def test_a_value_of_one_sentence_goes_into_the_encoder_of_another():
    net = t5()
    model = weft.Model(net)
    with model.trace() as tracer:
        with tracer.invoke(input_ids=IDS, decoder_input_ids=ANSWER):
            taken = model.encoder.block[1].output[0][:, 3]
        with tracer.invoke(input_ids=MORE, decoder_input_ids=ANSWER):
            model.encoder.block[1].output[0][:, 3] = taken
            out = model.output.logits.save()
    taken = with_hooks(net, {"encoder.block.1.output": None}, input_ids=IDS,
                       decoder_input_ids=ANSWER)["encoder.block.1.output"][0][:, 3]  # fmt: skip

    def put(output):
        output[0][:, 3] = taken

    expected = with_hooks(
        net, {"encoder.block.1.output": put}, input_ids=MORE, decoder_input_ids=ANSWER
    )
    bitwise(out, expected.result.logits)


def test_gradients_reach_the_encoder_through_the_decoder():
    net = t5()
    model = weft.Model(net)
    with model.trace(input_ids=IDS, decoder_input_ids=ANSWER):
        model.output.logits[0, -1].logsumexp(-1).backward()
        got = model.encoder.block[0].output[0].grad.save()
    key = "encoder.block.0.output"
    loss = lambda out: out.logits[0, -1].logsumexp(-1)
    expected = gradients(net, [key], loss, input_ids=IDS, decoder_input_ids=ANSWER)
    bounded(got, expected[key])


def test_an_encoder_with_a_decoder_is_a_language_model_too():
    net = t5()
    model = weft.LanguageModel(net)
    with model.trace(IDS, decoder_input_ids=ANSWER):
        model.encoder.block[0].output[0][:, 1] *= 3
        out = model.output.logits.save()
    hooks = {"encoder.block.0.output": tripled}
    seen = with_hooks(net, hooks, input_ids=IDS, decoder_input_ids=ANSWER)
    bitwise(out, seen.result.logits)


# -- ViT -------------------------------------------------------------------------------------------


@pytest.fixture
def image():
    return torch.randn(2, 3, 16, 16)


def test_a_vision_transformer_is_read_and_edited(image):
    net = vit()
    path = next(name for name, part in net.named_modules() if isinstance(part, torch.nn.ModuleList))
    model = weft.Model(net)
    with model.trace(pixel_values=image):
        first = model.get(path)[0].output.save()
        model.get(path)[1].output[:, 2] = 0
        out = model.output.logits.save()
    hooks = {f"{path}.0.output": None, f"{path}.1.output": zeroed}
    seen = with_hooks(net, hooks, pixel_values=image)
    bitwise([first, out], [seen[f"{path}.0.output"], seen.result.logits])
    moves(out, with_hooks(net, {}, pixel_values=image).result.logits)


def test_images_in_invokes_and_all_of_them_together(image):
    net = vit()
    model = weft.Model(net, batch_dim=0)
    with model.trace() as tracer:
        outs = []
        for one in image.split(1):
            with tracer.invoke(pixel_values=one):
                outs.append(model.output.logits.save())
        with tracer.invoke():
            whole = model.output.logits.save()
    with torch.no_grad():
        bitwise(outs, [net(pixel_values=one).logits for one in image.split(1)])
        bitwise(whole, net(pixel_values=image).logits)


# -- Mamba -----------------------------------------------------------------------------------------


def test_mamba_is_read_edited_and_differentiated():
    net = mamba()
    model = weft.LanguageModel(net)
    with model.trace(IDS):
        model.backbone.layers[0].mixer.in_proj.output[:, 2] = 0
        inner = model.backbone.layers[1].mixer.output.save()
        out = model.output.logits
        out[0, -1].logsumexp(-1).backward()
        got = model.backbone.layers[1].output.grad.save()
        out.save()
    hooks = {
        "backbone.layers.0.mixer.in_proj.output": zeroed,
        "backbone.layers.1.mixer.output": None,
    }
    seen = with_hooks(net, hooks, IDS)
    bounded([inner, out], [seen["backbone.layers.1.mixer.output"], seen.result.logits])
    key = "backbone.layers.1.output"
    change = {"backbone.layers.0.mixer.in_proj.output": zeroed_copy}
    loss = lambda result: result.logits[0, -1].logsumexp(-1)
    bounded(got, gradients(net, [key], loss, IDS, change=change)[key])


def zeroed_copy(output):
    changed = output.clone()
    changed[:, 2] = 0
    return changed


def test_rows_of_mamba_are_as_alone_under_padding():
    net = mamba()
    model = weft.LanguageModel(net)
    rows = zoo.tokens(12, 7, 3)
    with model.trace(rows):
        states = model.backbone.layers[2].output.save()
    for number, row in enumerate(rows):
        key = "backbone.layers.2.output"
        alone = with_hooks(net, {key: None}, torch.tensor([row]))[key]
        bounded(states[number : number + 1, -len(row) :], alone)


def test_a_half_that_does_not_run_says_so():
    model = weft.Model(t5())
    encoded = t5().encoder(IDS)
    with (
        pytest.raises(NotReachedError, match="never called"),
        model.trace(
            encoder_outputs=(encoded.last_hidden_state.detach(),), decoder_input_ids=ANSWER
        ),
    ):
        model.encoder.block[0].output.save()
