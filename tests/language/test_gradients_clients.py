"""Client tensors that require gradients get their `.grad` when the block has run, from afar too."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tests.language.autograd import gradients
from weft.errors import RecordingError
from weft.testing.same import bounded, moves

LAYER = "transformer.h.1.output"


def last_logits(out):
    return out.logits[0, -1].pow(2).sum()


def steered(net, ids, v):
    """The loss on the hand-hooked model, for autograd."""
    hook = net.transformer.h[1].register_forward_hook(lambda m, a, h: h + v)
    try:
        return last_logits(net(ids))
    finally:
        hook.remove()


def steer(model, ids, v):
    with model.trace(ids):
        model.transformer.h[1].output += v
        last_logits(model.output).backward()


@pytest.fixture
def v():
    return torch.linspace(-1, 1, 32, requires_grad=True)


def test_a_steering_vector(model, net, ids, v):
    (expected,) = torch.autograd.grad(steered(net, ids, v), v)
    steer(model, ids, v)
    bounded(v.grad, expected)
    steer(model, ids, v)
    bounded(v.grad, 2 * expected)  # it is added up, as ever
    assert v.is_leaf


def test_optimising_a_steering_vector_over_many_blocks(model, net, ids):
    """Ten steps of Adam: the same vector, and the same losses, as with hooks."""

    def train(loss_of):
        v = torch.zeros(32, requires_grad=True)
        optimizer = torch.optim.Adam([v], lr=0.05)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            losses.append(loss_of(v))
            optimizer.step()
        return v.detach(), torch.stack(losses)

    def by_hand(v):
        loss = -torch.log_softmax(steered_logits(net, ids, v), -1)[7]
        loss.backward()
        net.zero_grad()
        return loss.detach()

    def with_weft(v):
        with model.trace(ids):
            model.transformer.h[1].output += v
            loss = -torch.log_softmax(model.output.logits[0, -1], -1)[7]
            loss.backward()
            loss = loss.save()
        return loss

    expected, losses = train(by_hand)
    got, seen = train(with_weft)
    bounded(seen, losses)
    assert (got - expected).abs().max() < 1e-4
    assert seen[-1] < seen[0] - 0.1


def steered_logits(net, ids, v):
    hook = net.transformer.h[1].register_forward_hook(lambda m, a, h: h + v)
    try:
        return net(ids).logits[0, -1]
    finally:
        hook.remove()


def test_a_soft_prompt_through_the_inputs(model, net, ids):
    """Embeddings made outside the block: what they were made of gets the gradient."""

    def embeds(soft):
        return torch.cat([soft, net.transformer.wte(ids).detach()], 1)

    soft = torch.linspace(-1, 1, 64).view(1, 2, 32).requires_grad_()
    expected = torch.autograd.grad(last_logits(net(inputs_embeds=embeds(soft))), soft)[0]
    with model.trace(inputs_embeds=embeds(soft)):
        last_logits(model.output).backward()
    bounded(soft.grad, expected)


def test_a_soft_prompt_written_over_the_embeddings(model, net, ids):
    soft = torch.linspace(-1, 1, 64).view(2, 32).requires_grad_()

    def write(h):
        h = h.clone()
        h[0, :2] = soft
        return h

    hook = net.transformer.wte.register_forward_hook(lambda m, a, h: write(h))
    expected = torch.autograd.grad(last_logits(net(ids)), soft)[0]
    hook.remove()
    with model.trace(ids):
        model.transformer.wte.output[0, :2] = soft
        last_logits(model.output).backward()
    bounded(soft.grad, expected)


def test_what_was_computed_outside_hands_gradients_on(model, net, ids, v):
    (expected,) = torch.autograd.grad(steered(net, ids, torch.tanh(v) * 2), v)
    steer(model, ids, torch.tanh(v) * 2)
    bounded(v.grad, expected)


def test_a_users_own_module(model, net, ids):
    """A probe: its parameters train, from afar too."""
    torch.manual_seed(0)
    probe = nn.Sequential(nn.Linear(32, 4), nn.Tanh(), nn.Linear(4, 1))
    with model.trace(ids):
        probe(model.transformer.h[1].output).pow(2).mean().backward()
    got = [p.grad for p in probe.parameters()]
    seen = []
    hook = net.transformer.h[1].register_forward_hook(lambda m, a, h: seen.append(h.detach()))
    net(ids)
    hook.remove()
    expected = torch.autograd.grad(probe(seen[0]).pow(2).mean(), [*probe.parameters()])
    bounded(got, list(expected))


def test_several_backwards_add_up(model, net, ids, v):
    (one,) = torch.autograd.grad(steered(net, ids, v), v)
    with model.trace(ids):
        model.transformer.h[1].output += v
        loss = last_logits(model.output)
        loss.backward()
        (3 * loss).backward()
    bounded(v.grad, 4 * one)


@pytest.mark.parametrize("order", [*itertools.permutations(range(2))], ids=str)
def test_lines_may_stand_in_any_order(model, net, ids, v, order):
    (expected,) = torch.autograd.grad(steered(net, ids, v), v)

    def edit():
        model.transformer.h[1].output += v

    with model.trace(ids):
        lines = [edit, lambda: last_logits(model.output).backward()]
        for number in order:
            lines[number]()
    bounded(v.grad, expected)


def test_only_the_inputs_that_are_named(model, ids, v):
    w = torch.ones(32, requires_grad=True)
    with model.trace(ids):
        model.transformer.h[1].output += v * w
        last_logits(model.output).backward(inputs=[w])
    assert v.grad is None
    assert w.grad is not None


def test_who_asks_for_none_or_is_not_used_gets_none(model, ids, v):
    plain, idle, kept = torch.ones(32), torch.ones(32, requires_grad=True), v.detach().clone()
    with model.trace(ids):
        model.transformer.h[1].output += v * plain
        (model.transformer.h[1].output * idle).save("used, but not for the loss")
        last_logits(model.output).backward()
    assert plain.grad is None
    assert idle.grad is None
    assert v.grad is not None
    assert torch.equal(v, kept)


def test_without_a_backward_nobody_gets_a_gradient(model, ids, v):
    with model.trace(ids):
        model.transformer.h[1].output += v
        h = model.transformer.h[1].output.save()
    assert v.grad is None
    assert not h.requires_grad


def test_autograd_grad_gives_to_nobody_else(model, net, ids, v):
    (expected,) = torch.autograd.grad(steered(net, ids, v), v)
    with model.trace(ids):
        model.transformer.h[1].output += v
        (got,) = torch.autograd.grad(last_logits(model.output), v)
        got.save()
    bounded(got, expected)
    assert v.grad is None


def test_the_gradient_inside_the_block(model, net, ids, v):
    """One step of gradient descent within the block, with what was there before."""
    (expected,) = torch.autograd.grad(steered(net, ids, v), v)
    v.grad = torch.ones(32)
    with model.trace(ids):
        model.transformer.h[1].output += v
        last_logits(model.output).backward()
        inside = v.grad.save("inside")
    bounded((inside, v.grad), (expected + 1, expected + 1))


def test_a_failed_block_gives_no_gradients(model, ids, v):
    with pytest.raises(IndexError), model.trace(ids):
        model.transformer.h[1].output += v
        last_logits(model.output).backward()
        model.transformer.h[2].output[:, torch.tensor([99])].save()
    assert v.grad is None


def test_through_a_weight_of_a_users_dtype(subjects):
    """A float32 vector steers a bfloat16 model, and gets a float32 gradient."""
    llama = subjects("llama", torch.bfloat16)
    v = torch.zeros(32, requires_grad=True)
    with llama.model.trace(llama.ids):
        llama.model.model.layers[1].output += v
        llama.model.output.logits[0, -1].float().pow(2).sum().backward()
    assert v.grad.dtype is torch.float32
    moves(v.grad, torch.zeros(32))


def test_across_invokes(model, net, ids):
    """A loss of two inputs: each site has the gradient of its own pass."""
    others = ids.flip(1)
    with model.trace() as tracer:
        with tracer.invoke(ids):
            h = model.transformer.h[1].output
            one = model.output.logits[0, -1]
        with tracer.invoke(others):
            k = model.transformer.h[1].output
            (one * model.output.logits[0, -1]).sum().backward()
            got = h.grad.save(), k.grad.save()
    with torch.no_grad():
        at, bt = net(ids).logits[0, -1], net(others).logits[0, -1]
    first = gradients(net, [LAYER], lambda out: (out.logits[0, -1] * bt).sum(), ids)
    second = gradients(net, [LAYER], lambda out: (out.logits[0, -1] * at).sum(), others)
    bounded(got, (first[LAYER], second[LAYER]))


def test_each_invoke_may_ask_before_its_own_backward(model, net, ids):
    """A backward of another invoke, with which it has nothing to do, does not count."""
    prompts, got = (ids, ids.flip(1)), []
    with model.trace() as tracer:
        for one in prompts:
            with tracer.invoke(one):
                got.append(model.transformer.h[1].output.grad.save())
                model.output.logits[0, -1].sum().backward()
    alone = [gradients(net, [LAYER], lambda out: out.logits[0, -1].sum(), one) for one in prompts]
    bounded(tuple(got), tuple([one[LAYER] for one in alone]))


def test_a_backward_that_another_invoke_flows_into_counts(model, net, ids):
    """`.grad` after it is what it gives, though the value is of another invoke."""
    others, kept = ids.flip(1), []
    with model.trace() as tracer:
        with tracer.invoke(others):
            h = model.transformer.h[1].output
        with tracer.invoke(ids):
            model.transformer.h[2].output = h * 2
            model.output.logits[0, -1].sum().backward()
        got = h.grad.save()
    with torch.no_grad():
        hook = net.transformer.h[1].register_forward_hook(lambda m, a, out: kept.append(out))
        net(others)
        hook.remove()
    leaf = kept[0].requires_grad_()
    hook = net.transformer.h[2].register_forward_hook(lambda m, a, out: leaf * 2)
    (expected,) = torch.autograd.grad(net(ids).logits[0, -1].sum(), leaf)
    hook.remove()
    bounded(got, expected)


def test_custom_functions_lose_their_backward_with_a_word(model, ids):
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    with pytest.raises(RecordingError, match="no_grad") as caught, model.trace(ids):
        h = model.transformer.h[1].output
        Twice.apply(h).sum().backward()
        h.grad.save()
    assert __file__ in str(caught.value.line)
    assert "detach" in str(caught.value.fix)
