"""What autograd knows: gone after the block, unless asked for, which is possible here only."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import weft
from tests.families import zoo
from weft.errors import UnknownOptionError
from weft.testing.same import bounded


@pytest.fixture
def net():
    return zoo.build("gpt2", torch.float32)


@pytest.fixture
def ids():
    return torch.tensor(zoo.tokens(9, seed=1))


def last_logits(out):
    return out.logits[0, -1].pow(2).sum()


def test_grad_true_is_for_here_only(net, ids):
    model = weft.LanguageModel(net)
    for place in ("local", "http://localhost:1"):
        with pytest.raises(UnknownOptionError, match="inside the block"):
            model.trace(ids, grad=True, remote=place)


def test_grad_true_keeps_the_graph_for_a_backward_of_ones_own(net, ids):
    model = weft.LanguageModel(net)
    v = torch.linspace(-1, 1, 32, requires_grad=True)
    with model.trace(ids, grad=True):
        model.transformer.h[1].output += v
        loss = last_logits(model.output).save()
    loss.backward()
    got = v.grad, net.lm_head.weight.grad.clone()
    v.grad = net.lm_head.weight.grad = None
    net.zero_grad(set_to_none=True)
    hook = net.transformer.h[1].register_forward_hook(lambda m, a, h: h + v)
    expected = torch.autograd.grad(last_logits(net(ids)), [v, net.lm_head.weight])
    hook.remove()
    bounded(got, expected)


def test_nothing_keeps_what_autograd_knows(net, ids):
    """Activations of the pass are gone after the block, though results are kept."""
    model = weft.LanguageModel(net)
    seen = []
    hook = net.transformer.h[0].mlp.register_forward_hook(
        lambda m, a, h: seen.append(weakref.ref(h)) or None
    )
    gc.disable()
    try:
        with model.trace(ids):
            with last_logits(model.output).backward():
                model.transformer.h[1].output.grad[:, 0] = 0
                kept = model.transformer.h[0].output.grad.save()
            logits = model.output.logits.save()
        gone = seen[-1]() is None
    finally:
        gc.enable()
        hook.remove()
    assert gone
    assert kept.grad_fn is None
    assert logits.grad_fn is None
