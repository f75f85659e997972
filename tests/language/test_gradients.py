"""Gradients at sites and of weights: what autograd gives on the hand-hooked model, in any order."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import weft
from tests.families import zoo
from tests.language.autograd import gradients, untouched
from weft.errors import GradientError
from weft.testing.same import bitwise, bounded


def last_logits(out):
    return out.logits[0, -1].float().pow(2).sum()


def sites_of(paths):
    """Layers, attention, MLP, and what goes into each: also what siblings have used before."""
    each = [(paths.layer(n), paths.attention(n), paths.mlp(n)) for n in range(zoo.LAYERS)]
    found = [f"{path}.output" for path in itertools.chain(*each)]
    found += [f"{paths.layer(1)}.input", f"{paths.mlp(1)}.input", f"{paths.norm}.input"]
    return [f"{paths.embedding}.output", *found, f"{paths.head}.output"]


def at(model, key):
    path, _, port = key.rpartition(".")
    value = getattr(model.get(path), port)
    return value[0] if isinstance(value, tuple) else value


def test_every_site_of_every_family(subject):
    net, keys = subject.net, sites_of(subject.paths)
    expected = gradients(net, keys, last_logits, subject.ids)
    with subject.model.trace(subject.ids):
        last_logits(subject.model.output).backward()
        got = {key: at(subject.model, key).grad.save() for key in keys}
    if net.dtype is torch.float32:
        bounded(got, expected)
    for key in keys:
        scale = expected[key].abs().max()
        assert (got[key] - expected[key]).abs().max() <= 0.05 * scale, key
    assert untouched(net)


def test_inputs_of_siblings_that_run_side_by_side(subjects):
    """GPT-NeoX: attention has used the layer's input before the norm of the MLP gets it."""
    neox = subjects("gpt_neox")
    key = f"{neox.paths.layer(1)}.post_attention_layernorm.input"
    expected = gradients(neox.net, [key], last_logits, neox.ids)
    with neox.model.trace(neox.ids):
        last_logits(neox.model.output).backward()
        got = at(neox.model, key).grad.save()
    bounded(got, expected[key])


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
def test_lines_may_stand_in_any_order(model, net, ids, order):
    """The gradient of layer 0, that of layer 2, and the backward."""
    keys = ["transformer.h.0.output", "transformer.h.2.output"]
    expected = gradients(net, keys, last_logits, ids)
    got = {}
    with model.trace(ids):
        loss = last_logits(model.output)
        lines = [
            lambda: got.update({keys[0]: model.transformer.h[0].output.grad.save()}),
            lambda: got.update({keys[1]: model.transformer.h[2].output.grad.save()}),
            loss.backward,
        ]
        for number in order:
            lines[number]()
    bounded({key: got[key] for key in keys}, expected)


def test_weights(model, net, ids):
    keys = ["transformer.h.1.attn.c_attn.weight", "transformer.wte.weight", "lm_head.weight"]
    expected = gradients(net, keys, last_logits, ids)
    with model.trace(ids):
        last_logits(model.output).backward()
        got = {key: model.get(key).grad.save() for key in keys}
    bounded(got, expected)
    assert untouched(net)


def test_a_weight_that_the_block_itself_uses(model, net, ids):
    """A logit lens by hand counts as a use too."""
    with model.trace(ids):
        h = model.transformer.h[1].output
        loss = (model.transformer.ln_f(h) @ model.lm_head.weight.T)[0, -1, 5]
        loss.backward()
        got = model.lm_head.weight.grad.save(), h.grad.save()
    seen = []
    hook = net.transformer.h[1].register_forward_hook(lambda m, a, h: seen.append(h))
    net(ids)
    hook.remove()
    lens = (net.transformer.ln_f(seen[0]) @ net.lm_head.weight.T)[0, -1, 5]
    bounded(got, torch.autograd.grad(lens, [net.lm_head.weight, seen[0]]))


