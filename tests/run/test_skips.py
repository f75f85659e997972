"""Skips and stops in the loop, without a model, and the stand-in for a module's forward."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from tests.run.graphs import Builder, site
from tests.run.nets import Chain, example, same
from tests.run.test_interpreter import NoModel, drive
from weft.errors import GraphError, LateEditError
from weft.graph.node import Skip, Stop
from weft.graph.site import Site
from weft.run import run
from weft.run.interpreter import Interpreter
from weft.sources.stand import NOTHING, stand_down, stand_in

X = example()


def begun(path):
    return Site(path, "inputs")


def skip(g, path, *values, **fields):
    g.add(Skip, site=site(path), values=values, **fields)


def fired(g, *firings, told=None):
    """The loop after these firings of begins and outputs."""
    loop = Interpreter(g.graph(), g.constants, NoModel(), overwritten=told)
    with torch.no_grad():
        loop.begin()
        for where, value in firings:
            loop.fire(where, value)
    return loop


def test_a_skip_is_there_when_the_module_begins():
    g = Builder()
    skip(g, "a", g.mul(g.read("a", X, port="inputs", leaf=(0, 0)), 2.0))
    loop = fired(g, (begun("a"), ((X,), {})))
    assert list(loop.given) == [site("a")]
    same(loop.given[site("a")], X * 2)
    assert loop.finished


def test_a_skip_that_waits_is_late():
    g = Builder()
    skip(g, "a", g.read("b", X))
    with pytest.raises(LateEditError) as caught:
        fired(g, (begun("a"), ((X,), {})))
    assert "user.py:101" in str(caught.value) and "user.py:100" in str(caught.value)


def test_what_is_given_is_the_models_to_change():
    """A constant, a saved value, the input itself: each is copied before it is handed over."""
    constant = torch.ones_like(X)
    g = Builder()
    h = g.read("a", X, port="inputs", leaf=(0, 0))
    skip(g, "a", h)
    g.save("h", h)
    skip(g, "b", g.const(constant))
    loop = fired(g, (begun("a"), ((X,), {})), (begun("b"), ((X,), {})))
    for given in loop.given.values():
        given.zero_()
    assert X.abs().max() > 0 and constant.all()
    same(loop.end()["h"], X)


def test_a_structure_must_be_known():
    g = Builder()
    skip(g, "a", g.read("b", X), leaves=((0,),))
    with pytest.raises(GraphError, match=r"structure of a\.output is not known"):
        fired(g, (site("b"), X), (begun("a"), ((X,), {})))


def test_a_stop_leaves_the_rest_out():
    g = Builder()
    h = g.read("a", X)
    g.save("a", h)
    g.add(Stop)
    g.save("b", g.read("b", X))
    g.save("both", [h, g.read("b", X)])
    saved, _ = drive(g, [("a", X)])
    assert set(saved) == {"a", "both"}
    same(saved["both"][0], X)
    assert saved["both"][1] is None


def test_a_stop_waits_for_what_stands_before_it():
    g = Builder()
    g.save("b", g.read("b", X))
    g.add(Stop)
    g.save("c", g.read("c", X))
    loop = fired(g, (site("a"), X))
    assert not loop.finished and len(loop.sites) == 2
    loop.fire(site("b"), X)
    assert loop.finished
    assert set(loop.end()) == {"b"}


@pytest.mark.parametrize("number", [0.0, 1.0])
def test_a_condition(number):
    g = Builder()
    g.add(Stop, condition=g.call("sum", g.mul(g.read("a", X), number)))
    g.save("b", g.read("b", X))
    saved, _ = drive(g, [("a", torch.ones_like(X)), ("b", X)])
    assert set(saved) == (set() if number else {"b"})


def test_a_value_whose_edit_was_not_reached_is_not_the_edited_one():
    g = Builder()
    h = g.read("a", X)
    g.add(Stop)
    g.call("Tensor.add_", h, g.read("b", X), alias=(h,), writes=(h,))
    g.save("h", h)
    saved, _ = drive(g, [("a", X)])
    assert saved == {}


def test_a_condition_of_many_numbers():
    g = Builder()
    g.add(Stop, condition=g.read("a", X))
    with pytest.raises(GraphError, match="one number, not on 48"):
        drive(g, [("a", X)])


def test_a_later_edit_does_not_reach_what_was_given():
    g = Builder()
    h = g.mul(g.read("b", X), 1.0)
    skip(g, "a", h)
    g.mul_(h, 0.0)
    g.save("h", h)
    loop = fired(g, (site("b"), X), (begun("a"), ((X,), {})))
    same(loop.given[site("a")], X)
    assert not loop.end()["h"].any()


# -- the stand-in ----------------------------------------------------------------------------------


def test_through_a_module():
    net = Chain()
    g = Builder()
    skip(g, "blocks.1", g.read("blocks.0", X))
    g.save("end", g.read("head", (2, 3, 5)))
    found = run(g.graph(), g.constants, net, (X,)).saved["end"]
    with torch.no_grad():
        x = net.blocks[0](X)
        for block in net.blocks[2:]:
            x = block(x)
        same(found, net.head(x))
    assert not [m for m in net.modules() if "forward" in vars(m)]


def test_a_forward_of_the_modules_own_comes_back():
    """accelerate puts its own into the instance."""
    net = nn.Linear(2, 2)
    own = lambda x: x + 1
    net.forward = own
    ask = lambda *call: NOTHING
    stand_in(net, ask)
    stand_in(net, ask)
    assert torch.equal(net(torch.ones(2)), torch.full((2,), 2.0))
    stand_down(net, ask)
    assert net.forward is not own
    stand_down(net, ask)
    assert net.forward is own
    stand_down(net, ask)
    assert net.forward is own


def test_many_threads_put_it_in_and_take_it_away():
    net = nn.Linear(3, 3)
    x = torch.ones(3)
    with torch.no_grad():
        expected = net(x)
    wrong = []

    def work():
        for _ in range(300):
            ask = lambda *call: NOTHING
            stand_in(net, ask)
            with torch.no_grad():
                if not torch.equal(net(x), expected):
                    wrong.append(1)
            stand_down(net, ask)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and "forward" not in vars(net)
