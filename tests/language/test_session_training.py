"""Training across the traces of a session, as the same loop with hooks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from weft.testing.same import bitwise, bounded, moves

STEPS = 4


@pytest.fixture
def data(ids):
    """Prompts with the token that is to come."""
    return [(ids[:, :n], ids[:, n]) for n in (3, 5, 7, 8)]


def losses_of(net, path, hook, data, parameters, make):
    """The plain loop: a hook on the output of a module, gradients of `parameters` only."""
    optimizer = make(parameters)
    handle = net.get_submodule(path).register_forward_hook(hook)
    losses = []
    try:
        for step in range(STEPS):
            prompt, token = data[step % len(data)]
            optimizer.zero_grad()
            loss = cross_entropy(net(prompt).logits[:, -1], token)
            grads = torch.autograd.grad(loss, parameters)
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            optimizer.step()
            losses.append(loss.detach())
    finally:
        handle.remove()
    return losses


def session_losses(model, change, data, parameters, make):
    """The same loop in a session."""
    losses = []
    with model.session():
        optimizer = make(parameters)
        for step in range(STEPS):
            prompt, token = data[step % len(data)]
            optimizer.zero_grad()
            with model.trace(prompt):
                change()
                loss = cross_entropy(model.output.logits[:, -1], token)
                loss.backward()
            optimizer.step()
            losses.append(loss + 0)
    return losses


def compare(model, net, path, data, build, apply, make):
    """Trains what `build()` gives, with hooks and in a session."""
    torch.manual_seed(0)
    ours, theirs, start = build(), build(), build()
    theirs.load_state_dict(ours.state_dict())
    start.load_state_dict(ours.state_dict())

    def change():
        module = model.get(path)
        module.output = apply(ours, module.output)

    hook = lambda m, a, out: apply(theirs, out)
    expected = losses_of(net, path, hook, data, [*theirs.parameters()], make)
    got = session_losses(model, change, data, [*ours.parameters()], make)
    bitwise(got, expected)
    bitwise([p.detach() for p in ours.parameters()], [p.detach() for p in theirs.parameters()])
    for before, after in zip(start.parameters(), ours.parameters(), strict=True):
        moves(after.detach(), before.detach())
    assert all(parameter.grad is None for parameter in net.parameters())


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.05)


class Adapter(nn.Module):
    """Low rank, of a width of 32."""

    def __init__(self):
        super().__init__()
        self.down = nn.Parameter(torch.randn(32, 2))
        self.up = nn.Parameter(torch.randn(2, 32) * 0.1)

    def forward(self, x):
        return (x @ self.down) @ self.up


class Steering(nn.Module):
    def __init__(self):
        super().__init__()
        self.v = nn.Parameter(torch.randn(32) * 0.1)


class Rotation(nn.Module):
    """Distributed alignment search: a learnt orthogonal basis, in which a part is swapped."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 32))

    def forward(self, base, source):
        q = torch.linalg.qr(self.w)[0].contiguous()  # in a graph decompositions are, anywhere
        change = (source - base) @ q[:, :4]
        return base + change @ q[:, :4].T


def test_a_low_rank_adapter(model, net, data):
    compare(model, net, "transformer.h.1.mlp", data, Adapter, lambda m, h: h + m(h), adam)


def test_a_steering_vector(model, net, data):
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
    compare(model, net, "transformer.h.1", data, Steering, lambda m, h: h + m.v, sgd)