def test_through_modules_that_the_block_applies(model, net, ids):
    with model.trace(ids):
        h = model.transformer.h[0].output
        model.lm_head(model.transformer.ln_f(h))[0, -1, 3].backward()
        got = h.grad.save()
    seen = []
    hook = net.transformer.h[0].register_forward_hook(lambda m, a, h: seen.append(h))
    net(ids)
    hook.remove()
    expected = torch.autograd.grad(net.lm_head(net.transformer.ln_f(seen[0]))[0, -1, 3], seen[0])
    bounded(got, expected[0])


def test_results_of_operations(model, net, ids):
    """A gradient of what the block itself has made, and put into the model."""
    with model.trace(ids):
        scaled = model.transformer.h[0].output * 1.5
        part = scaled[:, -1:]
        model.transformer.h[0].output = scaled
        loss = last_logits(model.output) + part.sum()
        loss.backward()
        got = scaled.grad.save(), part.grad.save()
    change = {"transformer.h.0.output": lambda h: h * 1.5}
    key = "transformer.h.0.output"
    out = gradients(net, [key], last_logits, ids, change=change)[key]
    out[:, -1:] += 1
    bounded(got, (out, torch.ones(1, 1, 32)))


def test_the_gradient_of_a_loss_that_is_not_one_number(model, net, ids):
    key = "transformer.h.1.output"
    seed = torch.linspace(-1, 1, 128)
    expected = gradients(net, [key], lambda out: (out.logits[0, -1] * seed).sum(), ids)
    with model.trace(ids):
        model.output.logits[0, -1].backward(seed)
        got = model.transformer.h[1].output.grad.save()
    bounded(got, expected[key])


def test_several_backwards(model, net, ids):
    """In `with` each has its own; outside, `.grad` is what autograd adds up."""
    key = "transformer.h.1.output"
    losses = [lambda out, n=n: out.logits[0, -1, n] for n in (3, 5)]
    one, two = [gradients(net, [key], loss, ids)[key] for loss in losses]
    with model.trace(ids):
        h, out = model.transformer.h[1].output, model.output
        with losses[0](out).backward(retain_graph=True):
            first = h.grad.save()
        with losses[1](out).backward():
            second = h.grad.save()
        total = h.grad.save()
    bounded((first, second, total), (one, two, one + two))
    with model.trace(ids):
        h, out = model.transformer.h[1].output, model.output
        losses[0](out).backward()
        first = h.grad.save()
        losses[1](out).backward()
        total = h.grad.save()
        h.grad = None
        losses[1](out).backward()
        again = h.grad.save()
    bounded((first, total, again), (one, one + two, two))


def test_a_gradient_that_is_set_to_none_is_none(model, ids):
    with model.trace(ids):
        h = model.transformer.h[1].output
        last_logits(model.output).backward()
        h.grad.norm().save("norm")
        h.grad = None
        assert h.grad is None


def test_autograd_grad(model, net, ids):
    keys = ["transformer.h.0.output", "transformer.h.2.output"]
    expected = gradients(net, keys, last_logits, ids)
    with model.trace(ids):
        hs = [model.transformer.h[n].output for n in (0, 2)]
        got = torch.autograd.grad(last_logits(model.output), hs)
        weft.save(got)
        (alone,) = torch.autograd.grad(last_logits(model.output), hs[0])
        alone.save()
    bounded(dict(zip(keys, got, strict=True)), expected)
    bounded(alone, expected[keys[0]])


def test_autograd_grad_of_several_losses_with_gradients_of_their_own(model, net, ids):
    with model.trace(ids):
        h = model.transformer.h[1].output
        logits = model.output.logits[0, -1]
        (got,) = torch.autograd.grad([logits[3], logits], [h], [torch.tensor(2.0), logits])
        got.save()
    key = "transformer.h.1.output"
    expected = gradients(
        net, [key], lambda o: 2 * o.logits[0, -1, 3] + o.logits[0, -1].pow(2).sum() / 2, ids
    )
    bounded(got, expected[key])


def test_autograd_grad_of_what_is_not_used(model, ids):
    with model.trace(ids):
        h, late = model.transformer.h[0].output, model.transformer.h[2].output
        assert torch.autograd.grad(h.sum(), late, allow_unused=True) == (None,)
        (zeros,) = torch.autograd.grad(h.sum(), late, materialize_grads=True)
        zeros.save()
    bitwise(zeros, torch.zeros(1, 9, 32))


