"""Gradients and training on a GPU: what autograd gives there, wherever the user's tensors are."""

from __future__ import annotations

import pytest
import torch

import weft
from tests.gpu import place
from tests.gpu.place import DEVICE
from tests.language.autograd import gradients, untouched
from tests.language.hooks import with_hooks
from weft.testing.same import bitwise

pytestmark = pytest.mark.gpu

IDS = place.tokens(9)
ON = IDS.to(DEVICE)
AT = "transformer.h.1.output"
WEIGHT = "transformer.h.0.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def net():
    return place.net("gpt2", attn_implementation="eager")


@pytest.fixture
def model(net):
    return weft.LanguageModel(net)


def loss_of(out):
    return out.logits[0, -1].log_softmax(-1)[7]


def test_gradients_of_sites_and_weights(model, net):
    with model.trace(IDS):
        model.lm_head.output[0, -1].log_softmax(-1)[7].backward()
        h = model.transformer.h[1].output.grad.save()
        w = model.transformer.h[0].mlp.c_fc.weight.grad.save()
    seen = gradients(net, [AT, WEIGHT], loss_of, ON)
    assert h.device == ON.device
    bitwise(h, seen[AT])
    bitwise(w, seen[WEIGHT])
    assert untouched(net)


def test_gradients_are_replaced_while_they_flow(model, net):
    with model.trace(IDS), model.lm_head.output[0, -1].log_softmax(-1)[7].backward():
        early = model.transformer.h[0].output.grad.save()
        model.transformer.h[1].output.grad[:, :-1] = 0

    def cut(g):
        g = g.clone()
        g[:, :-1] = 0
        return g

    key = "transformer.h.0.output"
    bitwise(early, gradients(net, [key], loss_of, ON, backward={AT: cut})[key])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_through_the_kernels_of_attention(attention, dtype):
    """Backward kernels of the device: to the bit where two plain runs are, too."""
    net = place.larger("llama", dtype, attn_implementation=attention)
    model, key = weft.LanguageModel(net), "model.layers.1.output"
    ids = place.tokens(48)
    with model.trace(ids):
        model.lm_head.output[0, -1].float().log_softmax(-1)[7].backward()
        h = model.model.layers[1].output.grad.save()
    loss = lambda out: out.logits[0, -1].float().log_softmax(-1)[7]
    plain = [gradients(net, [key], loss, ids.to(DEVICE))[key] for _ in range(2)]
    if torch.equal(*plain):
        bitwise(h, plain[0])
    apart = float((h - plain[0]).double().norm() / plain[0].double().norm())
    assert apart < (1e-5 if dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize("where", ["cpu", DEVICE], ids=["cpu", "device"])
def test_the_users_tensors_get_theirs_where_they_are(model, net, where):
    v = torch.linspace(-1, 1, 32, device=where).requires_grad_()
    for _ in range(2):  # the second is added
        with model.trace(IDS):
            model.transformer.h[1].output[:, -1] += v
            model.lm_head.output[0, -1].log_softmax(-1)[7].backward()
    w = torch.linspace(-1, 1, 32, device=DEVICE).requires_grad_()

    def add(h):
        return torch.cat([h[:, :-1], h[:, -1:] + w], 1)

    gradients(net, [], loss_of, ON, change={AT: add})
    assert v.grad is not None and v.grad.device == v.device
    bitwise(v.grad.to(DEVICE), 2 * w.grad)


def plain_training(net, parameter, steps=3):
    """The same loop with hooks; the parameter is on the device."""
    optimizer = torch.optim.AdamW([parameter], lr=0.1)

    def add(module, args, output):
        return torch.cat([output[:, :-1], output[:, -1:] + parameter], 1)

    for _ in range(steps):
        optimizer.zero_grad()
        hook = net.transformer.h[1].register_forward_hook(add)
        loss = -loss_of(net(ON))
        hook.remove()
        (parameter.grad,) = torch.autograd.grad(loss, parameter)
        optimizer.step()


def test_an_optimiser_steps_between_traces(model, net):
    v = torch.nn.Parameter(torch.zeros(32, device=DEVICE))
    with model.session():
        optimizer = torch.optim.AdamW([v], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            with model.trace(IDS):
                model.transformer.h[1].output[:, -1] += v
                model.lm_head.output[0, -1].log_softmax(-1)[7].neg().backward()
            optimizer.step()
    w = torch.nn.Parameter(torch.zeros(32, device=DEVICE))
    plain_training(net, w)
    assert v.detach().abs().max() > 0.1
    assert torch.allclose(v, w, atol=1e-4)
    assert untouched(net)


def test_values_of_one_trace_in_the_next(model, net):
    other = place.tokens(9, seed=8)
    with model.session():
        with model.trace(other):
            h = model.transformer.h[1].output[:, -1]
        kept = h.clone()  # between traces it is the tensor that it is
        with model.trace(IDS):
            model.transformer.h[1].output[:, -1] = h
            logits = model.lm_head.output.save()
    expected = with_hooks(net, {AT: None}, other.to(DEVICE))[AT][:, -1]
    bitwise(kept, expected)

    def put(h):
        h[:, -1] = expected

    bitwise(logits, with_hooks(net, {AT: put}, ON).result.logits)


def test_a_backward_of_the_users_own(model, net):
    v = torch.zeros(32, requires_grad=True)
    with model.trace(IDS, grad=True):
        model.transformer.h[1].output[:, -1] += v
        loss = model.lm_head.output[0, -1].log_softmax(-1)[7].save()
    loss.backward(inputs=[v])
    key = "transformer.h.1.output"
    expected = gradients(net, [key], loss_of, ON)[key][0, -1]
    assert v.grad.device.type == "cpu"
    bitwise(v.grad.to(DEVICE), expected)


def test_loopback_brings_gradients(model, net):
    v = torch.zeros(32, requires_grad=True)
    with model.trace(IDS, remote="local"):
        model.transformer.h[1].output[:, -1] += v
        model.lm_head.output[0, -1].log_softmax(-1)[7].backward()
    expected = gradients(net, [AT], loss_of, ON)[AT][0, -1]
    bitwise(v.grad, expected.cpu())
