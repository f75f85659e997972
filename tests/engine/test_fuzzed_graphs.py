"""Graphs that were once valid: each is refused by us, or runs and leaves the model as it was.

Deterministic: the same mutations at every run.
"""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.bench import limits, state_of
from tests.engine.enemy import Gate, Raw, X
from tests.run.nets import hook_count
from weft.engine.draw import draw, overwritten_by
from weft.engine.opened import Opened
from weft.errors import WeftError
from weft.graph.node import Apply
from weft.graph.ops import IN_GRAPHS, OPS
from weft.testing.same import bitwise

SMALL = {"memory_bytes": 20_000_000, "flops": 10**8, "result_bytes": 10_000_000, "nodes": 500}
FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def _edit(g: Raw) -> None:
    h = g.read("blocks.1", X)
    row = g.item(h, slice(None), -1)
    g.mul_(row, g.const(torch.linspace(-1, 1, 8)))
    g.fill("blocks.1", h)
    g.save("end", {"logits": g.read("head", (2, 3, 5)), "shape": (1, 2.5, None, "text")})


def _write(g: Raw) -> None:
    h = g.read("blocks.0", X, port="inputs", leaf=(0, 0))
    w = g.param("head.weight", torch.ones(5, 8))
    both = g.call("matmul", h, g.view("t", w))
    g.set(both, (slice(None), 0), 2.0)
    g.write("head", both)
    g.log("both", g.call("sum", both))
    g.save("both", both)


def _look(g: Raw) -> None:
    h = g.read("blocks.1", X)
    found = g.call("nonzero", g.call("zeros", (2, 3)))
    g.guard(found, (0, 2), "shape")
    g.guard(g.call("sum", g.call("zeros", (4,))), 0.0)
    types = (("float32", (2, 3, 5)),)
    y = g.add(Apply, path="head", args=(h,), types=types)
    g.bound(h, 1, 3)
    g.save("y", [y, found, g.call("topk", h, 2, outs=2)])


def _random(g: Raw) -> None:
    h = g.read("blocks.1", X)
    noise = g.call("randn_like", h, draw=0)
    more = g.call("rand", (2, 3, 8), draw=1, dtype=torch.float32)
    g.write("blocks.1", g.call("where", g.call("gt", noise, 0.0), more, h))
    g.save("end", g.read("head", (2, 3, 5)))


def _data(make: Any) -> tuple[Any, Any]:
    g = Raw()
    make(g)
    return msgspec.json.decode(msgspec.json.encode(g.data())), g.frames()


VALID = [_data(make) for make in (_edit, _write, _look, _random)]

