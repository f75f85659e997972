"""Graphs of an enemy: each is refused with a reason before the model runs, whichever way it came.

What is a lie or breaks a rule is refused everywhere. What only asks for too much is refused by a
server; on his own machine a user may ask for what he likes.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.engine.bench import state_of
from tests.engine.enemy import Gate, Raw, X
from weft.errors import LimitError, WeftError
from weft.graph.frame import Frame
from weft.graph.node import (
    Apply,
    Bound,
    Call,
    Complex,
    Const,
    Guard,
    Log,
    Map,
    Name,
    Read,
    Ref,
    Seq,
    Shape,
)
from weft.graph.site import Site
from weft.kernels.frames import to_frame
from weft.testing.same import bitwise

HUGE = 2**40
FORMS = ("msgpack", "json")


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate()


@pytest.fixture(autouse=True)
def _the_model_never_ran(gate: Gate) -> Any:
    before = state_of(gate.net)
    gate.net.ran.clear()
    yield
    assert not gate.net.ran
    bitwise(state_of(gate.net), before)


def refused(attempt: Callable[..., Any], *args: Any, **options: Any) -> WeftError:
    with pytest.raises(WeftError) as caught:
        attempt(*args, **options)
    assert caught.value.message.isprintable() or "\n" in caught.value.message
    assert len(str(caught.value)) < 12_000
    return caught.value


def try_all(gate: Gate, folder: Path, graph: Any, frames: dict[str, Frame]) -> None:
    for form in FORMS:
        try:
            refused(gate.send, graph, frames, form)
        except OverflowError:
            assert form == "msgpack"  # which has no such number
    refused(gate.load, folder / "enemy.weft", graph, frames)


Attack = Callable[[Raw, Ref], Any]


def built(attack: Attack) -> Raw:
    """A graph that reads a block, is attacked, and saves what came of it."""
    g = Raw()
    h = g.read("blocks.1", X)
    value = attack(g, h)
    if value is not None:
        g.save("value", value)
    return g


def test_what_is_not_attacked_is_admitted(gate):
    """So that the refusals below are for what was done."""
    g = built(lambda g, h: g.mul(h, g.const(torch.ones(8))))
    for form in FORMS:
        assert gate.send(g.data(), g.frames(), form).graph.nodes


# Names that lead elsewhere

_OPERATIONS = """
    os.system __import__ eval exec load save hub.load jit.load ops.load_library from_file compile
    Tensor.__class__ Tensor.__reduce_ex__ Tensor.__init_subclass__ Tensor.__dict__ __builtins__
    Tensor.data_ptr Tensor.set_ Tensor.storage Tensor.untyped_storage Tensor.share_memory_
    as_strided Tensor.as_strided_ Tensor.resize_ Tensor.data.__set__ Tensor.grad.__set__
    Tensor.register_hook Tensor.apply_ Tensor.map_ Tensor.backward Tensor.__setstate__ nn.Module
    Tensor.numpy Tensor.tolist Tensor.item Tensor.cuda Tensor.shape.__get__ Tensor.is_cuda.__get__
    set_default_device Add torch.add nn.functional.__dict__ .