def test_a_rotation_with_the_source_of_another_trace(model, net, ids, data):
    """The source comes from a trace of the same session, unsaved."""
    torch.manual_seed(0)
    ours, theirs = Rotation(), Rotation()
    theirs.load_state_dict(ours.state_dict())
    first = ours.w.detach().clone()
    layer = model.transformer.h[1]
    losses = []
    with model.session():
        optimizer = adam([*ours.parameters()])
        for prompt, token in data:
            optimizer.zero_grad()
            with model.trace(ids.flip(1)[:, : prompt.shape[1]]):
                source = layer.output
            with model.trace(prompt):
                layer.output = ours(layer.output, source)
                loss = cross_entropy(model.lm_head.output[:, -1], token)
                loss.backward()
            optimizer.step()
            losses.append(loss + 0)

    optimizer, expected, kept = adam([*theirs.parameters()]), [], {}
    module = net.transformer.h[1]
    for prompt, token in data:
        optimizer.zero_grad()
        hook = module.register_forward_hook(lambda m, a, out: kept.update(h=out))
        with torch.no_grad():
            net(ids.flip(1)[:, : prompt.shape[1]])
        hook.remove()
        hook = module.register_forward_hook(lambda m, a, out: theirs(out, kept["h"]))
        loss = cross_entropy(net(prompt).logits[:, -1], token)
        hook.remove()
        (theirs.w.grad,) = torch.autograd.grad(loss, [theirs.w])
        optimizer.step()
        expected.append(loss.detach())
    bounded(losses, expected)  # last bits: of the gradient of a decomposition
    bounded(ours.w.detach(), theirs.w.detach())
    moves(ours.w.detach(), first)


def test_a_probe_on_values_that_were_not_saved(model, net, data):
    """The probe is trained outside of the blocks, as on any tensors."""
    torch.manual_seed(0)
    ours = nn.Linear(32, 128)
    theirs = nn.Linear(32, 128)
    theirs.load_state_dict(ours.state_dict())

    def step(probe, optimizer, h, token):
        optimizer.zero_grad()
        loss = cross_entropy(probe(h), token)
        loss.backward()
        optimizer.step()
        return loss.detach()

    losses, expected = [], []
    with model.session():
        optimizer = adam(ours.parameters())
        for prompt, token in data:
            with model.trace(prompt):
                h = model.transformer.h[1].output[:, -1]
            losses.append(step(ours, optimizer, h, token))
    optimizer, kept = adam(theirs.parameters()), {}
    hook = net.transformer.h[1].register_forward_hook(lambda m, a, out: kept.update(h=out))
    for prompt, token in data:
        with torch.no_grad():
            net(prompt)
        expected.append(step(theirs, optimizer, kept["h"][:, -1], token))
    hook.remove()
    bitwise(losses, expected)
    bitwise(ours.weight.detach(), theirs.weight.detach())


def test_a_probe_inside_of_the_blocks(model, net, data):
    torch.manual_seed(0)
    ours = nn.Linear(32, 128)
    theirs = nn.Linear(32, 128)
    theirs.load_state_dict(ours.state_dict())
    with model.session():
        optimizer = adam(ours.parameters())
        for prompt, token in data:
            with model.trace(prompt):
                cross_entropy(ours(model.transformer.h[1].output[:, -1]), token).backward()
            optimizer.step()
            optimizer.zero_grad()
    optimizer, kept = adam(theirs.parameters()), {}
    hook = net.transformer.h[1].register_forward_hook(lambda m, a, out: kept.update(h=out))
    for prompt, token in data:
        with torch.no_grad():
            net(prompt)
        cross_entropy(theirs(kept["h"][:, -1]), token).backward()
        optimizer.step()
        optimizer.zero_grad()
    hook.remove()
    bitwise(ours.weight.detach(), theirs.weight.detach())
    bitwise(ours.bias.detach(), theirs.bias.detach())


def test_an_edit_that_is_trained(model, net, data):
    """The adapter lies in an edit; the traces only have the loss."""
    torch.manual_seed(0)
    ours, theirs = Adapter(), Adapter()
    theirs.load_state_dict(ours.state_dict())
    path = "transformer.h.1.mlp"
    with model.edit() as edited:
        module = model.get(path)
        module.output = module.output + ours(module.output)
    got = session_losses(edited, lambda: None, data, [*ours.parameters()], adam)
    hook = lambda m, a, out: out + theirs(out)
    bitwise(got, losses_of(net, path, hook, data, [*theirs.parameters()], adam))
    bitwise([p.detach() for p in ours.parameters()], [p.detach() for p in theirs.parameters()])
