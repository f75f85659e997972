"""`module.source`: operations inside a forward are sites.

The oracle is transformers itself (`output_attentions` with eager attention), and the bare model in
which a function that a forward calls was replaced by hand.
"""

from __future__ import annotations

import importlib
from functools import cache

import pytest
import torch
from torch import nn

import weft
from tests.families import zoo
from tests.language.hooks import hook_count
from weft.errors import (
    LateEditError,
    NotReachedError,
    OutsideTraceError,
    RecordingError,
    SourceError,
    UnknownPathError,
    WriteMismatchError,
)
from weft.testing.same import bitwise, bounded, moves

ATTENTION = {
    "gpt2": "transformer.h.{}.attn",
    "llama": "model.layers.{}.self_attn",
    "qwen3": "model.layers.{}.self_attn",
    "gemma2": "model.layers.{}.self_attn",
    "gpt_neox": "gpt_neox.layers.{}.attention",
    "mixtral": "model.layers.{}.self_attn",
    "opt": "model.decoder.layers.{}.self_attn",
}
IDS = torch.tensor(zoo.tokens(9, seed=1))


@cache
def eager(name):
    net = zoo.build(name)
    net.set_attn_implementation("eager")
    return net


_PLACE: list = []
_OPENED: dict = {}


@pytest.fixture(autouse=True)
def _place_of_models(place):
    _PLACE[:] = [place]


def opened(net):
    """A handle on a model, in the place where this test runs."""
    key = str(_PLACE[0]), id(net)
    if key not in _OPENED:
        _OPENED[key] = _PLACE[0].language(net)
    return _OPENED[key]


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


@pytest.fixture
def gpt2(request):
    return eager("gpt2")


def logits_of(net, ids=IDS):
    with torch.no_grad():
        return net(ids).logits


def patterns(net):
    with torch.no_grad():
        return net(IDS, output_attentions=True).attentions


class patched:
    """`net` in which the softmax of layer `number` is followed by `change`, by hand."""

    def __init__(self, net, number, change):
        self._home = importlib.import_module(type(net).__module__)
        self._net, self._number, self._change = net, number, change

    def __enter__(self):
        self._real = self._home.nn
        self._seen = 0
        self._home.nn = self._Stand(self)
        return self._net

    def __exit__(self, *error):
        self._home.nn = self._real

    class _Stand:
        """`torch.nn`, but for one function."""

        def __init__(self, patch):
            self._patch = patch
            self.functional = self

        def softmax(self, x, **options):
            patch = self._patch
            made = patch._real.functional.softmax(x, **options)
            patch._seen += 1
            return patch._change(made) if patch._seen == patch._number + 1 else made

        def __getattr__(self, name):
            real = self._patch._real
            return getattr(real.functional, name, None) or getattr(real, name)


def attention_of(model, family, number=1):
    return model.get(ATTENTION[family].format(number)).source.attention_interface_0


# -- reading ---------------------------------------------------------------------------------------


def test_patterns_are_read(net, family):
    model = opened(net)
    with model.trace(IDS):
        weights = attention_of(model, family).output[1].save()
        soft = attention_of(model, family).source.softmax_0.output.save()
        logits = model.output.logits.save()
    bitwise(weights, patterns(net)[1])
    bitwise(soft, patterns(net)[1])
    bitwise(logits, logits_of(net))


def test_all_layers_in_one_block(net, family):
    model = opened(net)
    with model.trace(IDS):
        seen = [attention_of(model, family, n).output[1].save() for n in range(zoo.LAYERS)]
    for one, expected in zip(seen, patterns(net), strict=True):
        bitwise(one, expected)


@pytest.mark.parametrize("length", [3, 12, 17])
def test_at_other_lengths(gpt2, length):
    model = opened(gpt2)
    ids = torch.tensor(zoo.tokens(length, seed=2))
    with model.trace(ids):
        soft = attention_of(model, "gpt2").source.softmax_0.output.save()
    with torch.no_grad():
        bitwise(soft, gpt2(ids, output_attentions=True).attentions[1])


def test_inputs_of_an_operation(gpt2):
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
                got = layer.source[operation].output
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


def no_first(pattern):
    pattern = pattern.clone()
    pattern[:, 0] = 0
    return pattern


def test_a_pattern_is_filled(net, family):
    model = opened(net)
    with model.trace(IDS):
        attention_of(model, family).source.softmax_0.output[:, 0] = 0
        got = model.output.logits.save()
    with patched(net, 1, no_first):
        expected = logits_of(net)
    bitwise(got, expected)
    moves(got, logits_of(net))


