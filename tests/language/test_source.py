"""`module.source`: operations inside a forward are sites.

The oracle is transformers itself (`output_attentions` with eager attention), and the bare model in
which a function that a forward calls was replaced by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.families import zoo
from tests.language import sources
from tests.language.hooks import hook_count
from tests.language.sources import (
    ATTENTION,
    IDS,
    attention_of,
    eager,
    logits_of,
    no_first,
    patched,
    patterns,
)
from weft.errors import (
    LateEditError,
    NotReachedError,
)
from weft.testing.same import bitwise, bounded, moves


@pytest.fixture
def opened(place):
    """Gives a handle on a model, in the place where this test runs."""
    return lambda net: sources.opened(place, net)


@pytest.fixture
def gpt2():
    return eager("gpt2")


@pytest.fixture(params=list(ATTENTION))
def family(request):
    return request.param


@pytest.fixture
def net(family):
    """A model with eager attention, whose hooks and logits are afterwards what they were."""
    net = eager(family)
    patterns(net)  # transformers adds hooks of its own, which stay
    before, hooks = logits_of(net), hook_count(net)
    yield net
    assert hook_count(net) == hooks
    assert not any("forward" in vars(module) for module in net.modules())
    bitwise(logits_of(net), before)


# -- reading ---------------------------------------------------------------------------------------


def test_patterns_are_read(net, family, opened):
    model = opened(net)
    with model.trace(IDS):
        weights = attention_of(model, family).output[1].save()
        soft = attention_of(model, family).source.softmax_0.output.save()
        logits = model.output.logits.save()
    bitwise(weights, patterns(net)[1])
    bitwise(soft, patterns(net)[1])
    bitwise(logits, logits_of(net))


def test_all_layers_in_one_block(net, family, opened):
    model = opened(net)
    with model.trace(IDS):
        seen = [attention_of(model, family, n).output[1].save() for n in range(zoo.LAYERS)]
    for one, expected in zip(seen, patterns(net), strict=True):
        bitwise(one, expected)


@pytest.mark.parametrize("length", [3, 12, 17])
def test_at_other_lengths(gpt2, length, opened):
    model = opened(gpt2)
    ids = torch.tensor(zoo.tokens(length, seed=2))
    with model.trace(ids):
        soft = attention_of(model, "gpt2").source.softmax_0.output.save()
    with torch.no_grad():
        bitwise(soft, gpt2(ids, output_attentions=True).attentions[1])


def test_inputs_of_an_operation(gpt2, opened):
    model = opened(gpt2)
    with model.trace(IDS):
        call = attention_of(model, "gpt2")
        query = call.input.save()
        args, kwargs = call.inputs
        key, scaling = args[2].save(), kwargs["scaling"]
    kept = []
    block = gpt2.transformer.h[1].attn
    handle = block.c_attn.register_forward_hook(lambda m, a, out: kept.append(out))
    logits_of(gpt2)
    handle.remove()
    q, k, _ = kept[0].split(32, dim=2)
    bitwise(query, q.view(1, 9, 4, 8).transpose(1, 2))
    bitwise(key, k.view(1, 9, 4, 8).transpose(1, 2))
    assert scaling == block.scaling


def test_sdpa_has_a_source_too(subjects):
    subject = subjects("llama")
    attention = subject.model.model.layers[1].self_attn.source.attention_interface_0
    with subject.model.trace(subject.ids):
        inner = attention.source.scaled_dot_product_attention_0
        query, mixed = inner.input.save(), inner.output.save()
        given = attention.output[0].save()
    assert "def sdpa_attention_forward" in attention.source.text
    assert query.shape == mixed.shape
    bitwise(mixed.transpose(1, 2), given)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt", "llama", "qwen3", "gemma2", "mixtral"])
def test_every_operation_can_be_read(subjects, name):
    """Of a whole layer; what it gives is what the module or function gives to a hook."""
    subject = subjects(name)
    layer = subject.layer_list[1]
    with subject.model.trace(subject.ids):
        whole = layer.output.save()
        inside = {}
        for operation in layer.source:
            try:
                got: Any = layer.source[operation].output
            except NotReachedError:
                continue
            if isinstance(got, torch.Tensor):
                inside[operation] = got.save()
    assert inside
    with torch.no_grad():
        kept = {}
        real = subject.net.get_submodule(subject.paths.layer(1))
        for child, module in real.named_children():
            keep = lambda m, a, out, child=child: kept.setdefault(child, out)
            handle = module.register_forward_hook(keep)
            kept_handle = handle
            subject.net(subject.ids)
            kept_handle.remove()
    compared = 0
    for child, value in kept.items():
        got = inside.get(f"self_{child}_0")
        if got is not None and isinstance(value, torch.Tensor):
            bitwise(got, value)
            compared += 1
    assert compared
    assert whole.shape == (1, 9, 32)


def test_bfloat16(subjects):
    subject = subjects("llama", torch.bfloat16)
    layer = subject.layer_list[2]
    with subject.model.trace(subject.ids):
        mine = layer.mlp.source.self_down_proj_0.output.save()
        theirs = layer.mlp.down_proj.output.save()
    bitwise(mine, theirs)


# -- editing ---------------------------------------------------------------------------------------
def test_a_pattern_is_filled(net, family, opened):
    model = opened(net)
    with model.trace(IDS):
        attention_of(model, family).source.softmax_0.output[:, 0] = 0
        got = model.output.logits.save()
    with patched(net, 1, no_first):
        expected = logits_of(net)
    bitwise(got, expected)
    moves(got, logits_of(net))


def test_a_pattern_is_written(net, family, opened):
    model = opened(net)
    with model.trace(IDS):
        soft = attention_of(model, family).source.softmax_0
        soft.output = soft.output * 0.5
        got = model.output.logits.save()
    with patched(net, 1, lambda pattern: pattern * 0.5):
        bitwise(got, logits_of(net))


def test_one_leaf_of_what_is_given_is_written(gpt2, opened):
    model = opened(gpt2)
    with model.trace(IDS):
        attention_of(model, "gpt2").output[0][:, :, 2] = 0
        got = model.output.logits.save()
        head = model.transformer.h[1].attn.c_proj.input[..., 16:24].save()
    assert head.abs().max() == 0
    moves(got, logits_of(gpt2))


def test_an_argument_is_written(gpt2, opened):
    """`nn.functional.softmax` of layer 1 gets zeros: every position sees all alike."""
    model = opened(gpt2)
    with model.trace(IDS):
        soft = attention_of(model, "gpt2").source.softmax_0
        soft.input = torch.zeros_like(soft.input)
        pattern = soft.output.save()
    bounded(pattern, torch.full((1, 4, 9, 9), 1 / 9))


def test_patched_with_its_own_is_bitwise(gpt2, opened):
    model = opened(gpt2)
    with model.trace(IDS):
        kept = attention_of(model, "gpt2").source.softmax_0.output.save()
    with model.trace(IDS):
        attention_of(model, "gpt2").source.softmax_0.output = kept
        got = model.output.logits.save()
    bitwise(got, logits_of(gpt2))


def test_another_layers_pattern(gpt2, opened):
    model = opened(gpt2)
    first = patterns(gpt2)[0]
    with model.trace(IDS):
        early = attention_of(model, "gpt2", 0).source.softmax_0.output
        attention_of(model, "gpt2", 2).source.softmax_0.output = early
        got = model.output.logits.save()
    with patched(gpt2, 2, lambda pattern: first):
        bitwise(got, logits_of(gpt2))


# -- order -----------------------------------------------------------------------------------------


def test_a_late_edit_is_refused(gpt2, opened):
    model = opened(gpt2)
    with pytest.raises(LateEditError, match="only later") as caught, model.trace(IDS):
        late = attention_of(model, "gpt2", 2).source.softmax_0.output
        attention_of(model, "gpt2", 1).source.softmax_0.output = late
    assert "softmax_0.output = late" in str(caught.value)


def test_order_inside_one_function(gpt2, opened):
    model = opened(gpt2)
    inside = lambda: attention_of(model, "gpt2").source
    with pytest.raises(LateEditError), model.trace(IDS):
        inside().torch_matmul_0.output = inside().softmax_0.output
    with model.trace(IDS):
        inside().softmax_0.output = inside().torch_matmul_0.output  # the other way round
        model.output.logits.save()


def test_order_between_operations_and_modules(gpt2, opened):
    """An operation inside a layer fires after the layer's begin and before its end."""
    model = opened(gpt2)
    layer = model.transformer.h[1]
    with model.trace(IDS):
        layer.attn.source.contiguous_0.output[:] = layer.attn.c_attn.output[..., :32]
        layer.attn.c_proj.input *= 2
        got = layer.attn.c_proj.input.save()
        twice = (layer.attn.c_attn.output[..., :32] * 2).save()
    bitwise(got, twice)
    with pytest.raises(LateEditError), model.trace(IDS):
        layer.attn.source.contiguous_0.output[:] = layer.output
    with pytest.raises(LateEditError), model.trace(IDS):
        layer.attn.c_attn.output[..., :32] = layer.attn.source.contiguous_0.output


def test_the_pass_stops_after_the_last_operation(gpt2, opened):
    model = opened(gpt2)
    with model.trace(IDS) as tracer:
        attention_of(model, "gpt2", 0).source.softmax_0.output.save()
    assert str(tracer.ended) == (
        "transformer.h.0.attn.source.attention_interface_0.source.nn_functional_softmax_0.output"
    )


def test_a_look_runs_as_far_as_an_operation(gpt2, opened):
    model = opened(gpt2)
    with model.trace(IDS):
        pattern = attention_of(model, "gpt2").source.softmax_0.output
        if pattern[0, 0, 0, 0] == 1:
            pattern[:, 1] = 0
        got = model.output.logits.save()
    moves(got, logits_of(gpt2))
