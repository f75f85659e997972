"""Operations at the steps of a generation, where one place is enough: other models, other ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import weft
from tests.families import decoded, zoo
from tests.language.generated import generated
from tests.language.sources import (
    GREEDY,
    IDS,
    SHORT,
    attention_of,
    by_hand,
    eager,
    no_head,
    own,
)
from tests.language.test_generate_source_runs import both_halves, eager_encoded
from weft.errors import NotReachedError
from weft.testing.same import bitwise


@pytest.fixture
def gpt2():
    return eager("gpt2")


def test_a_step_has_operations_of_its_own():
    """Mamba runs one token by another function than a prompt."""
    net = decoded.build("mamba")
    model = weft.LanguageModel(net)
    mixer = model.backbone.layers[1].mixer
    names = [n for n in mixer.source.names if "conv1d" in n]
    with model.generate(IDS, **GREEDY) as tracer:
        runs = {step: [n for n in names if len(mixer.source[n].calls)] for step in tracer.iter[:2]}
        tracer.result.save()
    assert runs[0] != runs[1] and runs[0] and runs[1]
    missing = next(name for name in runs[1] if name not in runs[0])
    with pytest.raises(NotReachedError, match="never called"), model.generate(IDS, **GREEDY):
        mixer.source[missing].output.save()


def test_a_state_that_later_steps_change_is_kept_as_it_was():
    """Mamba's cache is changed in place: within a step, and from step to step."""
    net: Any = decoded.build("mamba")
    model = weft.LanguageModel(net)
    source = model.backbone.layers[1].mixer.source
    with model.generate(IDS, **GREEDY) as tracer:
        first = source.cache_params_update_recurrent_state_0.output
        states = weft.save([])
        for _ in tracer.iter[1:]:
            states.append(source.cache_params_get_conv_state_0.output)
        with tracer.iter[2]:
            late = (first + 0 * model.lm_head.output.sum()).save()  # not before this step
        ids = tracer.result.save()
    mixer, before, after = net.backbone.layers[1].mixer, [], []

    def enter(module, args, options):
        layer = options["cache_params"].layers[1]
        if layer.conv_states.get(0) is not None:
            before.append(layer.conv_states[0].clone())

    def leave(module, args, options, output):
        after.append(options["cache_params"].layers[1].recurrent_states[0].clone())

    handles = [
        mixer.register_forward_pre_hook(enter, with_kwargs=True),
        mixer.register_forward_hook(leave, with_kwargs=True),
    ]
    try:
        expected = generated(net, IDS, {}, **GREEDY)
    finally:
        for handle in handles:
            handle.remove()
    bitwise(ids, expected.result)
    bitwise(late, after[0])
    bitwise(list(states), before)
    assert not torch.equal(states[0], states[1]) and not torch.equal(after[0], after[1])


def test_who_shares_steps(gpt2):
    model = weft.LanguageModel(gpt2)
    with model.generate(**GREEDY) as tracer:
        with tracer.invoke(IDS):
            attention_of(model, "gpt2").source.softmax_0.output[:, 0] = 0
            tracer.result.save()
        for ids in (SHORT, IDS):
            with tracer.invoke(ids):
                tracer.result.save()
        plan = str(tracer.plan())
    assert "0 alone; 1 and 2 share steps" in plan


@pytest.mark.parametrize("options", [{"eager": True}, {"remote": "local"}], ids=["eager", "local"])
def test_the_same_numbers(gpt2, options):
    model = weft.LanguageModel(gpt2)
    with model.generate(IDS, **GREEDY, **options) as tracer:
        soft = attention_of(model, "gpt2").source.softmax_0
        soft.output[:, 0] = 0
        if options == {"eager": True}:
            assert "tensor([0., 0., 0." in str(soft.output[0, 0, 1])
        with tracer.iter[2]:
            pattern = attention_of(model, "gpt2", 2).output[1].save()
        ids = tracer.result.save()
    with by_hand(gpt2, no_head):
        expected = own(gpt2)
    bitwise(ids, expected.sequences)
    bitwise(pattern, expected.attentions[2][2])


def test_another_encoder_and_decoder():
    model = weft.LanguageModel(eager_encoded("bart"))
    both_halves("bart", model, "model.encoder.layers.1.self_attn")


def test_steps_whose_modules_look_alike(monkeypatch):
    """With `sdpa` no module shows how long the cache is, operations do."""
    net, seen = zoo.build("llama"), []
    model = weft.LanguageModel(net)
    attention = model.model.layers[1].self_attn.source.attention_interface_0
    with model.generate(IDS, **GREEDY) as tracer:
        keys = weft.save([])
        for _ in tracer.iter[:]:
            keys.append(attention.source.scaled_dot_product_attention_0.inputs[0][1])
        model.model.layers[1].mlp.output[:] *= 0.5  # at steps that are one loop
        tracer.result.save()
    real = torch.nn.functional.scaled_dot_product_attention

    def kept(query, key, *args, **options):
        seen.append(key.clone())
        return real(query, key, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kept)
    generated(net, IDS, {"model.layers.1.mlp.output": lambda step, h: h * 0.5}, **GREEDY)
    bitwise(list(keys), seen[1 :: zoo.LAYERS])


def test_a_sliding_window():
    """Patterns grow up to its 6 positions, and no further."""
    net = eager("mistral")
    model = weft.LanguageModel(net)
    with model.generate(SHORT[:, :3], **{**GREEDY, "max_new_tokens": 6}) as tracer:
        patterns = weft.save([])
        for _ in tracer.iter[:]:
            patterns.append(attention_of(model, "llama").output[1])
        ids = tracer.result.save()
    expected = own(net, SHORT[:, :3], max_new_tokens=6)
    bitwise(ids, expected.sequences)
    bitwise(list(patterns), [step[1] for step in expected.attentions])
    assert [one.shape[-1] for one in patterns] == [3, 4, 5, 6, 6, 6]


def test_run_again_on_an_edited_model(gpt2):
    """An edit of an operation acts at every step of what was recorded without it."""
    model = weft.LanguageModel(gpt2)
    with model.generate(IDS, **GREEDY) as tracer:
        tracer.result.save("ids")
    with model.edit() as edited:
        attention_of(model, "gpt2").source.softmax_0.output[:, 0] = 0
    ids = tracer.graph.run(edited, IDS)["ids"]
    with by_hand(gpt2, no_head):
        bitwise(ids, own(gpt2).sequences)
