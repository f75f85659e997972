"""Backwards by hand-made graphs: when they run, what of the model they follow, what they leave."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from tests.run.graphs import Builder, site
from tests.run.nets import Chain, Does, example
from weft.errors import GradientError, LateEditError
from weft.run.follow import follow
from weft.run.hooks import run
from weft.run.still import still


def drawn(g, net, *args, **options):
    return run(g.graph(), g.constants, net, args, **options).saved


def by_hand(net, x, path, loss):
    """The gradient at a module's output, by `register_hook`."""
    seen = []
    hook = net.get_submodule(path).register_forward_hook(
        lambda m, a, h: h.register_hook(seen.append) and None
    )
    try:
        loss(net(x)).backward()
    finally:
        hook.remove()
        net.zero_grad(set_to_none=True)
    return seen[0]


def sum_of_squares(g, net, x):
    return g.call("sum", g.call("pow", g.read("head", net(x).detach()), 2))


@pytest.mark.parametrize("path", ["blocks.0", "blocks.2", "blocks.1.norm"])
def test_a_gradient_at_a_site(path):
    net, x, g = Chain(), example(), Builder()
    h = g.read(path, x)
    g.save("g", g.grad(g.backward(sum_of_squares(g, net, x)), h))
    expected = by_hand(net, x, path, lambda out: out.pow(2).sum())
    assert torch.equal(drawn(g, net, x)["g"], expected)


def test_what_was_used_before_its_site_fires_counts():
    """The head's input has been used by a sibling: `since` says from where to follow."""

    def forward(self, x):
        h = self.first(x)
        return self.second(h) + (h * 3).sum() * 0 + h * h, self.third(h)

    net = Does(forward, first=nn.Linear(8, 8), second=nn.Linear(8, 8), third=nn.Linear(8, 8))
    x = torch.randn(2, 8)
    g = Builder()
    h = g.read("third", x, leaf=(0, 0), port="inputs")
    out = g.read("", x, leaf=(0,))
    b = g.backward(g.call("sum", out), since=(site("first", "inputs"), site("first")))
    g.save("g", g.grad(b, h))
    first = net.first(x)
    expected = torch.autograd.grad((net.second(first) + first * first).sum(), first)[0]
    torch.testing.assert_close(drawn(g, net, x)["g"], expected)


def test_a_backward_runs_as_soon_as_its_loss_is_there():
    net, x, g = Chain(), example(), Builder()
    h = g.read("blocks.0", x)
    g.save("g", g.grad(g.backward(g.call("sum", g.read("blocks.1", x))), h))
    found = run(g.graph(), g.constants, net, (x,))
    assert net.calls == [0, 1]
    assert str(found.ended) == "blocks.1.output"


def test_a_backward_that_nobody_needs_does_not_run():
    net, x, g = Chain(), example(), Builder()
    h = g.read("blocks.0", x)
    g.grad(g.backward(sum_of_squares(g, net, x)), h)
    g.save("h", h)
    net.calls.clear()
    run(g.graph(), g.constants, net, (x,))
    assert net.calls == [0]


def test_without_gradients_the_mode_is_off_and_with_them_on():
    modes = []

    def forward(self, x):
        modes.append(torch.is_grad_enabled())
        return self.inner(x)

    net, x = Does(forward, inner=nn.Linear(8, 8)), torch.randn(2, 8)
    g = Builder()
    g.save("h", g.read("inner", x))
    drawn(g, net, x)
    h = g.read("inner", x)
    g.save("g", g.grad(g.backward(g.call("sum", g.mul(h, h))), h))
    drawn(g, net, x)
    assert modes == [False, True]
    assert torch.is_grad_enabled()


def test_nothing_before_the_first_site_that_needs_it_is_followed():
    net, x, asked = Chain(), example(), []
    hooks = [
        block.register_forward_hook(lambda m, a, h: asked.append(h.requires_grad) and None)
        for block in net.blocks
    ]
    g = Builder()
    h = g.read("blocks.2", x)
    since = (site("blocks.2", "inputs"), site("blocks.2"))
    g.save("g", g.grad(g.backward(sum_of_squares(g, net, x), since=since), h))
    drawn(g, net, x)
    for hook in hooks:
        hook.remove()
    # two plain passes made the oracle's shapes: only the last four are the run's
    assert asked[-4:] == [False, False, True, True]


def test_weights_are_still_and_as_before_also_with_several_runs():
    net = Chain()
    net.head.bias.requires_grad_(False)
    before = [p.requires_grad for p in net.parameters()]
    with still(net) as one:
        assert not any(p.requires_grad for p in net.parameters())
        with still(net.blocks) as two:
            two.wake(net.blocks[0].linear.weight)
            one.wake(net.head.weight)
        assert not net.blocks[1].linear.weight.requires_grad
    assert [p.requires_grad for p in net.parameters()] == before


def test_eight_threads_on_one_module():
    net, x = Chain(), example()
    expected = by_hand(net, x, "blocks.1", lambda out: out.pow(2).sum())
    g = Builder()
    h = g.read("blocks.1", x)
    g.save("g", g.grad(g.backward(sum_of_squares(g, net, x)), h))
    graph, wrong = g.graph(), []

    def work():
        for _ in range(20):
            if not torch.equal(run(graph, {}, net, (x,)).saved["g"], expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.parametrize("special", [0.0, -0.0, float("inf"), float("nan"), 1e-45, -3.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_following_changes_no_bit_and_no_version(special, dtype):
    tensor = torch.full((3,), special, dtype=dtype)
    bits, known = tensor.view(torch.uint8).clone(), tensor._version
    follow(tensor)
    assert torch.equal(tensor.detach().view(torch.uint8), bits)
    assert tensor._version == known
    assert tensor.grad_fn is not None
    tensor.mul_(2)  # and it can be changed in place


@pytest.mark.parametrize(
    "make",
    [lambda: torch.randn(6).chunk(3)[0], lambda: torch.randn(1).expand(4)],
    ids=["one of several views", "expanded"],
)
def test_what_cannot_be_added_to_asks_itself(make):
    tensor = make()
    follow(tensor)
    assert tensor.requires_grad


def test_what_the_model_keeps_of_its_tensors_has_no_history_afterwards():
    kept = torch.ones(2, 8)
    children = {"inner": nn.Linear(8, 8), "outer": nn.Identity()}
    net = Does(lambda self, x: self.inner(x + 0) * self.outer(kept), **children)
    x, g = torch.randn(2, 8), Builder()
    h = g.read("outer", kept)
    g.save("g", g.grad(g.backward(g.call("sum", g.read("", x))), h))
    drawn(g, net, x)
    assert kept.grad_fn is None
    assert not kept.requires_grad


def test_a_gradient_that_does_not_arrive_names_the_value():
    net, x, g = Chain(), example(), Builder()
    h = g.read("blocks.2", x)
    b = g.backward(g.call("sum", g.read("blocks.0", x)))
    with pytest.raises((GradientError, LateEditError)):
        g.save("g", g.grad(b, h))
        drawn(g, net, x)


def test_the_callers_tensors_stay_as_they_are():
    net, x, g = Chain(), example(), Builder()
    before = x.clone()
    h = g.read("blocks.0", x, leaf=(0, 0), port="inputs")
    g.save("g", g.grad(g.backward(sum_of_squares(g, net, x)), h))
    drawn(g, net, x)
    assert x.grad_fn is None
    assert torch.equal(x, before)
