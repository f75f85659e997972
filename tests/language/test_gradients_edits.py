"""Gradients that are replaced while they flow, and edits of what they are gradients of."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import weft
from tests.language.autograd import gradients, untouched
from weft.errors import LateEditError, RecordingError, StaleHandleError, WriteMismatchError
from weft.testing.same import bounded, moves

H = [f"transformer.h.{n}.output" for n in range(3)]


def last_logits(out):
    return out.logits[0, -1].pow(2).sum()


def halve_last(g):
    g = g.clone()
    g[:, -1] *= 0.5
    return g


EDITS = {
    "assigned": lambda h: setattr(h, "grad", h.grad * torch.tensor([[[1.0]] * 8 + [[0.5]]])),
    "a part in place": lambda h: h.grad[:, -1].mul_(0.5),
    "a part, augmented": lambda h: h.grad.__getitem__((slice(None), -1)).__imul__(0.5),
    "set a part": lambda h: h.grad.__setitem__((slice(None), -1), h.grad[:, -1] * 0.5),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("first", [True, False], ids=["edit first", "read first"])
def test_what_lies_behind_sees_the_new_gradient(model, net, ids, name, first):
    expected = gradients(net, [H[0]], last_logits, ids, backward={H[1]: halve_last})[H[0]]
    with model.trace(ids), last_logits(model.output).backward():
        if first:
            EDITS[name](model.transformer.h[1].output)
        got = model.transformer.h[0].output.grad.save()
        if not first:
            EDITS[name](model.transformer.h[1].output)
    bounded(got, expected)
    moves(got, gradients(net, [H[0]], last_logits, ids)[H[0]])
    assert untouched(net)


def test_before_the_backward_an_edit_is_of_the_next_one(model, net, ids):
    expected = gradients(net, [H[0]], last_logits, ids, backward={H[1]: halve_last})[H[0]]
    with model.trace(ids):
        model.transformer.h[1].output.grad[:, -1] *= 0.5
        last_logits(model.output).backward()
        got = model.transformer.h[0].output.grad.save()
    bounded(got, expected)


def test_reads_of_one_gradient_keep_their_place_among_its_edits(model, net, ids):
    plain = gradients(net, [H[1]], last_logits, ids)[H[1]]
    with model.trace(ids), last_logits(model.output).backward():
        before = model.transformer.h[1].output.grad.save()
        model.transformer.h[1].output.grad *= 3
        after = model.transformer.h[1].output.grad.save()
        model.transformer.h[1].output.grad = torch.ones(1, 9, 32)
        last = model.transformer.h[1].output.grad.save()
        behind = model.transformer.h[0].output.grad.save()
    ones = {H[1]: lambda g: torch.ones_like(g)}
    expected = gradients(net, [H[0]], last_logits, ids, backward=ones)[H[0]]
    bounded((before, after, last, behind), (plain, 3 * plain, torch.ones(1, 9, 32), expected))


def test_a_gradient_made_of_another_and_of_values(model, net, ids):
    """Of a later layer's gradient, an activation, and a client tensor."""
    v = torch.linspace(-1, 1, 32)
    seen = {}

    def keep(h):
        seen["h"] = h.detach()

    def note(g):
        seen["g"] = g

    def replace(g):
        return g + seen["g"].sum() * seen["h"] * v

    expected = gradients(
        net, [H[0]], last_logits, ids, change={H[1]: keep}, backward={H[2]: note, H[1]: replace}
    )[H[0]]
    with model.trace(ids), last_logits(model.output).backward():
        h = model.transformer.h[1].output
        h.grad = h.grad + model.transformer.h[2].output.grad.sum() * h * v
        got = model.transformer.h[0].output.grad.save()
    bounded(got, expected)


def test_only_the_backward_meant_is_changed(model, net, ids):
    plain = gradients(net, [H[0]], last_logits, ids)[H[0]]
    changed = gradients(net, [H[0]], last_logits, ids, backward={H[1]: halve_last})[H[0]]
    with model.trace(ids):
        loss, h = last_logits(model.output), model.transformer.h[0].output
        with loss.backward():
            model.transformer.h[1].output.grad[:, -1] *= 0.5
            one = h.grad.save()
        with loss.backward():
            two = h.grad.save()
    bounded((one, two), (changed, plain))


def test_the_gradient_of_a_weight_sees_replaced_ones(model, net, ids):
    key = "transformer.h.0.mlp.c_fc.weight"
    expected = gradients(net, [key], last_logits, ids, backward={H[1]: halve_last})[key]
    with model.trace(ids), last_logits(model.output).backward():
        model.transformer.h[1].output.grad[:, -1] *= 0.5
        got = model.get(key).grad.save()
    bounded(got, expected)
    assert untouched(net)
    assert all(not p._backward_hooks for p in net.parameters())


def test_a_gradient_from_behind_is_late(model, ids):
    """Layer 2's gradient cannot be made of layer 0's: it has flowed on by then."""
    with (
        pytest.raises(LateEditError) as caught,
        model.trace(ids),
        last_logits(model.output).backward(),
    ):
        g = model.transformer.h[0].output.grad
        model.transformer.h[2].output.grad = g
        model.transformer.h[1].output.grad.save()
    assert __file__ in str(caught.value.line)