def test_a_pattern_is_written(net, family):
    model = opened(net)
    with model.trace(IDS):
        soft = attention_of(model, family).source.softmax_0
        soft.output = soft.output * 0.5
        got = model.output.logits.save()
    with patched(net, 1, lambda pattern: pattern * 0.5):
        bitwise(got, logits_of(net))


def test_one_leaf_of_what_is_given_is_written(gpt2):
    model = opened(gpt2)
    with model.trace(IDS):
        attention_of(model, "gpt2").output[0][:, :, 2] = 0
        got = model.output.logits.save()
        head = model.transformer.h[1].attn.c_proj.input[..., 16:24].save()
    assert head.abs().max() == 0
    moves(got, logits_of(gpt2))


def test_an_argument_is_written(gpt2):
    """`nn.functional.softmax` of layer 1 gets zeros: every position sees all alike."""
    model = opened(gpt2)
    with model.trace(IDS):
        soft = attention_of(model, "gpt2").source.softmax_0
        soft.input = torch.zeros_like(soft.input)
        pattern = soft.output.save()
    bounded(pattern, torch.full((1, 4, 9, 9), 1 / 9))


def test_patched_with_its_own_is_bitwise(gpt2):
    model = opened(gpt2)
    with model.trace(IDS):
        kept = attention_of(model, "gpt2").source.softmax_0.output.save()
    with model.trace(IDS):
        attention_of(model, "gpt2").source.softmax_0.output = kept
        got = model.output.logits.save()
    bitwise(got, logits_of(gpt2))


def test_another_layers_pattern(gpt2):
    model = opened(gpt2)
    first = patterns(gpt2)[0]
    with model.trace(IDS):
        early = attention_of(model, "gpt2", 0).source.softmax_0.output
        attention_of(model, "gpt2", 2).source.softmax_0.output = early
        got = model.output.logits.save()
    with patched(gpt2, 2, lambda pattern: first):
        bitwise(got, logits_of(gpt2))


# -- order -----------------------------------------------------------------------------------------


def test_a_late_edit_is_refused(gpt2):
    model = opened(gpt2)
    with pytest.raises(LateEditError, match="only later") as caught, model.trace(IDS):
        late = attention_of(model, "gpt2", 2).source.softmax_0.output
        attention_of(model, "gpt2", 1).source.softmax_0.output = late
    assert "softmax_0.output = late" in str(caught.value)


def test_order_inside_one_function(gpt2):
    model = opened(gpt2)
    inside = lambda: attention_of(model, "gpt2").source
    with pytest.raises(LateEditError), model.trace(IDS):
        inside().torch_matmul_0.output = inside().softmax_0.output
    with model.trace(IDS):
        inside().softmax_0.output = inside().torch_matmul_0.output  # the other way round
        model.output.logits.save()


def test_order_between_operations_and_modules(gpt2):
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


def test_the_pass_stops_after_the_last_operation(gpt2):
    model = opened(gpt2)
    with model.trace(IDS) as tracer:
        attention_of(model, "gpt2", 0).source.softmax_0.output.save()
    assert str(tracer.ended) == (
        "transformer.h.0.attn.source.attention_interface_0.source.nn_functional_softmax_0.output"
    )


def test_a_look_runs_as_far_as_an_operation(gpt2):
    model = opened(gpt2)
    with model.trace(IDS):
        pattern = attention_of(model, "gpt2").source.softmax_0.output
        if pattern[0, 0, 0, 0] == 1:
            pattern[:, 1] = 0
        got = model.output.logits.save()
    moves(got, logits_of(gpt2))


# -- skips -----------------------------------------------------------------------------------------