def test_second_order():
    """The gradient of a gradient's norm, also of a client tensor."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 1))
    model, x = weft.Model(net), torch.randn(3, 4)
    v = torch.ones(8, requires_grad=True)
    with model.trace(x):
        model[1].output *= v
        h = model[1].output
        (first,) = torch.autograd.grad(model[4].output.sum(), h, create_graph=True)
        first.pow(2).sum().backward()
        got = h.grad.save()
    w = torch.ones(8, requires_grad=True)
    seen = net[:2](x) * w
    (first,) = torch.autograd.grad(net[2:](seen).sum(), seen, create_graph=True)
    bounded((got, v.grad), torch.autograd.grad(first.pow(2).sum(), [seen, w]))


def test_an_inner_loss_stops_the_pass(model, net, ids):
    """A backward from layer 1 needs no layer 2."""
    ran = []
    hook = net.transformer.h[2].register_forward_pre_hook(lambda m, a: ran.append(m))
    try:
        with model.trace(ids) as tracer:
            model.transformer.h[1].output.sum().backward()
            got = model.transformer.h[0].output.grad.save()
        assert not ran
        assert str(tracer.ended) == "transformer.h.1.output"
    finally:
        hook.remove()
    key = "transformer.h.0.output"
    seen = []
    keep = net.transformer.h[1].register_forward_hook(lambda m, a, h: seen.append(h))
    expected = gradients(net, [key], lambda out: seen[0].sum(), ids)
    keep.remove()
    bounded(got, expected[key])


def test_values_of_the_pass_are_what_they_are_without_gradients(subject):
    with subject.model.trace(subject.ids):
        logits = subject.model.output.logits.save()
        logits.float().sum().backward()
        h = subject.model.get(subject.paths.layer(0)).output
        (h[0] if isinstance(h, tuple) else h).grad.save()
    bitwise(logits, subject.baseline)
    assert not logits.requires_grad
    assert logits.grad_fn is None


def test_a_number_of_a_gradient_can_be_looked_at(model, net, ids):
    key = "transformer.h.1.output"
    expected = gradients(net, [key], last_logits, ids)[key]
    with model.trace(ids):
        last_logits(model.output).backward()
        g = model.transformer.h[1].output.grad
        norm = float(g.norm())
        (g / norm).save("unit")
    assert abs(norm - float(expected.norm())) <= 1e-4 * norm


def test_what_a_gradient_gives_may_edit_what_comes_after_its_loss(model, net, ids):
    """One step along the gradient of layer 1 at layer 2."""
    with model.trace(ids):
        h = model.transformer.h[1].output
        h.pow(2).sum().backward()
        model.transformer.h[2].output += 0.1 * h.grad
        logits = model.lm_head.output.save()
    seen = []
    first = net.transformer.h[1].register_forward_hook(lambda m, a, h: seen.append(h))
    second = net.transformer.h[2].register_forward_hook(lambda m, a, h: h + 0.1 * 2 * seen[0])
    with torch.no_grad():
        expected = net(ids).logits
    first.remove()
    second.remove()
    bounded(logits, expected)


def test_an_experiment_with_gradients_is_kept_and_run_again(model, net, ids, tmp_path):
    key = "transformer.h.1.output"
    with model.trace(ids) as tracer:
        g = model.transformer.h[1].output.grad.save("g")
        last_logits(model.output).backward()
    tracer.graph.save(tmp_path / "gradient.weft")
    again = weft.Experiment.load(tmp_path / "gradient.weft")
    assert again.hash == tracer.graph.hash
    bitwise(again.run(model, ids)["g"], g)
    others = torch.tensor(zoo.tokens(6, seed=4))
    bounded(again.run(model, others)["g"], gradients(net, [key], last_logits, others)[key])
    assert "backward of" in str(tracer.graph)


def test_a_loss_on_its_own_gradient_is_refused(model, ids):
    with pytest.raises(GradientError, match="own gradient") as caught, model.trace(ids):
        g = model.transformer.h[1].output.grad
        (model.transformer.h[2].output + g).sum().backward()
        g.save()
    assert __file__ in str(caught.value.line)
