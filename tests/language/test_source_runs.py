"""Operations inside forwards that are skipped, run several times, in several invokes, backwards."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import weft
from tests.families import zoo
from tests.language import sources
from tests.language.sources import (
    IDS,
    attention_of,
    eager,
    logits_of,
    no_first,
    patched,
)
from weft.errors import (
    LateEditError,
    NotReachedError,
    RecordingError,
    WriteMismatchError,
)
from weft.testing.same import bitwise, bounded, moves


@pytest.fixture
def opened(place):
    """Gives a handle on a model, in the place where this test runs."""
    return lambda net: sources.opened(place, net)


@pytest.fixture
def gpt2():
    return eager("gpt2")


# -- skips -----------------------------------------------------------------------------------------


def test_an_operation_is_skipped(gpt2, opened):
    model = opened(gpt2)
    pattern = torch.rand(1, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    with model.trace(IDS):
        attention_of(model, "gpt2").source.softmax_0.skip(pattern)
        got = model.output.logits.save()
    with patched(gpt2, 1, lambda _: pattern):
        bitwise(got, logits_of(gpt2))


def test_a_skipped_operation_that_is_a_module(gpt2, opened):
    model = opened(gpt2)
    layer = model.transformer.h[1]
    with model.trace(IDS):
        layer.mlp.source.self_act_0.skip(layer.mlp.c_fc.output * 2)
        got = layer.mlp.c_proj.input.save()
        given = (layer.mlp.c_fc.output * 2).save()
    bitwise(got, given)


def test_sites_inside_a_skipped_operation(gpt2, opened):
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


def test_a_skip_needs_the_same_structure(gpt2, opened):
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


def test_each_invoke_has_operations_of_its_own(gpt2, opened):
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


def test_a_pattern_of_another_invoke(gpt2, opened):
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


def test_the_gradient_of_a_pattern(gpt2, opened):
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


def test_a_gradient_is_replaced(gpt2, opened):
    model = opened(gpt2)
    shift = torch.zeros(1, 4, 9, 9, requires_grad=True)
    with model.trace(IDS):
        soft = attention_of(model, "gpt2").source.softmax_0
        soft.output = soft.output + shift
        query = attention_of(model, "gpt2").input
        pattern = soft.output
        with model.output.logits[0, -1, 5].backward():
            before = pattern.grad.save()
            pattern.grad = pattern.grad * 2
            got = query.grad.save()
    kept = []

    def doubled(made):
        mine = made + added
        mine.register_hook(lambda grad: (kept.append(grad), grad * 2)[1])
        return mine

    added = torch.zeros(1, 4, 9, 9, requires_grad=True)
    block = gpt2.transformer.h[1].attn
    keep = lambda m, a, out: (out.retain_grad(), kept.append(out))[0]
    handle = block.c_attn.register_forward_hook(keep)
    with patched(gpt2, 1, doubled):
        gpt2(IDS).logits[0, -1, 5].backward()
    handle.remove()
    out, grad = kept
    bounded(before, grad)
    assert added.grad is not None
    bounded(shift.grad, added.grad)
    bounded(got, out.grad[..., :32].view(1, 9, 4, 8).transpose(1, 2))
    moves(got, torch.zeros_like(got))
    for weight in gpt2.parameters():
        weight.grad = None


# -- threads ---------------------------------------------------------------------------------------


def test_eight_threads_on_one_model(gpt2, opened, place):
    """Half of them scale a pattern, each with a factor of its own; half read what is there. Each
    does so alone, and then so that a server may draw some of them together."""
    model, plain, wrong = opened(gpt2), logits_of(gpt2), []
    expected = []
    for number in range(8):
        with patched(gpt2, number % 3, lambda pattern, number=number: pattern * number):
            expected.append(logits_of(gpt2))
    start = threading.Barrier(8)
    shared = bitwise if str(place) == "here" else bounded

    def work(number):
        try:
            start.wait(60)
            for alone, same in ((True, bitwise), (False, shared)):
                with model.trace(IDS, alone=alone):
                    if number % 2:
                        soft = attention_of(model, "gpt2", number % 3).source.softmax_0
                        soft.output = soft.output * number
                    got = model.output.logits.save()
                same(got, expected[number] if number % 2 else plain)
        except BaseException as error:  # noqa: BLE001 (told by the test)
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not any("forward" in vars(module) for module in gpt2.modules())
