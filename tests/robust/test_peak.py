"""Peak memory on a batch of 100 rows: that of the same experiment by hand-written hooks.

`Meter` counts live bytes at every operation, of the model's and of the experiment's. What Weft may
add is stated in activations: `[100, 16, 64]` floats each.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import weft

from .meter import Meter

ROWS, LENGTH, WIDTH, LAYERS = 100, 16, 64, 6
ONE = ROWS * LENGTH * WIDTH * 4
"""Bytes of one activation."""
SMALL = 32_768


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + torch.tanh(self.inner(h))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(ROWS, LENGTH, WIDTH)


@contextmanager
def hooked(hooks: dict[nn.Module, Callable[[torch.Tensor], Any]]):
    """Forward hooks by hand."""
    handles = [
        module.register_forward_hook(lambda m, a, out, f=f: f(out)) for module, f in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Case:
    """An experiment twice. Each gives what it keeps."""

    here: Callable[[Any, torch.Tensor], Any]
    by_hand: Callable[[Net, torch.Tensor], Any]
    extra: float = 0.0  # activations that Weft may have more at its peak


def slices(model, x):
    with model.trace(x):
        kept = weft.save([layer.output[:, -1] for layer in model.layers])
    return kept


@torch.no_grad()
def slices_by_hand(net, x):
    kept = []
    with hooked({one: lambda out: kept.append(out[:, -1].clone()) for one in net.layers}):
        net(x)
    return kept


def wholes(model, x):
    with model.trace(x):
        kept = weft.save([layer.output for layer in model.layers])
    return kept


@torch.no_grad()
def wholes_by_hand(net, x):
    kept = []
    with hooked({one: lambda out: kept.append(out) for one in net.layers}):
        net(x)
    return kept


def cached(model, x):
    with model.trace(x) as tracer:
        cache = tracer.cache(list(model.layers))
    return [cache[f"layers.{i}"].output for i in range(LAYERS)]


def edited(model, x):
    with model.trace(x):
        for layer in model.layers:
            layer.output[:, -1] *= 0.5
        result = model.head.output.save()
    return result


@torch.no_grad()
def edited_by_hand(net, x):
    def halve(out):
        out[:, -1] *= 0.5

    with hooked(dict.fromkeys(net.layers, halve)):
        return net(x)


def replaced(model, x):
    with model.trace(x):
        for layer in model.layers:
            layer.output = layer.output * 2
        result = model.head.output.save()
    return result


@torch.no_grad()
def replaced_by_hand(net, x):
    with hooked({one: lambda out: out * 2 for one in net.layers}):
        return net(x)


def chain(model, x):
    """Long arithmetic of which only one number is kept."""
    with model.trace(x):
        h: Any = model.layers[2].output
        for _ in range(10):
            h = torch.tanh(h)
        total = h.sum().save()
    return total


class Enough(Exception):
    pass


@torch.no_grad()
def chain_by_hand(net, x):
    kept = []

    def work(out):
        for _ in range(10):
            out = torch.tanh(out)
        kept.append(out.sum())
        raise Enough

    with hooked({net.layers[2]: work}), pytest.raises(Enough):
        net(x)
    return kept


def skipped(model, x):
    with model.trace(x):
        model.layers[2].skip(model.layers[1].output)
        model.layers[3].skip(model.layers[2].output * 2)
        result = model.head.output.save()
    return result


@torch.no_grad()
def skipped_by_hand(net, x):
    h = net.layers[1](net.layers[0](x))
    h = h * 2
    return net.head(net.layers[5](net.layers[4](h)))


def stopped(model, x):
    with model.trace(x) as tracer:
        kept = model.layers[1].output.sum().save()
        tracer.stop()
    return kept


@torch.no_grad()
def stopped_by_hand(net, x):
    kept = []

    def end(out):
        kept.append(out.sum())
        raise Enough

    with hooked({net.layers[1]: end}), pytest.raises(Enough):
        net(x)
    return kept


def looked(model, x):
    with model.trace(x):
        if model.layers[3].output.sum() < 1e9:
            result = model.head.output.save()
    return result


@torch.no_grad()
def plain(net, x):
    return net(x)


def gradient(model, x):
    with model.trace(x):
        h = model.layers[3].output
        grad = h.grad.save()
        model.head.output.pow(2).sum().backward()
    return grad


def gradient_by_hand(net, x):
    """Followed from the layer's input on, as what else shares that tensor could be asked for."""
    kept = []

    def follow(out):
        return out.detach().requires_grad_()

    with hooked({net.layers[2]: follow, net.layers[3]: kept.append}):
        return torch.autograd.grad(net(x).pow(2).sum(), kept)


def invokes(model, x):
    with model.trace() as tracer:
        with tracer.invoke(x):
            first = model.layers[1].output[:, -1]
        with tracer.invoke(x):
            model.layers[1].output[:, -1] = first
            result = model.head.output.save()
    return result