"""
OPERATIONS = [*_OPERATIONS.split(), "", "add\0", "add" * 100_000]


@pytest.mark.parametrize("name", OPERATIONS, ids=lambda name: repr(name[:24]))
def test_operations_that_no_graph_has(gate, tmp_path, name):
    g = built(lambda g, h: g.call(name, h))
    try_all(gate, tmp_path, g.data(), g.frames())


PATHS = (
    *("__class__", "blocks.1.__dict__", "blocks.__class__.__init__.__globals__", "forward", "ran"),
    *("blocks.9", "blocks.-1", "blocks..1", ".blocks.1", "blocks.1.", "../../etc/passwd", "/", " "),
    *("blocks.1\0", "blocks.1\n", "\x1b[2Jblocks", "blocks.1.linear.weight", "x" * 1_000_000),
)


@pytest.mark.parametrize("kind", ["read", "write", "apply", "param"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: repr(path[:24]))
def test_paths_that_the_model_does_not_have(gate, tmp_path, path, kind):
    if kind == "param" and path == "blocks.1.linear.weight":
        path = "blocks.1.linear"

    def attack(g: Raw, h: Ref) -> Any:
        if kind == "read":
            return g.read(path, X)
        if kind == "write":
            return g.write(path, h) and None
        if kind == "apply":
            types = (("float32", (2, 3, 8)),)
            return g.add(Apply, path=path, args=(h,), types=types)
        return g.param(path, torch.ones(8))

    g = built(attack)
    try_all(gate, tmp_path, g.data(), g.frames())


# Lies and broken rules


def _param(g: Raw) -> Ref:
    return g.param("head.weight", torch.ones(5, 8))


def _in_place(g: Raw, x: Ref, *, of: Ref | None = None) -> Ref:
    return g.call("Tensor.mul_", x, 0.0, alias=(of or x,), writes=(of or x,))


def _applied(g: Raw, path: str, *args: Any, shape: Any = (2, 3, 8), **kwargs: Any) -> Ref:
    return g.add(
        Apply,
        path=path,
        args=args,
        kwargs=tuple(kwargs.items()),
        types=(("float32", shape),),
    )


def _nonzero(g: Raw, h: Ref, *guards: Any) -> Ref:
    found = g.call("nonzero", h)
    for shape in guards:
        g.guard(found, shape, "shape")
    return found


def _deep(levels: int) -> Any:
    arg: Any = 1
    for _ in range(levels):
        arg = Seq("list", (arg,))
    return arg


LIES: dict[str, Attack] = {
    # references
    "a reference to itself": lambda g, h: g.mul(Ref(1), 2.0),
    "a reference forward": lambda g, h: g.mul(Ref(2), 2.0),
    "a reference below zero": lambda g, h: g.mul(Ref(-1), 2.0),
    "a reference far away": lambda g, h: g.mul(Ref(HUGE), 2.0),
    "a result that a node has not": lambda g, h: g.mul(Ref(0, 1), 2.0),
    "a result below zero": lambda g, h: g.mul(Ref(0, -1), 2.0),
    "a result of what has none": lambda g, h: g.mul(g.save("x", h), 2.0),
    "a reference deep in a container": lambda g, h: g.call("cat", [h, [Ref(7)]]),
    "a reference in a slice": lambda g, h: g.call(
        "Tensor.__getitem__", h, slice(Ref(9), None), alias=(h,)
    ),
    "the shape of nothing": lambda g, h: g.call("zeros", Shape(Ref(5))),
    "a view of what it was not given": lambda g, h: g.call("mul", h, 2.0, alias=(Ref(3),)),
    "a write into what it was not given": lambda g, h: g.call(
        "Tensor.mul_", g.const(torch.ones(8)), 2.0, writes=(h,)
    ),
    "more views than results": lambda g, h: g.call("mul", h, 2.0, alias=(None, None, None)),
    "a save of what is not there": lambda g, h: Ref(99),
    "a write of what is not there": lambda g, h: g.write("blocks.1", Ref(99)) and None,
    "a bound on nothing": lambda g, h: g.bounds.append(Bound(Ref(12), 0, 2)) or h,
    "a bound below zero": lambda g, h: g.bounds.append(Bound(h, -1, 2)) or h,
    "a bound that does not hold": lambda g, h: g.bounds.append(Bound(h, 0, 77)) or h,
    "a bound on a dimension that is not there": lambda g, h: g.bounds.append(Bound(h, 9, 2)) or h,
    # sites
    "a port of Python's": lambda g, h: g.read("blocks.1", X, port="__dict__"),
    "a port that is none": lambda g, h: g.read("blocks.1", X, port="grad"),
    "a call that does not happen": lambda g, h: g.read("blocks.1", X, call=1_000_000),
    "a call below zero": lambda g, h: g.read("blocks.1", X, call=-1),
    "a call beyond 64 bits": lambda g, h: g.read("blocks.1", X, call=10**30),
    "a later step": lambda g, h: g.add(
        Read, site=Site("blocks.1", "output", 0, 3), shape=X.shape, dtype="float32"
    ),
    "a leaf of Python's": lambda g, h: g.read("blocks.1", X, leaf=("__class__",)),
    "a leaf that is not there": lambda g, h: g.read("blocks.1", X, leaf=(0, "x")),
    "a leaf of a hundred keys": lambda g, h: g.read("blocks.1", X, leaf=(0,) * 100),
    "a leaf with a long key": lambda g, h: g.read("blocks.1", X, leaf=("k" * 10_000,)),
    "a leaf beyond 64 bits": lambda g, h: g.read("blocks.1", X, leaf=(10**40,)),
    "a module that never runs": lambda g, h: g.read("words", (2, 3, 8)),
    # types
    "a site of another rank": lambda g, h: g.read("head", (2, 3, 5, 1)),
    "a site of another kind": lambda g, h: g.read("head", torch.ones(2, 3, 5, dtype=torch.int64)),
    "a site with an impossible size": lambda g, h: g.read("head", (-1, 3, 5)),
    "a site of a hundred dimensions": lambda g, h: g.read("head", (1,) * 100),
    "a weight of another shape": lambda g, h: g.param("head.weight", torch.ones(8, 5)),
    "a weight of another dtype": lambda g, h: g.param("head.weight", torch.ones(5, 8).double()),
    "an unknown dtype": lambda g, h: g.add(
        Read, site=Site("head", "output"), shape=(2, 3, 5), dtype="object"
    ),
    "a dtype of Python's": lambda g, h: g.call("Tensor.to", h, Name("dtype", "__class__")),
    "a name of another form": lambda g, h: g.call("Tensor.to", h, Name("device", "cuda")),
    "a sparse layout": lambda g, h: g.call("zeros_like", h, layout=Name("layout", "sparse_coo")),
    "a factory with two results": lambda g, h: g.call("zeros", (2, 2), outs=2),
    "a million results": lambda g, h: g.call("unbind", h, outs=1_000_000),
    "results below zero": lambda g, h: g.call("unbind", h, outs=-1),
    "too few results": lambda g, h: g.call("unbind", h, outs=1, alias=(h,)),
    # constants
    "a constant that is not there": lambda g, h: g.add(
        Const, key="c9", shape=(8,), dtype="float32"
    ),
    "a constant under a long name": lambda g, h: g.add(
        Const, key="c" * 100_000, shape=(8,), dtype="float32"
    ),
    # weights
    "a weight written": lambda g, h: _in_place(g, _param(g)),
    "a row of a weight written": lambda g, h: _in_place(g, g.item(g.item(_param(g), 0), 1)),
    "a weight written by index": lambda g, h: g.set(_param(g), 0, 0.0) and h,
    "a weight written through many views": lambda g, h: _in_place(
        g, g.view("t", g.view("detach", g.view("Tensor.view", _param(g), 8, 5)))
    ),
    "a buffer written": lambda g, h: _in_place(g, g.param("scale", torch.ones(8))),
    "a weight written that was said to be none": lambda g, h: g.call("Tensor.mul_", _param(g), 0.0),
    "a weight as running statistics": lambda g, h: g.call(
        "nn.functional.batch_norm",
        g.call("zeros", (4, 8)),
        *[g.param("scale", torch.ones(8)), g.param("scale", torch.ones(8))],
        training=True,
    ),
    "a weight renormed": lambda g, h: g.call(
        "nn.functional.embedding", g.call("arange", 3), _param(g), None, 1.0
    ),
    "a weight as out=": lambda g, h: g.call("mul", h, 2.0, out=_param(g)),
    "a weight with inplace=True": lambda g, h: g.call(
        "nn.functional.relu", _param(g), inplace=True
    ),
    # edits
    "a write of another shape": lambda g, h: (
        g.write("blocks.1", g.call("zeros", (2, 3, 9))) and None
    ),
    "a write of another kind": lambda g, h: g.write("blocks.1", g.call("argsort", h)) and None,
    "a write to a leaf that is not there": lambda g, h: g.write("blocks.1", h, leaf=(3,)) and None,
    "a fill of another site": lambda g, h: g.fill("blocks.0", h) and None,
    "a fill with a constant": lambda g, h: g.fill("blocks.1", g.const(X)) and None,
    "a fill of another leaf": lambda g, h: g.fill("blocks.1", h, leaf=(0,)) and None,
    "an edit that comes too late": lambda g, h: g.write("blocks.0", h) and None,
    "an edit in place that comes too late": lambda g, h: (
        g.fill("blocks.0", _in_place_with(g, g.read("blocks.0", X), h)) and None
    ),
    # modules
    "a module given nothing": lambda g, h: _applied(g, "head"),
    "a module given another shape": lambda g, h: _applied(g, "head", g.call("zeros", (3, 9))),
    "a module that is a list": lambda g, h: _applied(g, "blocks", h),
    "a module that gives something else": lambda g, h: _applied(g, "head", h, shape=(2, 3, 6, 1)),
    "a module with a keyword of Python's": lambda g, h: _applied(g, "head", h, __class__=1),
    "a module with a callable's name": lambda g, h: _applied(g, "head", Name("module", "os")),
    "the root given what it cannot take": lambda g, h: _applied(g, "", "os.system", h),
    "the root given nothing": lambda g, h: _applied(g, "", shape=(2, 3, 5)),
    "the root with two results": lambda g, h: g.add(
        Apply, path="", args=(h,), outs=2, types=(("float32", (2, 3, 5)),) * 2
    ),
    # arguments
    "nested deeper than anybody writes": lambda g, h: g.call("cat", _deep(40)),
    "an unknown container": lambda g, h: g.call("cat", Seq("set", (h,))),
    "a size of texts": lambda g, h: g.call("zeros", Seq("size", ("a",))),
    "a dict with a key twice": lambda g, h: g.call("cat", Map(("a", "a"), (1, 2))),
    "a dict without its values": lambda g, h: g.call("cat", Map(("a",), ())),
    "a number beyond 64 bits": lambda g, h: g.mul(h, 2**64),
    "a text without end": lambda g, h: g.call("einsum", "a" * 100_000, h),
    "more arguments than anybody writes": lambda g, h: g.call("cat", [1] * 70_000),
    "a keyword twice": lambda g, h: g.add(
        Call, op="sum", args=(h,), kwargs=(("dim", 0), ("dim", 1))
    ),
    "a keyword without end": lambda g, h: g.call("sum", h, **{"k" * 10_000: 1}),
    "a keyword with a line break": lambda g, h: g.call("sum", h, **{"di\nm": 1}),
    "an empty keyword": lambda g, h: g.call("sum", h, **{"": 1}),
    "an unknown keyword": lambda g, h: g.call("sum", h, __class__=1),
    "not a number, where one counts": lambda g, h: g.call("zeros", Name("float", "nan")),
    "infinity, where one counts": lambda g, h: g.call("arange", Name("float", "inf")),
    "a device": lambda g, h: g.call("zeros", (2,), device="cuda"),
    "no device": lambda g, h: g.call("zeros", (2,), device=None),
    "a generator": lambda g, h: g.call("rand", (2,), draw=0, generator=1),
    "no generator": lambda g, h: g.call("rand", (2,), draw=0, generator=None),
    "gradients": lambda g, h: g.call("zeros", (2,), requires_grad=True),
    "pinned memory": lambda g, h: g.call("zeros", (2,), pin_memory=True),
    "a device by text": lambda g, h: g.call("Tensor.to", h, "cuda:0"),
    "a type by text": lambda g, h: g.call("Tensor.type", h, "torch.cuda.FloatTensor"),
    "a complex size": lambda g, h: g.call("zeros", (Complex(1.0, 1.0),)),
    # random
    "a draw without a number": lambda g, h: g.call("randn_like", h),
    "a number without a draw": lambda g, h: g.call("mul", h, 2.0, draw=0),
    "a draw below zero": lambda g, h: g.call("randn_like", h, draw=-1),
    "a seed without a draw": lambda g, h: g.add(Call, op="mul", args=(h, 2.0), seed=1),
    "a seed below zero": lambda g, h: g.add(Call, op="randn_like", args=(h,), draw=0, seed=-1),
    "a draw twice": lambda g, h: g.add2(
        g.call("randn_like", h, draw=0), g.call("randn_like", h, draw=0)
    ),
    # guards
    "a guard that expects text": lambda g, h: g.guard(h, "pickle") and h,
    "a guard that expects a dict": lambda g, h: g.guard(h, {"a": 1.0}) and h,
    "a guard that expects a result": lambda g, h: g.add(Guard, value=h, expected=h) and h,
    "a guard that expects nothing": lambda g, h: g.guard(h, None) and h,
    "a guard that looks elsewhere": lambda g, h: g.guard(h, 1.0, look="__class__") and h,
    "a guard on fewer numbers": lambda g, h: g.guard(h, [1.0, 2.0]) and h,
    "a guard on ragged numbers": lambda g, h: g.guard(h, [[1.0], 2.0]) and h,
    "a guard on another shape": lambda g, h: g.guard(h, (2, 3, 9), "shape") and h,
    "a guard on a shape of texts": lambda g, h: g.guard(h, ("2", "3", "8"), "shape") and h,
    "a guard on a shape below zero": lambda g, h: g.guard(h, (-1,), "shape") and h,
    "a guard on a shape that is a number": lambda g, h: g.guard(h, 3, "shape") and h,
    # results that numbers decide
    "a shape that nobody tells": lambda g, h: _nonzero(g, h),
    "a shape that is told too late": lambda g, h: _told_late(g, h),
    "a shape that is told twice otherwise": lambda g, h: _nonzero(g, h, (5, 3), (6, 3)),
    "a mask as an index": lambda g, h: g.call("Tensor.__getitem__", h, g.call("gt", h, 0.0)),
    "half of a result told": lambda g, h: g.call("unique", h, False, True, outs=2),
    # saves and names
    "two saves of one name": lambda g, h: g.save("value", h) and h,
    "a save without a name": lambda g, h: g.save("", h) and h,
    "a save that acts on a terminal": lambda g, h: g.save("\x1b[2J\x1b]0;owned\x07", h) and h,
    "a save that turns the line": lambda g, h: g.save("abc\u202ecba", h) and h,
    "a save with a line break": lambda g, h: g.save("a\nb", h) and h,
    "a save named by a pickle": lambda g, h: (
        g.save(pickle.dumps({"a": print}).decode("latin-1"), h) and h
    ),
    "a save with a name without end": lambda g, h: g.save("n" * 1_000_000, h) and h,
    "a save of what cannot travel": lambda g, h: g.call(
        "Tensor.to", h, Name("dtype", "float8_e4m3fn")
    ),
    "a log of a thousand and more": lambda g, h: g.add(Log, parts=(h,) * 2000) and h,
    "nothing to do": lambda g, h: None,
    # what keeps a machine busy on nothing
    "more elements than there are": lambda g, h: g.call("arange", HUGE),
    "more elements than can be counted": lambda g, h: g.call("zeros", (2**62, 2**62)),
    "a full one": lambda g, h: g.call("full", (HUGE,), 1.0),
    "a huge identity": lambda g, h: g.call("eye", 2**30),
    "random ones": lambda g, h: g.call("randn", (HUGE,), draw=0),
    "a permutation": lambda g, h: g.call("randperm", HUGE, draw=0),
    "a line": lambda g, h: g.call("linspace", 0, 1, HUGE),
    "a window": lambda g, h: g.call("kaiser_window", HUGE),
    "a triangle of indices": lambda g, h: g.call("tril_indices", 2**25, 2**25),
    "expanded": lambda g, h: g.call("broadcast_to", g.item(h, 0, 0, 0), (2**20, 2**20)),
    "repeated": lambda g, h: g.call("Tensor.repeat", h, 2**20, 2**20, 1),
    "tiled": lambda g, h: g.call("tile", h, (2**20, 2**20)),
    "repeated by number": lambda g, h: g.call("repeat_interleave", h, HUGE),
    "padded": lambda g, h: g.call("nn.functional.pad", h, (HUGE, HUGE)),
    "interpolated": lambda g, h: g.call("nn.functional.interpolate", h, HUGE),
    "transformed": lambda g, h: g.call("fft.fft", h, HUGE),
    "one hot": lambda g, h: g.call("nn.functional.one_hot", g.call("argsort", h), HUGE),
    "counted in bins": lambda g, h: g.call("histc", h, HUGE),
    "counted at least": lambda g, h: g.call("bincount", g.call("arange", 3), None, HUGE),
    "a convolution with padding": lambda g, h: g.call(
        "conv1d", h, g.call("zeros", (1, 3, 1)), None, 1, HUGE
    ),
    "a grid of many": lambda g, h: g.call(
        "cartesian_prod", *[g.call("zeros", (2048,)) for _ in range(4)]
    ),
    "an outer product": lambda g, h: g.call(
        "outer", g.call("zeros", (2**20,)), g.call("zeros", (2**20,))
    ),
    "a Kronecker product": lambda g, h: g.call(
        "kron", g.call("zeros", (2**10, 2**10)), g.call("zeros", (2**10, 2**10))
    ),
    "split into ever so many": lambda g, h: g.call("split", g.call("zeros", (2**30,)), 1),
    "sections without end": lambda g, h: g.call("tensor_split", h, HUGE),
    "differences without end": lambda g, h: g.call("diff", h, 10**9),
    "dimensions without end": lambda g, h: g.call("zeros", (1,) * 10_000),
    "a product of a hundred": lambda g, h: g.call("linalg.multi_dot", [h] * 100),
}


def _in_place_with(g: Raw, x: Ref, y: Ref) -> Ref:
    g.call("Tensor.mul_", x, y, alias=(x,), writes=(x,))
    return x


def _told_late(g: Raw, h: Ref) -> Ref:
    found = g.call("nonzero", h)
    g.mul(h, 2.0)
    g.guard(found, (1, 3), "shape")
    return found


@pytest.mark.parametrize("name", LIES)
def test_lies_and_broken_rules(gate, tmp_path, name):
    g = built(LIES[name])
    try_all(gate, tmp_path, g.data(), g.frames())


# Asking for too much, in small steps


def _again(count: int, step: Callable[[Raw, Ref], Ref]) -> Attack:
    def attack(g: Raw, h: Ref) -> Ref:
        for _ in range(count):
            h = step(g, h)
        return h

    return attack


MUCH: dict[str, Attack] = {
    "a large one": lambda g, h: g.call("zeros", (2**32,)),
    "doubled and doubled": _again(40, lambda g, h: g.call("cat", [h, h])),
    "stacked and stacked": _again(40, lambda g, h: g.call("stack", [h, h])),
    "outer products": lambda g, h: _again(5, _outer)(g, g.call("zeros", (4096,))),
    "squared and squared": lambda g, h: _again(200, lambda g, h: g.call("mm", h, h))(
        g, g.call("zeros", (20_000, 20_000))
    ),
    "decomposed": lambda g, h: g.call("linalg.svd", g.call("zeros", (30_000, 30_000)), outs=3),
    "an expanded one, added up": lambda g, h: _expanded(g, "logsumexp", -1),
    "an expanded one, saved": lambda g, h: _expanded(g, None),
    "the root, again and again": lambda g, h: g.call(
        "stack", [_applied(g, "", h, shape=(2, 3, 5)) for _ in range(2000)]
    ),
    "two that meet in the middle": lambda g, h: g.call(
        "sum", g.add2(g.call("zeros", (2**17, 1)), g.call("zeros", (1, 2**15)))
    ),
    "attention over all": lambda g, h: g.call(
        "nn.functional.scaled_dot_product_attention",
        *[g.call("zeros", (1, 1, 100_000, 8)) for _ in range(3)],
    ),
    "what a mask may choose": lambda g, h: _chosen(g),
    "nodes without end": lambda g, h: _again(2001, lambda g, h: g.mul(h, 1.0))(g, h),
}


LOWERED = {"the root, again and again": {"flops": 10**6}, "nodes without end": {"nodes": 2000}}


def _expanded(g: Raw, op: str | None, *args: Any) -> Ref:
    one = g.call("zeros", (1,))
    wide = g.call("broadcast_to", one, (2**16, 2**16), alias=(one,))
    return g.call(op, wide, *args) if op else wide


def _outer(g: Raw, h: Ref) -> Ref:
    return g.view("flatten", g.call("outer", h, h))


def _chosen(g: Raw) -> Ref:
    x = g.call("zeros", (2**14, 2**15))
    found = g.call("nonzero", x)
    g.guard(found, (0, 2), "shape")
    return found


@pytest.mark.parametrize("name", MUCH)
def test_asking_for_too_much(gate, name):
    g = built(MUCH[name])
    error = refused(gate.send, g.data(), g.frames(), "msgpack", **LOWERED.get(name, {}))
    assert isinstance(error, LimitError) or "elements" in error.message
    assert error.line or "nodes is 2000" in error.message


# Data of another form

Spoil = Callable[[dict[str, Any]], Any]


def _put(*path: Any) -> Callable[[Any], Spoil]:
    """Puts a value at a path into the data of a graph."""

    def put(value: Any) -> Spoil:
        def spoil(graph: dict[str, Any]) -> None:
            place: Any = graph
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value

        return spoil

    return put


_read, _save = ("nodes", 0), ("nodes", 2)
FORMLESS: dict[str, Spoil] = {
    "no nodes": lambda g: g.pop("nodes"),
    "nodes that are a number": _put("nodes")(3),
    "a node that is a text": _put("nodes", 1)("os.system"),
    "a node of no kind": lambda g: g["nodes"][1].pop("kind"),
    "a node of an unknown kind": _put("nodes", 1, "kind")("exec"),
    "a node that carries a body": _put("nodes", 1, "kind")("loop"),
    "a node with a field too many": _put("nodes", 1, "code")("import os"),
    "a graph with a field too many": _put("code")("import os"),
    "a later version": _put("version")(999),
    "a version that is a text": _put("version")("1"),
    "a version beyond 64 bits": _put("version")(10**30),
    "a seed below zero": _put("seed")(-1),
    "a seed beyond 64 bits": _put("seed")(10**30),
    "a seed that is a fraction": _put("seed")(0.5),
    "a path that is a number": _put(*_read, "site", "path")(3),
    "a path that is bytes": _put(*_read, "site", "path")(pickle.dumps(print)),
    "a call that is a fraction": _put(*_read, "site", "call")(0.5),
    "a call that is not a number": _put(*_read, "site", "call")(float("nan")),
    "a shape that is not a number": _put(*_read, "shape")([float("nan"), 3, 8]),
    "a shape of truth values": _put(*_read, "shape")([True, True, True]),
    "a shape beyond 64 bits": _put(*_read, "shape")([10**30, 3, 8]),
    "a line of no file": _put(*_save, "at")(99),
    "a line below zero": _put(*_save, "at")(-1),
    "a line number below zero": _put("where", 0, "line")(-5),
    "a line number beyond 64 bits": _put("where", 0, "line")(10**30),
    "a file that acts on a terminal": _put("where", 0, "file")("\x1b[2J.py"),
    "a file without end": _put("where", 0, "file")("f" * 1_000_000),
    "source that acts on a terminal": _put("where", 0, "text")("h = 1 \x1b]8;;http://x\x07"),
    "an argument of an unknown kind": _put("nodes", 1, "args")([["code", "import os"]]),
    "an argument that is an object": _put("nodes", 1, "args")([{"__reduce__": "os.system"}]),
    "a reference with a field too many": _put("nodes", 1, "args")([["ref", 0, 0, 0]]),
    "a reference that is a fraction": _put("nodes", 1, "args")([["ref", 0.5], 2.0]),
    "a reference that is a text": _put("nodes", 1, "args")([["ref", "0"], 2.0]),
    "outs that are not a number": _put("nodes", 1, "outs")(float("nan")),
    "a keyword that is a number": _put("nodes", 1, "kwargs")([[1, 2]]),
    "grad that is a text": _put("nodes", 1, "grad")("no"),
}


def test_bytes_where_a_text_should_be(gate):
    """JSON has no bytes: there, base64 is a text like any other."""
    graph = built(lambda g, h: g.mul(h, 2.0)).data()
    _put(*_save, "name")(pickle.dumps(print))(graph)
    refused(gate.send, graph, {}, "msgpack")


@pytest.mark.parametrize("name", FORMLESS)
def test_data_of_another_form(gate, tmp_path, name):
    graph = built(lambda g, h: g.mul(h, 2.0)).data()
    FORMLESS[name](graph)
    try_all(gate, tmp_path, graph, {})


# Constants that are not those of the graph

FORGED: dict[str, Callable[[dict[str, Frame]], Any]] = {
    "missing": lambda f: f.clear(),
    "one too many": lambda f: f.update(extra=to_frame(X)),
    "under another name": lambda f: f.update(c7=f.pop("c0")),
    "of another dtype": lambda f: f.update(c0=to_frame(torch.ones(8, dtype=torch.int32))),
    "of another shape": lambda f: f.update(c0=to_frame(torch.ones(2, 4))),
    "of another size": lambda f: f.update(c0=to_frame(torch.ones(9))),
    "as bytes": lambda f: f.update(c0=to_frame(torch.ones(32, dtype=torch.uint8))),
}


@pytest.mark.parametrize("name", FORGED)
def test_constants_that_are_forged(gate, tmp_path, name):
    g = built(lambda g, h: g.mul(h, g.const(torch.ones(8))))
    frames = g.frames()
    FORGED[name](frames)
    try_all(gate, tmp_path, g.data(), frames)


# Depth: bytes are put together, no data is nested here

LEVELS = (100, 100_000)
MARK = "@here@"


@pytest.mark.parametrize("levels", LEVELS)
def test_arguments_nested_without_end(gate, tmp_path, levels):
    graph = built(lambda g, h: g.call("cat", MARK)).data()
    message = gate.submission(graph, {})
    packed = msgspec.msgpack.encode(message)
    deep = b"\x93\xa3seq\xa4list\x91" * levels + b"\x01"
    refused(gate.arrive, packed.replace(b"\xa6" + MARK.encode(), deep))
    text = msgspec.json.encode(message)
    deep = b'["seq","list",[' * levels + b"1" + b"]]" * levels
    refused(gate.arrive, text.replace(f'"{MARK}"'.encode(), deep), "json")
    graph_text = msgspec.json.encode(graph).replace(f'"{MARK}"'.encode(), deep)
    refused(gate.load, tmp_path / "deep.weft", graph_text.decode(), {})


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80\x04N.", pickle.dumps(print), b"\xc1" * 100, b"\xdd\xff\xff\xff\xff", b"\x00" * 10],
)
def test_bytes_that_are_no_message(gate, data):
    refused(gate.arrive, data)
    refused(gate.arrive, data, "json")