def test_an_operation_is_skipped(gpt2):
    model = opened(gpt2)
    pattern = torch.rand(1, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    with model.trace(IDS):
        attention_of(model, "gpt2").source.softmax_0.skip(pattern)
        got = model.output.logits.save()
    with patched(gpt2, 1, lambda _: pattern):
        bitwise(got, logits_of(gpt2))


def test_a_skipped_operation_that_is_a_module(gpt2):
    model = opened(gpt2)
    layer = model.transformer.h[1]
    with model.trace(IDS):
        layer.mlp.source.self_act_0.skip(layer.mlp.c_fc.output * 2)
        got = layer.mlp.c_proj.input.save()
        given = (layer.mlp.c_fc.output * 2).save()
    bitwise(got, given)


def test_sites_inside_a_skipped_operation(gpt2):
    model = opened(gpt2)
    layer = model.transformer.h[1]
    with pytest.raises(NotReachedError, match="is skipped"), model.trace(IDS):
        layer.mlp.source.self_act_0.skip(layer.mlp.c_fc.output)
        layer.mlp.act.output.save()
    with pytest.raises(NotReachedError, match="is skipped"), model.trace(IDS):
        layer.mlp.skip(layer.mlp.input)
        layer.mlp.source.self_act_0.output.save()
    with pytest.raises(LateEditError, match="after it has begun"), model.trace(IDS):
        layer.mlp.source.self_act_0.skip(layer.mlp.source.self_c_proj_0.input)


def test_a_skip_needs_the_same_structure(gpt2):
    model = opened(gpt2)
    with pytest.raises(WriteMismatchError), model.trace(IDS):
        attention_of(model, "gpt2").source.softmax_0.skip(torch.zeros(1, 4, 9, 8))


# -- several runs ----------------------------------------------------------------------------------


class Twice(nn.Module):
    """One operation runs in a loop, and the module is called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        for k in range(3):
            x = torch.tanh(self.inner(x) + k)
        return x


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = Twice()

    def forward(self, x):
        return self.one(self.one(x))


def test_an_operation_in_a_loop_has_many_runs():
    net, x = Pair().eval(), torch.randn(2, 4)
    model = weft.Model(net)
    with model.trace(x):
        tanh = model.one.source.torch_tanh_0
        assert len(tanh.calls) == 6
        seen = [tanh.calls[k].output.save() for k in range(6)]
        tanh.calls[4].input += 1
        got = model.output.save()
    expected, by_hand = [], x
    with torch.no_grad():
        for k in range(6):
            by_hand = torch.tanh(net.one.inner(by_hand) + k % 3 + (k == 4))
            expected.append(by_hand)
    for one, two in zip(seen, expected, strict=True):
        bitwise(one, two)
    bitwise(got, expected[-1])


def test_which_run_must_be_said():
    model = weft.Model(Pair().eval())
    with (
        pytest.raises(RecordingError, match="called 6 times") as caught,
        model.trace(torch.ones(1, 4)),
    ):
        model.one.source.torch_tanh_0.output.save()
    assert ".calls[0].output to .calls[5].output" in str(caught.value)
    with pytest.raises(IndexError, match="runs 6 times"), model.trace(torch.ones(1, 4)):
        _ = model.one.source.torch_tanh_0.calls[6]


def test_runs_keep_their_numbers_where_a_call_is_skipped():
    net, x = Pair().eval(), torch.randn(2, 4)
    model = weft.Model(net)
    with model.trace(x):
        model.one.calls[0].skip(model.one.calls[0].input * 2)
        last = model.one.source.torch_tanh_0.calls[5].output.save()
        first = model.one.source.torch_tanh_0.calls[3].input.save()
    with torch.no_grad():
        bitwise(last, net.one(x * 2))
        bitwise(first, net.one.inner(x * 2))


# -- invokes ---------------------------------------------------------------------------------------


def test_each_invoke_has_operations_of_its_own(gpt2):
    model = opened(gpt2)
    a, b = [torch.tensor(zoo.tokens(n, seed=n)) for n in (6, 11)]
    with model.trace() as tracer:
        with tracer.invoke(a):
            mine = attention_of(model, "gpt2").source.softmax_0.output.save()
            left = model.output.logits.save()
        with tracer.invoke(b):
            attention_of(model, "gpt2").source.softmax_0.output[:, 0] = 0
            right = model.output.logits.save()
    with torch.no_grad():
        bitwise(mine, gpt2(a, output_attentions=True).attentions[1])
        bitwise(left, logits_of(gpt2, a))
    with patched(gpt2, 1, no_first):
        bitwise(right, logits_of(gpt2, b))


def test_a_pattern_of_another_invoke(gpt2):
    model = opened(gpt2)
    a, b = [torch.tensor(zoo.tokens(9, seed=n)) for n in (3, 4)]
    with torch.no_grad():
        pattern = gpt2(a, output_attentions=True).attentions[1]
    with model.trace() as tracer:
        with tracer.invoke(a):
            mine = attention_of(model, "gpt2").source.softmax_0.output
        with tracer.invoke(b):
            attention_of(model, "gpt2").source.softmax_0.output = mine
            got = model.output.logits.save()
    with patched(gpt2, 1, lambda _: pattern):
        bitwise(got, logits_of(gpt2, b))


# -- gradients -------------------------------------------------------------------------------------


def test_the_gradient_of_a_pattern(gpt2):
    model = opened(gpt2)
    with model.trace(IDS):
        pattern = attention_of(model, "gpt2").source.softmax_0.output
        model.output.logits[0, -1, 5].backward()
        got = pattern.grad.save()
    kept = []

    def keep(made):
        made.retain_grad()
        kept.append(made)
        return made

    with patched(gpt2, 1, keep):
        gpt2(IDS).logits[0, -1, 5].backward()
    bounded(got, kept[0].grad)
    for weight in gpt2.parameters():
        weight.grad = None


# -- what is shown, and what is refused ------------------------------------------------------------


def test_a_source_is_printed(gpt2):
    model = opened(gpt2)
    text = str(model.transformer.h[0].mlp.source)
    rows = [line.split("->") for line in text.splitlines() if "->" in line and "def" not in line]
    names = [row[0].strip() for row in rows]
    assert names == ["self_c_fc_0", "self_act_0", "self_c_proj_0", "self_dropout_0"]
    assert rows[0][1].split(maxsplit=1)[1] == "hidden_states = self.c_fc(hidden_states)"
    assert tuple(names) == model.transformer.h[0].mlp.source.names
    chained = str(model.transformer.h[0].attn.source)
    assert "split_1 ->" in chained
    assert "self_c_attn_1 ->    +" in chained
    shown = repr(model.transformer.h[0].mlp.source.self_act_0)
    assert "self_act_0 ->" in shown
    assert "self_c_proj_0" not in shown


def test_the_function_called_inside_is_printed(gpt2):
    model = opened(gpt2)
    with model.trace(IDS):
        source = attention_of(model, "gpt2").source
        attention_of(model, "gpt2").output[1].save()
    assert "def eager_attention_forward" in str(source)
    assert "nn_functional_softmax_0" in source.names


def test_outside_of_a_block(gpt2):
    model = opened(gpt2)
    operation = model.transformer.h[0].mlp.source.self_act_0
    with pytest.raises(OutsideTraceError, match=r"self_act_0\.output was used in no block"):
        _ = operation.output


def test_an_unknown_operation_names_the_nearest(gpt2):
    model = opened(gpt2)
    with pytest.raises(UnknownPathError, match="no operation 'self_c_porj_0'") as caught:
        _ = model.transformer.h[0].mlp.source.self_c_porj_0
    assert "self_c_proj_0" in caught.value.fix
    assert "test_source.py" in str(caught.value)


def test_an_end_that_several_have_is_refused(gpt2):
    model = opened(gpt2)
    with pytest.raises(UnknownPathError) as caught:
        _ = model.transformer.h[0].attn.source.view_0
    assert "key_states_view_0" in caught.value.fix


def test_an_operation_that_does_not_run(gpt2):
    model = opened(gpt2)
    with pytest.raises(NotReachedError, match="self_q_attn_0 is never called"), model.trace(IDS):
        model.transformer.h[0].attn.source.self_q_attn_0.output.save()


def test_what_has_no_source_says_why(gpt2):
    model = opened(gpt2)
    attention = model.transformer.h[0].attn.source
    with model.trace(IDS):
        with pytest.raises(SourceError, match="that module's own source"):
            _ = attention.self_c_proj_0.source
        with pytest.raises(SourceError, match="no function of Python"):
            _ = attention.contiguous_0.source
        with pytest.raises(SourceError, match="not a part of the model's own code"):
            _ = attention.attention_interface_0.source.nn_functional_dropout_0.source
        attention.contiguous_0.output.save()


def test_texts_and_configurations_cannot_be_read(gpt2):
    model = opened(gpt2)
    with model.trace(IDS):
        args, _ = model.transformer.h[0].attn.source.ALL_ATTENTION_FUNCTIONS_get_interface_0.inputs
        assert "eager" not in repr(args[0])
        model.transformer.h[0].output.save()


def test_a_graph_says_its_sources(gpt2):
    model = opened(gpt2)
    with model.trace(IDS) as tracer:
        attention_of(model, "gpt2").source.softmax_0.output.save()
    marks = {(mark.path, mark.inside): mark.digest for mark in tracer.graph.graph.sources}
    source = model.transformer.h[1].attn.source
    assert marks == {
        ("transformer.h.1.attn", ()): source.digest,
        ("transformer.h.1.attn", ("attention_interface_0",)): (
            source.attention_interface_0.source.digest
        ),
    }
    with model.trace(IDS) as tracer:
        model.transformer.h[1].output.save()
    assert tracer.graph.graph.sources == ()