def test_an_edit_before_the_loss_made_of_its_gradient_is_late(model, ids):
    with pytest.raises(RecordingError), model.trace(ids):
        last_logits(model.output).backward()
        g = model.transformer.h[0].output.grad
        model.transformer.h[1].output += g
        model.output.logits.save()


def test_a_gradient_of_another_shape_is_refused(model, ids):
    with (
        pytest.raises(WriteMismatchError, match="32"),
        model.trace(ids),
        last_logits(model.output).backward(),
    ):
        model.transformer.h[1].output.grad = torch.ones(9, 32)


def test_a_stale_gradient_cannot_be_edited(model, ids):
    with (
        pytest.raises(StaleHandleError),
        model.trace(ids),
        last_logits(model.output).backward(),
    ):
        old = model.transformer.h[1].output.grad
        model.transformer.h[1].output.grad = torch.ones(1, 9, 32)
        old[:, 0] = 0


def test_an_assignment_after_the_backward_is_refused(model, ids):
    """It would change nothing; the way out is named."""
    with pytest.raises(RecordingError, match=r"with loss\.backward") as caught, model.trace(ids):
        last_logits(model.output).backward()
        model.transformer.h[1].output.grad = torch.zeros(1, 9, 32)
    assert "with loss.backward" in str(caught.value)


def test_what_was_added_up_is_a_tensor_as_any_other(model, net, ids):
    """Changing it in place changes `.grad`, as in PyTorch, and nothing that has flowed."""
    plain = gradients(net, H[:2], last_logits, ids)
    with model.trace(ids):
        h = model.transformer.h[1].output
        last_logits(model.output).backward()
        h.grad.zero_()
        gone = h.grad.save()
        last_logits(model.output).backward()
        again = h.grad.save()
        behind = model.transformer.h[0].output.grad.save()
    bounded((gone, again, behind), (torch.zeros(1, 9, 32), plain[H[1]], 2 * plain[H[0]]))


# Edits of the values themselves


def zero_first(h):
    h[:, 0] = 0


def scaled(h):
    return h * 2


def in_place(h):
    h.mul_(2)


CHANGES = {
    "in place": (lambda m: m.transformer.h[1].output.mul_(2), in_place),
    "a part": (lambda m: m.transformer.h[1].output.__setitem__((slice(None), 0), 0), zero_first),
    "replaced": (
        lambda m: setattr(m.transformer.h[1], "output", m.transformer.h[1].output * 2),
        scaled,
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_edits_of_values_that_have_gradients(model, net, ids, name):
    edit, hook = CHANGES[name]
    expected = gradients(net, H, last_logits, ids, change={H[1]: hook})
    for order in itertools.permutations(range(2)):
        with model.trace(ids):
            lines = [lambda: edit(model), lambda: last_logits(model.output).backward()]
            for number in order:
                lines[number]()
            got = [model.transformer.h[n].output.grad.save() for n in range(3)]
        bounded(got, [expected[key] for key in H])


def test_the_gradient_of_what_stood_there_before(model, net, ids):
    """A handle read before a replacement is the module's own result."""
    with model.trace(ids):
        old = model.transformer.h[1].output
        model.transformer.h[1].output = old * 2
        last_logits(model.output).backward()
        got = old.grad.save(), model.transformer.h[1].output.grad.save()
    new = gradients(net, [H[1]], last_logits, ids, change={H[1]: scaled})[H[1]]
    bounded(got, (2 * new, new))


def test_a_replaced_gradient_that_has_a_gradient_itself():
    """With `create_graph=True` what takes its place is followed too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1))
    model, x = weft.Model(net), torch.randn(3, 4)
    with model.trace(x):
        h, k = model[1].output, model[3].output
        with model[4].output.pow(2).sum().backward(create_graph=True):
            k.grad = k.grad * k
            first = h.grad
        first.pow(2).sum().backward()
        got = h.grad.save()
    h = net[:2](x)
    k = net[2:4](h)
    hook = k.register_hook(lambda g: g * k)
    (first,) = torch.autograd.grad(net[4](k).pow(2).sum(), h, create_graph=True)
    hook.remove()  # it is of the first backward only
    (second,) = torch.autograd.grad(first.pow(2).sum(), h)
    bounded(got, first + second)


def test_detach(model, net, ids):
    with model.trace(ids):
        h = model.transformer.h[1].output
        (h * h.detach()).sum().backward()
        got = h.grad.save(), model.transformer.h[1].output.save()
    bounded(got[0], got[1])


def test_an_edit_through_the_input_of_a_norm(model, net, ids):
    """`ln_1.input[:] = ...` is an edit of the residual too, for gradients as for numbers.

    The layer's output is what it was at its site, as for a hook that is registered there.
    """
    key, seen = "transformer.h.2.ln_1.input", []
    hooks = {H[1]: lambda h: h.register_hook(seen.append) and None, key: in_place}
    gradients(net, [H[2]], last_logits, ids, change=hooks)
    (expected,) = seen
    with model.trace(ids):
        model.transformer.h[2].ln_1.input[:] *= 2
        last_logits(model.output).backward()
        got = model.transformer.h[1].output.grad.save()
    bounded(got, expected)
