"""Gradients that do not exist, and what must be as it was afterwards."""

from __future__ import annotations

import pytest
import torch

from tests.language.autograd import gradients, untouched
from weft.errors import GradientError, RecordingError, WeftError
from weft.testing.same import bounded

LAYER = "transformer.h.1.output"


def last_logits(out):
    return out.logits[0, -1].pow(2).sum()


def late(m):
    m.transformer.h[1].output.sum().backward()
    m.transformer.h[2].output.grad.save()


def part(m):
    h = m.transformer.h[1].output
    last = h[:, -1]
    last_logits(m.output).backward()
    last.grad.save()


def copied(m):
    h = m.transformer.h[1].output.clone()
    last_logits(m.output).backward()
    h.grad.save()


def detached(m):
    h = m.transformer.h[1].output
    h.detach().sum().backward()
    h.grad.save()


def integers(m):
    last_logits(m.output).backward()
    m.transformer.wte.input.grad.save()


def integer_loss(m):
    m.output.logits.argmax().backward()


def many(m):
    m.output.logits.backward()


def never(m):
    m.transformer.h[1].output.grad.save()


def no_grad(m):
    h = m.transformer.h[1].output
    with torch.no_grad():
        k = h * 2
    k.sum().backward()
    h.grad.save()


def no_grad_in_place(m):
    h = m.transformer.h[1].output * 1
    with torch.no_grad():
        h.mul_(2)
    h.sum().backward()
    m.transformer.h[1].output.grad.save()


def no_number(m):
    with last_logits(m.output).backward():
        m.transformer.h[1].output.grad = 0


REFUSED = {
    one.__name__: one
    for one in (
        late, part, copied, detached, integers, integer_loss, many, never, no_grad,
        no_grad_in_place, no_number,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_gradient_is_refused_at_the_line(model, net, ids, name):
    with pytest.raises(WeftError) as caught, model.trace(ids):
        REFUSED[name](model)
    assert isinstance(caught.value, (RecordingError, GradientError))
    assert __file__ in str(caught.value.line)
    assert caught.value.fix
    assert untouched(net)


def test_numbers_under_no_grad_may_choose(model, net, ids):
    """What is no floating tensor carries no gradient anyway."""
    with model.trace(ids):
        logits = model.output.logits[0, -1]
        with torch.no_grad():
            best = logits.topk(2).indices
        logits[best].sum().backward()
        got = model.transformer.h[1].output.grad.save()
    best = net(ids).logits[0, -1].topk(2).indices
    bounded(got, gradients(net, [LAYER], lambda o: o.logits[0, -1][best].sum(), ids)[LAYER])


def test_after_an_exception_weights_are_as_before(model, net, ids):
    frozen = net.transformer.wte.weight
    frozen.requires_grad_(False)
    try:
        with pytest.raises((RuntimeError, WeftError)), model.trace(ids):
            h = model.transformer.h[1].output
            h.exp_()  # a value that its own backward needs is changed
            k = h.exp()
            k.mul_(2)
            k.sum().backward()
            h.grad.save()
        asks = [p.requires_grad for p in net.parameters() if p is not frozen]
        assert all(asks)
        assert not frozen.requires_grad
        assert all(p.grad is None for p in net.parameters())
    finally:
        frozen.requires_grad_(True)


def test_a_model_whose_weights_ask_for_nothing(model, net, ids):
    """The usual way of interpretability: the gradients are the same."""
    expected = gradients(net, [LAYER, "transformer.wte.weight"], last_logits, ids)
    net.requires_grad_(False)
    try:
        with model.trace(ids):
            last_logits(model.output).backward()
            got = model.transformer.h[1].output.grad.save()
            weight = model.transformer.wte.weight.grad.save()
        bounded((got, weight), tuple(expected.values()))
        assert not any(p.requires_grad for p in net.parameters())
    finally:
        net.requires_grad_(True)
