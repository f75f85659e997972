"""Slices that wait to be saved hold nothing but themselves, and are what they were."""

from __future__ import annotations

import torch

from tests.run.graphs import Builder
from tests.run.nets import Chain, example
from weft.run import run
from weft.run.plan import plan
from weft.run.price import price
from weft.testing.same import bitwise


def cuts(graph):
    return {slot for step in plan(graph).steps if step is not None for slot in step.cuts}


def two_slices(after=lambda g, h, part: None):
    g, x = Builder(), example()
    h = g.read("blocks.0", x)
    part = g.item(h, slice(0, 1))
    after(g, h, part)
    other = g.item(g.read("blocks.2", x), slice(0, 1))
    g.save("both", [part, other])
    return g.graph()


def by_hand():
    net, outs = Chain(), []
    hooks = [net.blocks[i].register_forward_hook(lambda *a: outs.append(a[2])) for i in (0, 2)]
    with torch.no_grad():
        net(example())
    for hook in hooks:
        hook.remove()
    return [out[0:1].clone() for out in outs]


def test_slices_of_one_save_are_cut_and_equal_those_of_hooks():
    graph = two_slices()
    assert len(cuts(graph)) == 2
    saved = run(graph, {}, Chain(), (example(),)).saved["both"]
    bitwise(saved, by_hand())
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in saved)


def test_a_slice_that_is_used_or_changed_is_not_cut():
    assert len(cuts(two_slices(lambda g, h, part: g.save("sum", g.call("sum", part))))) == 1
    assert len(cuts(two_slices(lambda g, h, part: g.mul_(h, 2.0)))) == 1
    assert len(cuts(two_slices(lambda g, h, part: g.mul_(part, 2.0)))) == 1


def test_an_edit_below_the_slice_is_seen_as_ever():
    """The save stands below the edit of the whole: its slice has it."""

    def edit(g, h, part):
        g.mul_(h, 0.0)

    saved = run(two_slices(edit), {}, Chain(), (example(),)).saved["both"]
    assert not saved[0].any() and saved[1].any()


def test_a_save_of_one_value_needs_none():
    g, x = Builder(), example()
    g.save("part", g.item(g.read("blocks.0", x), slice(0, 1)))
    assert not cuts(g.graph())


def test_the_price_knows_it():
    wide = torch.randn(100, 4)
    g = Builder()
    g.save("all", [g.item(g.read(path, wide), slice(0, 1)) for path in "abcdefgh"])
    order = {(path, "output", 0): n for n, path in enumerate("abcdefgh")}
    assert price(g.graph(), order).peak_bytes <= 2 * wide.nbytes
