"""Gradients and the values of a session: used on, followed where asked, never lost in silence."""

from __future__ import annotations

import pytest
import torch

from tests.language.hooks import with_hooks
from weft.errors import GradientError
from weft.testing.same import bitwise, bounded

AT = "transformer.h.1.output"


def other_of(ids):
    return ids.flip(1)


def test_a_gradient_is_used_in_the_next_trace(model, net, ids, remote):
    """One step uphill in the stream."""
    with model.session(remote=remote):
        with model.trace(ids):
            h = model.transformer.h[1].output
            model.lm_head.output[0, -1].log_softmax(-1)[7].backward()
            slope = h.grad
        with model.trace(ids):
            model.transformer.h[1].output += 3 * slope
            better = model.lm_head.output.save()
    kept = {}
    block = net.transformer.h[1]
    hook = block.register_forward_hook(lambda m, a, out: kept.update(h=out))
    (expected,) = torch.autograd.grad(
        net(ids).logits[0, -1].log_softmax(-1)[7],
        kept["h"],
    )
    hook.remove()
    bitwise(better, with_hooks(net, {AT: lambda h: h + 3 * expected}, ids).result.logits)


def test_gradients_flow_from_trace_to_trace_where_that_is_asked_for(model, net, ids):
    """With `grad=True` a carried value is connected to what it was made of."""
    v = torch.full((32,), 0.1, requires_grad=True)
    w = torch.full((32,), 0.2, requires_grad=True)
    with model.session():
        with model.trace(other_of(ids), grad=True):
            model.transformer.h[0].output += v
            h = model.transformer.h[1].output[:, -1]
        with model.trace(ids):
            model.transformer.h[1].output[:, -1] = h * w
            model.lm_head.output[0, -1].log_softmax(-1)[7].backward(inputs=[v, w])
    mine = [v.grad, w.grad]
    assert all(parameter.grad is None for parameter in net.parameters())

    kept = {}
    first, second = net.transformer.h[0], net.transformer.h[1]
    hooks = [
        first.register_forward_hook(lambda m, a, out: out + v),
        second.register_forward_hook(lambda m, a, out: kept.update(h=out[:, -1])),
    ]
    net(other_of(ids))
    for hook in hooks:
        hook.remove()
    row = kept["h"] * w
    hook = second.register_forward_hook(lambda m, a, out: torch.cat([out[:, :-1], row[:, None]], 1))
    loss = net(ids).logits[0, -1].log_softmax(-1)[7]
    hook.remove()
    bounded(mine, list(torch.autograd.grad(loss, [v, w])))
    assert mine[0].abs().max() > 0


def through(model, v, w):
    """Values of one trace, and whether a gradient of `v` flows through each."""
    h = model.transformer.h
    early = h[0].output
    before = h[1].output
    below = h[2].output  # before the edits, by line only
    part = before * 2
    part[:, 0] = v
    h[1].output += v
    h[0].mlp.output += w
    with torch.no_grad():
        number = h[2].output * 2
    loss = h[2].output.sum()
    loss.backward()
    return {
        "before the edit": (before, False),
        "another's": (early * w, False),
        "the edited site": (h[1].output, True),
        "behind it": (below, True),
        "written into": (part, True),
        "a view of what was written into": (part[:, :], True),
        "detached": (below.detach() + 1, False),
        "without gradients": (number, False),
        "a gradient": (h[1].output.grad, False),
        "a number": (h[2].output.mean(), True),
        "the input of what is behind": (h[2].input, True),
        "all at once": (torch.stack([early, below]).sum(0), True),
    }


def test_no_part_of_a_gradient_is_lost_without_a_word(model, ids, remote):
    """The values of `through` in the loss of a later block that trains `v`."""
    v, w = [torch.full((32,), 0.1, requires_grad=True) for _ in range(2)]
    with model.session(remote=remote):
        with model.trace(ids):
            values = through(model, v, w)
        for name, (value, flows) in values.items():

            def later(value=value, inputs=(v,)):
                with model.trace(ids):
                    model.transformer.h[1].output = model.transformer.h[1].output + value * v
                    model.lm_head.output[0, -1, 7].backward(inputs=list(inputs))

            v.grad = None
            if not flows:
                later()
                assert v.grad is not None, name
                continue
            with pytest.raises(GradientError, match="earlier block of the session"):
                later()
            assert v.grad is None, name
            with model.trace(ids):  # a number, if that is said
                model.transformer.h[1].output = model.transformer.h[1].output + value.detach() * v
                model.lm_head.output[0, -1, 7].backward()
            with model.trace(ids):  # or no loss depends on it
                _ = value * 2
                model.lm_head.output[0, -1, 7].backward()


def test_what_was_cut_once_is_cut_further_on(model, ids):
    v, w = [torch.full((32,), 0.1, requires_grad=True) for _ in range(2)]
    with model.session():
        with model.trace(ids):
            h = model.transformer.h[1].output * v
        with model.trace(ids):
            g = model.transformer.h[1].output + h
        with pytest.raises(GradientError, match="earlier block"), model.trace(ids):
            (g * v).sum().backward()
        with model.trace(ids):  # only for another one
            (g * v * w).sum().backward(inputs=[w])
    assert v.grad is None
    assert w.grad is not None


def test_gradients_of_other_invokes_are_told_apart(model, ids):
    v = torch.full((32,), 0.1, requires_grad=True)
    with model.session():
        with model.trace() as tracer:
            with tracer.invoke(ids):
                model.transformer.h[0].output += v
                changed = model.transformer.h[1].output
            with tracer.invoke(ids):
                plain = model.transformer.h[1].output
        with model.trace(ids):
            (plain * v).sum().backward()
        with pytest.raises(GradientError, match="earlier block"), model.trace(ids):
            (changed * v).sum().backward()
