"""Gradients of an enemy: refused with a reason before the model runs, or within their limits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.engine.bench import Bench
from tests.engine.enemy import Gate, Raw, X
from tests.engine.test_hostile_graphs import refused, try_all
from tests.run.graphs import Builder
from tests.run.nets import Chain
from weft.errors import LimitError
from weft.graph.gradients import MAX_BACKWARDS
from weft.graph.node import Backward, Grad, Ref, Regrad
from weft.graph.site import Site

Attack = Callable[[Raw, Ref, Ref, int], Any]


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate()


@pytest.fixture(autouse=True)
def _the_model_never_ran(gate: Gate) -> Any:
    gate.net.ran.clear()
    yield
    assert not gate.net.ran


def built(attack: Attack) -> Raw:
    g = Raw()
    h = g.read("blocks.0", X)
    k = g.call("sum", g.read("blocks.1", X))
    b = g.backward(k, since=(Site("blocks.0", "inputs"),))
    attack(g, h, k, b)
    g.save("value", g.grad(b, h))
    return g


def test_what_is_not_attacked_is_admitted(gate: Gate) -> None:
    def fine(g: Raw, h: Ref, k: Ref, b: int) -> None:
        g.regrad(b, h, g.mul(g.grad(b, h), 2.0))
        c = g.backward(g.call("sum", g.grad(b, h)), create=True)
        g.save("zeros", g.grad(c, h, zeros=True))

    g = built(fine)
    for form in ("msgpack", "json"):
        assert gate.send(g.data(), g.frames(), form).graph.nodes


LIES: dict[str, Attack] = {
    "a backward that is none": lambda g, h, k, b: g.save("x", g.grad(0, h)),
    "a backward that is not there": lambda g, h, k, b: g.save("x", g.grad(99, h)),
    "a backward below zero": lambda g, h, k, b: g.save("x", g.grad(-1, h)),
    "a backward that comes later": lambda g, h, k, b: (
        g.save("x", g.grad(len(g.nodes) + 2, h)),
        g.backward(k),
    ),
    "the gradient of what comes after": lambda g, h, k, b: g.save("x", g.grad(b, g.mul(h, 2.0))),
    "the gradient of itself": lambda g, h, k, b: g.save("x", g.grad(b, Ref(len(g.nodes)))),
    "the gradient of nothing": lambda g, h, k, b: g.save("x", g.grad(b, Ref(77))),
    "no loss": lambda g, h, k, b: g.add(Backward, losses=()),
    "a loss of itself": lambda g, h, k, b: g.backward(Ref(len(g.nodes))),
    "a backward of a backward": lambda g, h, k, b: g.backward(Ref(b)),
    "more gradients than losses": lambda g, h, k, b: g.add(Backward, losses=(k,), seeds=(k, k)),
    "a replacement that is not there": lambda g, h, k, b: g.regrad(b, h, Ref(88)),
    "a replacement of another shape": lambda g, h, k, b: g.regrad(b, h, k),
    "a replacement of another kind": lambda g, h, k, b: g.regrad(b, h, g.call("argsort", h)),
    "a place that there is not": lambda g, h, k, b: _asked(
        g, h, g.backward(k, since=(Site("blocks.9", "output"),))
    ),
    "a place of Python's": lambda g, h, k, b: _asked(
        g, h, g.backward(k, since=(Site("blocks.0.__class__", "output"),))
    ),
    "an impossible port": lambda g, h, k, b: _asked(
        g, h, g.backward(k, since=(Site("blocks.0", "forward"),))
    ),
    "a place of no invoke": lambda g, h, k, b: _asked(
        g, h, g.backward(k, since=(Site("blocks.0", "output", invoke=3),))
    ),
    "a loss of whole numbers": lambda g, h, k, b: _asked(g, h, g.backward(g.call("argmax", h))),
    "a loss of many numbers": lambda g, h, k, b: _asked(g, h, g.backward(h)),
    "a loss on which nothing depends": lambda g, h, k, b: _asked(
        g, g.mul(h, 2.0), g.backward(g.call("sum", h))
    ),
    "the gradient of whole numbers": lambda g, h, k, b: _whole(g, h, k),
    "places without end": lambda g, h, k, b: g.backward(
        k, since=(Site("blocks.0", "output"),) * 5000
    ),
}


def _asked(g: Raw, h: Ref, backward: int) -> None:
    g.save("x", g.grad(backward, h))


def _whole(g: Raw, h: Ref, k: Ref) -> None:
    order = g.call("argsort", h)
    loss = g.call("sum", g.call("gather", h, -1, order))
    g.save("x", g.grad(g.backward(loss), order))


@pytest.mark.parametrize("name", LIES)
def test_lies_and_broken_rules(gate: Gate, tmp_path: Any, name: str) -> None:
    g = built(LIES[name])
    try_all(gate, tmp_path, g.data(), g.frames())


@pytest.mark.parametrize("kind", [Backward, Grad, Regrad])
@pytest.mark.parametrize("junk", [None, -3, "x", [[]], {}, [["__class__"]], 10**30])
def test_fields_of_other_kinds(gate: Gate, kind: Any, junk: Any) -> None:
    g = built(lambda g, h, k, b: g.regrad(b, h, h))
    number = next(n for n, node in enumerate(g.nodes) if isinstance(node, kind))
    for field in ("losses", "of", "backward", "value", "kind"):
        data = g.data()
        if field in data["nodes"][number]:
            data["nodes"][number][field] = junk
            refused(gate.send, data, {}, "json")
    data = g.data()
    data["nodes"][number]["hook"] = "import os"
    refused(gate.send, data, {}, "json")


def test_more_backwards_than_there_may_be(gate: Gate) -> None:
    def many(g: Raw, h: Ref, k: Ref, b: int) -> None:
        for _ in range(MAX_BACKWARDS):
            g.backward(k)

    g = built(many)
    assert "backwards" in refused(gate.send, g.data(), {}, "msgpack").message


def test_thousands_of_backwards_are_checked_and_priced_quickly() -> None:
    """In time that grows with the graph, not with its square; each costs what a pass costs."""
    g = Builder()
    h = g.read("blocks.0", X)
    k = g.read("head", (2, 3, 5))
    for n in range(1000):
        g.save(f"g{n}", g.grad(g.backward(g.call("sum", k)), h))
    began = time.monotonic()
    many = Bench(Chain()).price(g)
    assert time.monotonic() - began < 60  # a limit, no measurement
    g = Builder()
    h, k = g.read("blocks.0", X), g.read("head", (2, 3, 5))
    g.save("g", g.grad(g.backward(g.call("sum", k)), h))
    assert many.flops > 900 * Bench(Chain()).price(g).flops


def test_gradients_of_gradients_without_end_are_refused_for_what_they_cost() -> None:
    """Each may triple what there is to differentiate."""
    g = Builder()
    h = g.read("blocks.0", X)
    loss = g.call("sum", g.call("exp", h))
    for _ in range(40):
        gradient = g.grad(g.backward(loss, create=True), h)
        loss = g.call("sum", g.mul(gradient, gradient))
    g.save("end", loss)
    with pytest.raises(LimitError, match="flops"):
        Bench(Chain()).price(g)


def test_what_the_forward_keeps_alive_counts() -> None:
    """At least the tensors at the sites in between."""
    x = torch.randn(64, 128, 8)
    g = Builder()
    h = g.read("blocks.0", x)
    g.save("norm", g.call("sum", g.grad(g.backward(g.call("sum", g.read("blocks.3", x))), h)))
    bench = Bench(Chain(), x)
    assert bench.price(g).peak_bytes > 3 * 4 * x.nbytes
    with pytest.raises(LimitError, match="memory_bytes"):
        bench.price(g, memory_bytes=3 * x.nbytes)


def test_drawn_as_on_the_users_machine() -> None:
    bench = Bench(Chain())
    g = Builder()
    h = g.read("blocks.1", X)
    b = g.backward(g.call("sum", g.call("pow", g.read("head", (2, 3, 5)), 2)))
    g.save("g", g.grad(b, h))
    bench.price(g)
    local, drawn = bench.local(g), bench.draw(g)
    assert torch.equal(local["g"], drawn["g"])
    assert all(p.grad is None and p.requires_grad for p in bench.net.parameters())
