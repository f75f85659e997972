"""Pricing a stranger's graph: the same price as on the user's machine, and every limit held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.bench import Bench, limits
from tests.run.graphs import Builder
from tests.run.nets import Chain, Does, Record, example
from weft.engine.admit import admit
from weft.errors import (
    GraphError,
    GuardError,
    LateEditError,
    LimitError,
    NotReachedError,
    ReadOnlyError,
    RecordingError,
    ResultTooLargeError,
    SiteMismatchError,
    UnknownPathError,
    UnsupportedOperationError,
    WriteMismatchError,
)
from weft.families.call import ModelCall
from weft.graph.node import Apply, Ref
from weft.run.price import price


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(Chain())


@pytest.fixture
def g() -> Builder:
    return Builder()


X = example()


def order_of(bench: Bench) -> Any:
    signature = bench.known.signatures.for_call(bench.call.args, {})
    return lambda site: signature.site(site.path, site.port, site.call).index


# The same price as the user's plan


def _reads(g: Builder) -> None:
    g.save("h", [g.read("blocks.1", X), {"head": g.read("head", (2, 3, 5))}])


def _edits(g: Builder) -> None:
    h = g.read("blocks.1", X)
    g.mul_(g.item(h, slice(None), -1), 0.5)
    g.fill("blocks.1", h)
    g.save("end", g.read("head", (2, 3, 5)))


def _writes(g: Builder) -> None:
    c = g.const(torch.ones(2, 3, 8))
    g.write("blocks.2", g.mul(g.read("blocks.0", X), c))
    g.save("end", g.read("head", (2, 3, 5)))


def _weights(g: Builder) -> None:
    w = g.param("head.weight", torch.ones(5, 8))
    g.save("logits", g.call("nn.functional.linear", g.read("blocks.3", X), w))


def _random(g: Builder) -> None:
    noise = g.call("randn_like", g.read("blocks.3", X), draw=0)
    g.save("noise", g.add2(noise, g.call("rand", (2, 3, 8), draw=1)))


def _looks(g: Builder) -> None:
    h = g.read("blocks.3", X)
    found = g.call("nonzero", g.call("gt", h, 0.0))
    g.guard(found, (20, 3), "shape")
    g.save("found", g.add2(found, 1))


def _many(g: Builder) -> None:
    values = g.call("topk", g.read("blocks.1", X), 2, outs=2)
    g.log("the best", values, [g.out(values, 1)])
    g.save("best", (values, g.out(values, 1), None, "text", slice(1, 2)))


GRAPHS = (_reads, _edits, _writes, _weights, _random, _looks, _many)


@pytest.mark.parametrize("make", GRAPHS)
def test_the_price_is_that_of_the_users_plan(bench, g, make):
    make(g)
    here = price(g.graph(), order_of(bench))
    there = bench.price(g)
    for name in ("sites", "operations", "flops", "constant_bytes", "saved_bytes", "peak_bytes"):
        assert getattr(there, name) == getattr(here, name), name
    assert there.ends == here.ends
    assert there.sites or there.operations


def test_applying_a_module_costs_what_its_weights_do(bench, g):
    g.save("logits", apply(g, "head", g.read("blocks.1", X), (2, 3, 5)))
    assert bench.price(g).flops == 2 * (5 * 8 + 5) * 6  # each parameter meets each of six rows


def apply(g: Builder, path: str, x: Ref, *shapes: tuple[int, ...]) -> Ref:
    """A module applied to `x`, said to give float32 tensors of these shapes."""
    types = tuple(("float32", shape) for shape in shapes)
    return g.add(Apply, path=path, args=(x,), outs=len(shapes), types=types)


def test_nothing_of_the_model_runs_for_a_price(g):
    net = Chain()
    bench = Bench(net)
    _edits(g)
    bench.price(g)
    net.calls.clear()
    bench.price(g)
    assert not net.calls  # not even on fake tensors, once the sites are known


# Limits, each by name


def _big(g: Builder) -> None:
    g.save("zeros", g.call("zeros", (1000, 1000)))


def test_too_many_nodes(bench, g):
    h = g.read("blocks.1", X)
    for _ in range(20):
        h = g.mul(h, 2.0)
    g.save("h", h)
    assert bench.price(g, nodes=22)
    with pytest.raises(LimitError, match=r"nodes and their results are 22.*nodes is 21"):
        bench.price(g, nodes=21)


def test_results_count_as_nodes(bench, g):
    row = g.call("zeros", (50,))
    parts = g.call("unbind", row, outs=50, alias=(row,) * 50)
    g.save("part", g.out(parts, 49))
    assert bench.price(g, nodes=52)
    with pytest.raises(LimitError, match="nodes"):
        bench.price(g, nodes=40)


def test_too_large_a_constant(bench, g):
    g.save("c", g.const(torch.zeros(100)))
    assert bench.price(g, constant_bytes=400)
    with pytest.raises(LimitError, match="constant_bytes") as caught:
        bench.price(g, constant_bytes=399)
    assert caught.value.line == "user.py:100"


def test_too_many_flops(bench, g):
    a = g.call("ones", (100, 200))
    b = g.call("ones", (200, 50))
    g.save("ab", g.call("mm", a, b))
    flops = bench.price(g).flops
    assert 2 * 100 * 200 * 50 <= flops < 2.2 * 100 * 200 * 50
    assert bench.price(g, flops=flops)
    with pytest.raises(LimitError, match="flops") as caught:
        bench.price(g, flops=flops - 1)
    assert caught.value.line == "user.py:102"


def test_too_much_memory(bench, g):
    _big(g)
    assert bench.price(g, memory_bytes=4_000_000)
    with pytest.raises(LimitError, match="memory_bytes") as caught:
        bench.price(g, memory_bytes=3_999_999)
    assert caught.value.line == "user.py:100"


def test_memory_is_what_is_alive_at_once(bench, g):
    for _ in range(10):
        g.save(f"sum {len(g.nodes)}", g.call("sum", g.call("zeros", (1000, 1000))))
    assert bench.price(g, memory_bytes=4_001_000)


def test_too_large_a_result(bench, g):
    _big(g)
    assert bench.price(g, result_bytes=4_000_000)
    with pytest.raises(ResultTooLargeError, match=r"'zeros' 3.8 MB.*result_bytes") as caught:
        bench.price(g, result_bytes=3_999_999)
    assert caught.value.line == "user.py:101" and "slice" in caught.value.fix


def test_a_saved_view_counts_as_what_is_brought_back(bench, g):
    row = g.call("zeros", (1, 1000))
    g.save("rows", g.call("broadcast_to", row, (1000, 1000), alias=(row,)))
    with pytest.raises(ResultTooLargeError):
        bench.price(g, result_bytes=3_999_999)


def test_too_long_to_price(bench, g):
    _big(g)
    with pytest.raises(LimitError, match="price_seconds"):
        bench.price(g, price_seconds=0.0)


def test_too_long_an_input(bench):
    call = ModelCall((torch.zeros(1, 4096, 8),))
    g = Builder()
    g.save("h", g.read("blocks.0", (1, 4096, 8)))
    assert admit(g.graph(), call, bench.known, limits(memory_bytes=131_072))
    g = Builder()
    g.save("end", g.read("head", (1, 4096, 5)))  # what the model holds before is larger
    with pytest.raises(LimitError, match=r"a tensor of the model itself takes 128\.0 KB"):
        admit(g.graph(), call, bench.known, limits(memory_bytes=131_071))


# What an operation hides


INNER = {
    "an expanded tensor made whole": lambda g, e: g.call("logsumexp", e, -1),
    "two that expand together": lambda g, e: g.call(
        "sum", g.call("isclose", g.call("zeros", (5000, 1)), g.call("zeros", (1, 5000)))
    ),
    "einsum of three": lambda g, e: g.call(
        "einsum",
        "a,b,c->a",
        *[g.call("zeros", (1000,)) for _ in range(3)],
    ),
    "attention": lambda g, e: g.call(
        "nn.functional.scaled_dot_product_attention",
        *[g.call("zeros", (1, 1, 5000, 1)) for _ in range(3)],
    ),
    "nonzero": lambda g, e: _told(g, g.call("nonzero", g.call("zeros", (1000, 1000))), (0, 2)),
    "a mask as an index": lambda g, e: _masked(g),
    "bincount with a size": lambda g, e: _told(
        g, g.call("bincount", g.call("arange", 3), None, 10**7), (10**7,)
    ),
    "a log": lambda g, e: g.log(g.call("sum", e), e),
}


def _told(g: Builder, x: Any, shape: tuple[int, ...]) -> Any:
    g.guard(x, shape, "shape")
    return x


def _masked(g: Builder) -> Any:
    x = g.call("zeros", (1000, 1000))
    mask = g.call("eq", x, 0.0)
    return _told(g, g.call("Tensor.__getitem__", x, mask), (0,))


@pytest.mark.parametrize("name", INNER)
def test_memory_inside_an_operation_counts(bench, g, name):
    row = g.call("zeros", (1, 1, 1))
    wide = g.call("broadcast_to", row, (300, 300, 300), alias=(row,))
    x = INNER[name](g, wide)
    g.save("x", g.call("sum", x) if name != "a log" else row)
    assert bench.price(g, memory_bytes=8 << 30)
    with pytest.raises(LimitError, match="memory_bytes"):
        bench.price(g, memory_bytes=8_900_000)


# Held against the model


def refused(bench: Bench, g: Builder, kind: type[Exception], match: str, strict=True) -> None:
    with pytest.raises(kind, match=match) as caught:
        bench.price(g, strict)
    assert caught.value.line and caught.value.line.startswith("user.py:"), caught.value


def test_a_path_that_is_not_there_names_the_nearest(bench, g):
    g.save("h", g.read("block.1", X))
    refused(bench, g, UnknownPathError, "no module 'block.1'")
    with pytest.raises(UnknownPathError, match=r"nearest are .*blocks\.1"):
        bench.price(g)


def test_a_call_that_does_not_happen(bench, g):
    g.save("h", g.read("blocks.1", X, call=1))
    refused(bench, g, NotReachedError, "called 1 times")


@pytest.mark.parametrize("like", [torch.ones(2, 4, 8), torch.ones(2, 3, 8, dtype=torch.float64)])
def test_a_site_of_another_type(bench, g, like):
    g.save("h", g.read("blocks.1", like))
    refused(bench, g, SiteMismatchError, "blocks.1.output is float32")


def test_a_leaf_that_is_not_there(bench, g):
    g.save("h", g.read("blocks.1", X, leaf=(0,)))
    refused(bench, g, SiteMismatchError, "no tensor at")


def test_a_write_of_another_shape(bench, g):
    g.write("blocks.1", g.call("zeros", (2, 3, 9)))
    refused(bench, g, WriteMismatchError, "is written to it")


def test_a_weight_of_another_type(bench, g):
    g.save("w", g.param("head.weight", torch.ones(5, 9)))
    refused(bench, g, GraphError, "head.weight")


def test_a_late_edit(bench, g):
    g.write("blocks.1", g.read("blocks.2", X))
    refused(bench, g, LateEditError, "blocks.1")


@pytest.mark.parametrize("shapes", [[(2, 3, 8)], [(2, 3, 5), (1,)]])
def test_what_a_module_gives_is_looked_at(bench, g, shapes):
    g.save("y", apply(g, "head", g.read("blocks.1", X), *shapes))
    refused(bench, g, GraphError, "not what the graph says")


def test_a_module_that_cannot_take_it(bench, g):
    g.save("y", apply(g, "head", g.read("head", (2, 3, 5)), (2, 3, 5)))
    refused(bench, g, RecordingError, "head cannot take these arguments")


def test_an_operation_that_cannot_take_it(bench, g):
    h = g.read("blocks.1", X)
    g.save("y", g.call("mm", h, h))
    refused(bench, g, GraphError, "torch.mm cannot take these arguments")


def test_a_result_that_cannot_be_put_where_it_should_go(bench, g):
    h = g.call("gt", g.read("blocks.1", X), 0.0)
    g.save("y", g.call("Tensor.mul_", h, 2.5, alias=(h,), writes=(h,)))
    refused(bench, g, WriteMismatchError, "torch.Tensor.mul_ cannot put its result into")


def test_how_many_results_an_operation_has(bench, g):
    h = g.read("blocks.1", X)
    g.save("y", g.call("topk", h, 2, outs=3))
    refused(bench, g, GraphError, "gives 2 tensors here, not 3")


def test_what_an_operation_changes(bench, g):
    h = g.read("blocks.1", X)
    g.save("y", g.call("Tensor.mul_", h, 2.0, alias=(h,)))
    refused(bench, g, GraphError, "changes other arguments than the graph says")


def test_whose_memory_a_view_shares(bench, g):
    h = g.read("blocks.1", X)
    view = g.call("Tensor.__getitem__", h, 0)
    g.mul_(view, 0.0)
    g.save("y", view)
    refused(bench, g, GraphError, "shares memory otherwise")


def test_a_result_is_no_view(bench, g):
    h = g.read("blocks.1", X)
    copy = g.call("mul", h, 2.0, alias=(h,))
    g.save("y", copy)
    refused(bench, g, GraphError, "shares memory otherwise")


def test_a_weight_is_not_written(bench, g):
    w = g.param("head.weight", torch.ones(5, 8))
    row = g.item(w, 0)
    g.mul_(row, 2.0)
    g.save("row", row)
    refused(bench, g, ReadOnlyError, "head.weight")


def test_a_shape_that_numbers_decide_needs_a_guard_directly_after(bench, g):
    h = g.read("blocks.1", X)
    found = g.call("nonzero", h)
    g.save("found", found)
    refused(bench, g, GraphError, "no guard directly after it")


def test_a_guard_on_a_shape_that_cannot_be(bench, g):
    h = g.read("blocks.1", X)
    g.guard(h, (2, 3, 9), "shape")
    refused(bench, g, GuardError, r"this shape being \(2, 3, 9\), but it is \(2, 3, 8\)")


@pytest.mark.parametrize("expected", [1.0, [1.0], [[1.0] * 8] * 3, [[1.0], 2.0]])
def test_a_guard_on_numbers_of_another_shape(bench, g, expected):
    g.guard(g.read("blocks.1", X), expected)
    refused(bench, g, GuardError, "this value being")


def test_a_saved_tensor_has_a_dtype_that_travels(bench, g):
    half = g.call("Tensor.to", g.read("blocks.1", X), torch.float8_e4m3fn)
    g.save("half", half)
    refused(bench, g, GraphError, "float8_e4m3fn cannot be brought back")


def test_a_graph_that_does_nothing(bench, g):
    g.read("blocks.1", X)
    with pytest.raises(GraphError, match="nothing to do"):
        bench.price(g)


def test_a_device_cannot_be_chosen(bench, g):
    g.save("h", g.call("Tensor.to", g.read("blocks.1", X), "cuda"))
    with pytest.raises(UnsupportedOperationError, match="device"):
        bench.price(g)


def test_what_torch_says_holds_no_path(bench, g, monkeypatch):
    def broken(*args: Any) -> Any:
        raise RuntimeError("no such kernel in /home/somebody/lib/kernels.so\nsecond line")

    monkeypatch.setattr("weft.engine.admit.outcome_of", broken)
    g.save("h", g.mul(g.read("blocks.1", X), 3.25))
    with pytest.raises(GraphError) as caught:
        bench.price(g)
    assert "somebody" not in str(caught.value) and "second" not in str(caught.value)


# On another input


def longer(bench: Bench) -> Bench:
    return Bench(bench.net, example(length=7), known=bench.known)


def test_without_strict_sizes_may_differ(bench, g):
    _edits(g)
    there = longer(bench).price(g, strict=False)
    assert there.saved_bytes == 2 * 7 * 5 * 4
    with pytest.raises(SiteMismatchError):
        longer(bench).price(g)


def test_a_size_that_was_read_holds(bench, g):
    h = g.read("blocks.1", X)
    g.save("h", h)
    g.bound(h, 1, 3)
    assert bench.price(g, strict=False)
    refused(longer(bench), g, GraphError, "as the number 3", strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_a_size_of_no_dimension(bench, g, strict):
    h = g.read("blocks.1", X)
    g.save("h", h)
    g.bound(h, 3, 3)
    with pytest.raises(GraphError, match="dimension 3"):
        bench.price(g, strict)


# Structures at sites


def _parts(net: nn.Module, x: torch.Tensor) -> Any:
    return {"all": net.head(x), "pair": (x * 2, [x * 3])}


def test_leaves_of_a_structure(g):
    bench = Bench(Does(_parts, head=nn.Linear(8, 5)))
    g.save("three", g.read("", X, leaf=("pair", 1, 0)))
    assert bench.price(g).saved_bytes == X.nbytes


def _record(net: nn.Module, x: torch.Tensor) -> Any:
    return Record(net.head(x))


def test_leaves_of_a_dataclass(g):
    bench = Bench(Does(_record, head=nn.Linear(8, 5)))
    g.save("h", g.read("", (2, 3, 5), leaf=("hidden",)))
    assert bench.price(g).saved_bytes == 2 * 3 * 5 * 4