NAMES = sorted(name for name, op in OPS.items() if op.kind in IN_GRAPHS)
LEAVES = st.one_of(
    st.sampled_from([0, 1, 2, 3, 5, 8, -1, -2, 64, 2**31, 2**63 - 1, -(2**63), 10**6]),
    st.sampled_from([0.0, -0.0, 1.5, float("nan"), float("inf"), 1e300]),
    st.sampled_from([None, True, False, "", "mean", "head", "blocks.0", "scale", "words.weight"]),
    st.sampled_from(
        ["inputs", "output", "value", "shape", "tuple", "list", "size", "ref", "int64"]
    ),
    st.sampled_from(["ref", "int64", "dim", "out", "inplace", "dtype", "a,b->", "__class__"]),
    st.sampled_from(["\x1b[2J", "x" * 300]),
    st.sampled_from(NAMES),
    st.builds(lambda node, out: ["ref", node, out], st.integers(-1, 9), st.integers(-1, 2)),
    st.sampled_from([[], {}, [1], ["seq", "tuple", []], ["slice"], ["shape", ["ref", 0]]]),
    st.sampled_from([["name", "dtype", "int64"], ["name", "ellipsis", ""], ["complex", 1.0, 2.0]]),
)


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every place in nested data, as (container, key)."""
    found: list[tuple[Any, Any]] = []
    waiting = [data]
    while waiting:
        part = waiting.pop()
        keys = part.keys() if isinstance(part, dict) else range(len(part))
        for key in list(keys):
            found.append((part, key))
            if isinstance(part[key], (dict, list)):
                waiting.append(part[key])
    return found


def mutate(graph: Any, draw: Any) -> None:
    """One change somewhere: another value, another part of the graph, nothing, or twice the same.

    Operations get a share of their own: most of what can go wrong is in them.
    """
    if draw(st.booleans()):
        calls = [node for node in graph["nodes"] if isinstance(node, dict) and "op" in node]
        if calls:
            _mutate_call(draw(st.sampled_from(calls)), draw)
            return
    there = places(graph)
    container, key = draw(st.sampled_from(there))
    kind = draw(st.sampled_from(["value", "value", "part", "drop", "twice"]))
    if kind == "value":
        container[key] = copy.deepcopy(draw(LEAVES))
    elif kind == "part":
        other, at = draw(st.sampled_from(there))
        container[key] = copy.deepcopy(other[at])
    elif kind == "drop":
        del container[key]
    elif isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))


def _mutate_call(node: dict[str, Any], draw: Any) -> None:
    kind = draw(st.sampled_from(["op", "op", "args", "kwargs", "outs", "alias", "writes"]))
    if kind == "op":
        node["op"] = draw(st.sampled_from(NAMES))
    elif kind == "args":
        args = node.setdefault("args", [])
        args.insert(draw(st.integers(0, len(args))), copy.deepcopy(draw(LEAVES)))
    elif kind == "kwargs":
        names = ["dim", "keepdim", "out", "dtype", "size", "n", "alpha", "mode", "training"]
        named = [draw(st.sampled_from(names)), copy.deepcopy(draw(LEAVES))]
        node.setdefault("kwargs", []).append(named)
    elif kind == "outs":
        node["outs"] = draw(st.integers(0, 4))
    else:
        refs = st.builds(lambda n: ["ref", n, 0], st.integers(0, 4))
        node[kind] = draw(st.lists(refs, max_size=2))


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate()


def attempt(gate: Gate, data: bytes, tally: dict[str, int]) -> None:
    """Decodes, admits and draws. Raises for whatever is not as it should be."""
    before = state_of(gate.net)
    try:
        opened = gate.arrive(data, **SMALL)
    except WeftError as error:
        assert error.message
        tally["refused"] += 1
        return
    _drawn(gate, opened)
    tally["ran"] += 1
    assert hook_count(gate.net) == 0
    bitwise(state_of(gate.net), before)


def _drawn(gate: Gate, opened: Opened) -> None:
    told = overwritten_by(gate.known, opened.call)
    bounds = limits(**SMALL, run_seconds=20.0)
    try:
        draw(gate.net, opened, overwritten=told, limits=bounds, on_log=lambda text: None)
    except WeftError:
        pass
    except Exception as error:
        if not hasattr(error, "weft_line"):  # an operation's own: an index out of range
            raise


def test_what_is_not_changed_runs(gate):
    counts = {"refused": 0, "ran": 0}
    for graph, frames in VALID:
        attempt(gate, msgspec.msgpack.encode(gate.submission(graph, frames)), counts)
    assert counts == {"refused": 0, "ran": len(VALID)}


@pytest.mark.parametrize("number", range(len(VALID)))
def test_graphs_that_were_changed(gate, number):
    counts = {"refused": 0, "ran": 0}
    graph, frames = VALID[number]

    @settings(FUZZ, max_examples=250)
    @given(st.data())
    def fuzz(data: Any) -> None:
        changed = copy.deepcopy(graph)
        for _ in range(data.draw(st.integers(1, 4))):
            if isinstance(changed.get("nodes"), list) and changed["nodes"]:
                mutate(changed, data.draw)
        attempt(gate, msgspec.msgpack.encode(gate.submission(changed, frames)), counts)

    fuzz()
    assert counts["refused"] > 50 and counts["ran"] > 5, counts


def test_bytes_that_were_changed(gate):
    counts = {"refused": 0, "ran": 0}
    messages = [msgspec.msgpack.encode(gate.submission(*valid)) for valid in VALID]

    @settings(FUZZ, max_examples=300)
    @given(st.sampled_from(messages), st.data())
    def fuzz(message: bytes, data: Any) -> None:
        changed = bytearray(message)
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(changed) - 1))
            changed[at] = data.draw(st.integers(0, 255))
        attempt(gate, bytes(changed), counts)

    fuzz()
    assert counts["refused"] > 100
