"""Prices: figures from shapes alone, checked against the run itself."""

from __future__ import annotations

import pytest
import torch

from tests.run.graphs import Builder
from tests.run.nets import Chain, example
from weft.errors import GraphError
from weft.graph.node import Apply
from weft.run import run
from weft.run.price import Price, price

FLOAT = 4


def order(*paths):
    return {(path, "output", 0): index for index, path in enumerate(paths)}


def test_the_last_site_by_firing_order_is_where_the_run_ends():
    g, x = Builder(), example()
    g.save("late", g.read("blocks.2", x))
    g.save("early", g.read("blocks.0", x))
    found = price(g.graph(), order("blocks.0", "blocks.1", "blocks.2"))
    assert found.ends == run(g.graph(), {}, Chain(), (x,)).ended
    assert found.sites == 2
    assert price(g.graph(), lambda site: -int(site.path[-1])).ends.path == "blocks.0"


def test_operations_flops_and_bytes():
    g, x = Builder(), torch.randn(4, 8)
    h = g.read("a", x)
    product = g.call("mm", h, g.const(torch.ones(8, 5)))
    g.call("mm", h, g.const(torch.ones(8, 100)))  # dead: costs nothing
    g.save("product", product)
    g.save("pair", (product, g.item(h, 0)))
    found = price(g.graph(), order("a"))
    assert found.operations == 2
    assert found.flops == 2 * 4 * 8 * 5
    assert found.constant_bytes == 8 * 5 * FLOAT
    assert found.saved_bytes == (2 * 4 * 5 + 8) * FLOAT


def peak(g, *paths):
    return price(g.graph(), order(*paths)).peak_bytes / FLOAT


def test_memory_follows_the_life_of_values():
    x = torch.randn(100)
    chain = Builder()
    h = chain.read("a", x)
    for _ in range(10):
        h = chain.mul(h, 2.0)
    chain.save("h", h)
    assert peak(chain, "a") == 200  # one value and the next
    wide = Builder()
    h = wide.read("a", x)
    wide.save("all", [wide.mul(h, 2.0) for _ in range(10)])
    assert peak(wide, "a") == 1100


def test_values_that_wait_for_a_later_site_stay_alive():
    x = torch.randn(100)
    g = Builder()
    early = [g.read(path, x) for path in "abc"]
    g.save("sum", g.call("sum", g.call("stack", [*early, g.read("d", x)])))
    assert peak(g, *"abcd") == 4 * 100 + 400
    g = Builder()
    g.save("sums", [g.call("sum", g.read(path, x)) for path in "abcd"])
    assert peak(g, *"abcd") == 100 + 4


def test_views_and_edits_in_place_are_free_and_copies_of_saves_are_not():
    x = torch.randn(100)
    g = Builder()
    h = g.read("a", x)
    g.mul_(g.item(h, slice(0, 50)), 2.0)
    g.fill("a", h)
    g.save("h", h)
    assert peak(g, "a") == 100
    g.save("again", h)
    g.save("slice", g.item(h, slice(0, 10)))
    assert peak(g, "a") == 210


def test_weights_are_the_models_own():
    g = Builder()
    g.save("sum", g.call("sum", g.param("head.weight", torch.ones(5, 8))))
    found = price(g.graph(), {})
    assert found.peak_bytes == FLOAT and found.ends is None


def test_the_shape_of_an_applied_module():
    g, x = Builder(), torch.randn(4, 8)
    h = g.read("a", x)
    logits = g.add(Apply, path="head", args=(h,), types=(("float32", (4, 5)),), outs=1)
    g.save("logits", logits)
    assert price(g.graph(), order("a")).saved_bytes == 4 * 5 * FLOAT
    g = Builder()
    g.save("logits", g.apply("head", g.read("a", x)))
    with pytest.raises(GraphError, match="'head' gives is not known"):
        price(g.graph(), order("a"))


def test_a_shape_that_depends_on_numbers_is_told_by_its_guard():
    g, x = Builder(), torch.randn(4, 8)
    h = g.read("a", x)
    picked = g.call("masked_select", h, g.call("gt", h, 0.0))
    where = g.call("nonzero", h)
    g.save("picked", picked)
    g.save("where", where)
    with pytest.raises(GraphError, match="masked_select depends on numbers") as caught:
        price(g.graph(), order("a"))
    assert caught.value.line == "user.py:102"
    g.guard(picked, (17,), "shape")
    g.guard(where, (17, 2), "shape")
    assert price(g.graph(), order("a")).saved_bytes == 17 * FLOAT + 34 * 8


def test_a_price_is_a_table():
    from weft.graph.site import Site

    text = str(Price(2, 3, 1_500_000, 512, 1536, 3 * 2**20, Site("h.2", "output")))
    assert text.splitlines() == [
        "sites        2",
        "operations   3",
        "flops        1.5 M",
        "constants    512 B",
        "saved        1.5 KB",
        "peak memory  3.0 MB",
        "ends at      h.2.output",
    ]