@torch.no_grad()
def invokes_by_hand(net, x):
    kept = []

    def end(out):
        kept.append(out[:, -1])
        raise Enough

    with hooked({net.layers[1]: end}), pytest.raises(Enough):
        net(x)

    def put(out):
        out[:, -1] = kept.pop()

    with hooked({net.layers[1]: put}):
        return net(x)


CASES = {
    "slices": Case(slices, slices_by_hand),
    "wholes": Case(wholes, wholes_by_hand),
    "cached": Case(cached, wholes_by_hand),
    "edited": Case(edited, edited_by_hand, extra=1),  # a copy of the caller's input
    "replaced": Case(replaced, replaced_by_hand),
    "chain": Case(chain, chain_by_hand),
    "skipped": Case(skipped, skipped_by_hand),
    "stopped": Case(stopped, stopped_by_hand),
    "looked": Case(looked, plain),
    "gradient": Case(gradient, gradient_by_hand, extra=1),  # as `edited`
    "invokes": Case(invokes, invokes_by_hand, extra=1),  # as `edited`
}


def measured(run: Callable[[Any, Any], Any], net: Any, x: torch.Tensor) -> tuple[int, int, int]:
    """Peak bytes, bytes that are left while the result is kept, and after it."""
    with Meter() as meter:
        kept = run(net, x)
        held = meter.left()
        del kept
        return meter.peak, held, meter.left()


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_that_of_hooks(net: Net, x: torch.Tensor, name: str) -> None:
    case, model = CASES[name], weft.Model(net)
    case.here(model, x)  # learns the shapes
    peak, held, left = measured(case.here, model, x)
    by_hand, held_by_hand, _ = measured(case.by_hand, net, x)
    assert held == held_by_hand
    assert left == 0
    assert ONE < peak <= by_hand + case.extra * ONE + SMALL


# --- what is left ---------------------------------------------------------------------------------


def block_raises(model, x):
    with pytest.raises(ZeroDivisionError), model.trace(x) as tracer:
        model.layers[1].output.save()
        1 / 0
    return tracer


def step_raises(model, x):
    """In the middle of the pass, when something is saved already and something waits."""
    far = torch.tensor([99])
    with pytest.raises(IndexError), model.trace(x) as tracer:
        early = model.layers[0].output
        model.layers[1].output.save()
        h = model.layers[2].output
        h[:, far + (h[0, 0, 0] * 0).long()].save()
        (early + model.layers[4].output).save()
    return tracer


def gradient_raises(model, x):
    far = torch.tensor([99])
    with pytest.raises(IndexError), model.trace(x) as tracer:
        grad = model.layers[2].output.grad
        model.head.output.sum().backward()
        grad[:, far + (grad[0, 0, 0] * 0).long()].save()
    return tracer


def look_then_raises(model, x):
    with pytest.raises(ZeroDivisionError), model.trace(x) as tracer:
        if model.layers[3].output.sum() < 1e9:
            1 / 0
    return tracer


def invoke_raises(model, x):
    far = torch.tensor([99])
    with pytest.raises(IndexError), model.trace() as tracer:
        with tracer.invoke(x):
            first = model.layers[1].output
        with tracer.invoke(x):
            model.layers[1].output[:] = first
            h = model.layers[2].output
            h[:, far + (h[0, 0, 0] * 0).long()].save()
    return tracer


def stopped_with_rests(model, x):
    """What stands below the stop is not reached, and what waits for it waits in vain."""
    with model.trace(x) as tracer:
        early = model.layers[0].output * 2
        tracer.stop()
        missed = (early + model.layers[3].output).save()
    return tracer, missed


def unsaved(model, x):
    with model.trace(x) as tracer:
        model.layers[3].skip(model.layers[2].output)
        handles = [layer.output * 2 for layer in model.layers]
        grad = model.layers[1].output.grad
        model.head.output.sum().backward()
        (grad * 2).sum().save()
    return tracer, handles, grad


LEAVES_NOTHING = [
    block_raises,
    step_raises,
    gradient_raises,
    look_then_raises,
    invoke_raises,
    stopped_with_rests,
    unsaved,
]


@pytest.mark.parametrize("run", LEAVES_NOTHING, ids=lambda run: run.__name__)
def test_nothing_is_held_that_was_not_saved(net: Net, x: torch.Tensor, run: Any) -> None:
    """Though tracer and handles are kept; constants and single numbers are small."""
    model = weft.Model(net)
    run(model, x)
    _, held, left = measured(run, model, x)
    assert held < SMALL
    assert left == 0


def test_memory_is_dropped_while_the_pass_goes_on(net: Net, x: torch.Tensor) -> None:
    """At the end of the model nothing of its beginning is there but what was saved."""
    model = weft.Model(net)
    seen: list[int] = []
    with Meter() as meter:
        hook = net.head.register_forward_pre_hook(lambda *_: seen.append(meter.left()))
        try:
            with model.trace(x):
                early = model.layers[0].output
                kept = (early * 2)[:, -1].save()
                (model.layers[2].output + early).mean().save()
                model.head.output.sum().save()
        finally:
            hook.remove()
    assert kept.shape == (ROWS, WIDTH)
    assert max(seen) <= ONE + kept.nbytes + SMALL
