"""Skips and stops of an enemy: refused with a reason before the model runs, each way in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.engine.bench import Bench
from tests.engine.enemy import Gate, Raw, X
from tests.engine.test_hostile_graphs import refused, try_all
from tests.run.graphs import Builder
from tests.run.nets import Chain
from weft.errors import GraphError, LateEditError, NotReachedError
from weft.graph.node import Ref, Skip, Stop
from weft.graph.site import Site

Attack = Callable[[Raw, Ref], Any]


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate()


@pytest.fixture(autouse=True)
def _the_model_never_ran(gate: Gate) -> Any:
    gate.net.ran.clear()
    yield
    assert not gate.net.ran


def skip(
    g: Raw, path: str, *values: Ref, port: str = "output", call: int = 0, **fields: Any
) -> None:
    g.add(Skip, site=Site(path, port, call), values=values, **fields)


def built(attack: Attack) -> Raw:
    g = Raw()
    h = g.read("blocks.1", X, leaf=(0, 0), port="inputs")
    attack(g, h)
    g.save("value", h)
    return g


def test_what_is_not_attacked_is_admitted(gate: Gate) -> None:
    def fine(g: Raw, h: Ref) -> None:
        skip(g, "blocks.1", g.mul(h, 2.0))
        g.add(Stop, condition=g.call("any", h))
        g.add(Stop, invoke=0)

    g = built(fine)
    for form in ("msgpack", "json"):
        assert gate.send(g.data(), g.frames(), form).graph.nodes


def _twice(g: Raw, h: Ref) -> None:
    skip(g, "blocks.1", h)
    skip(g, "blocks.1", h)


def _nested(g: Raw, h: Ref) -> None:
    skip(g, "blocks.1", h)
    skip(g, "blocks.1.linear", h)


def _read_inside(g: Raw, h: Ref) -> None:
    skip(g, "blocks.1", h)
    g.save("inner", g.read("blocks.1.linear", X))


def _write_inside(g: Raw, h: Ref) -> None:
    g.write("blocks.1.linear", h)
    skip(g, "blocks.1", h)


LIES: dict[str, Attack] = {
    "twice": _twice,
    "one inside another": _nested,
    "a read inside": _read_inside,
    "a write inside": _write_inside,
    "a module that is not there": lambda g, h: skip(g, "blocks.9", h),
    "a name of Python's": lambda g, h: skip(g, "blocks.1.__class__", h),
    "a module that never runs": lambda g, h: skip(g, "words", h),
    "a call that does not happen": lambda g, h: skip(g, "blocks.1", h, call=7),
    "its input": lambda g, h: skip(g, "blocks.1", h, port="inputs"),
    "no value": lambda g, h: skip(g, "blocks.1", leaves=()),
    "a value too many": lambda g, h: skip(g, "blocks.1", h, h, leaves=((0,), (1,))),
    "more leaves than values": lambda g, h: skip(g, "blocks.1", h, leaves=((), (1,))),
    "one leaf twice": lambda g, h: skip(g, "blocks.1", h, h, leaves=((), ())),
    "a leaf of Python's": lambda g, h: skip(g, "blocks.1", h, leaves=(("__class__",),)),
    "a value that is not there": lambda g, h: skip(g, "blocks.1", Ref(77)),
    "a value of itself": lambda g, h: skip(g, "blocks.1", Ref(1)),
    "a value below zero": lambda g, h: skip(g, "blocks.1", Ref(-1)),
    "another shape": lambda g, h: skip(g, "blocks.1", g.item(h, 0)),
    "another kind": lambda g, h: skip(g, "blocks.1", g.call("argsort", h)),
    "its own output": lambda g, h: skip(g, "blocks.1", g.read("blocks.1", X)),
    "a later value": lambda g, h: skip(g, "blocks.0", h),
    "a value of what it leaves out": lambda g, h: skip(g, "blocks.1", g.read("blocks.1.linear", X)),
    "another step": lambda g, h: g.add(Skip, site=Site("blocks.1", "output", step=3), values=(h,)),
    "an invoke that has no input": lambda g, h: g.add(
        Skip, site=Site("blocks.1", "output", invoke=1), values=(h,)
    ),
    "a stop that depends on many numbers": lambda g, h: g.add(Stop, condition=h),
    "a stop on what is not there": lambda g, h: g.add(Stop, condition=Ref(50)),
    "a stop on itself": lambda g, h: g.add(Stop, condition=Ref(1)),
    "a stop of an invoke below zero": lambda g, h: g.add(Stop, invoke=-1),
    "a stop of an impossible invoke": lambda g, h: g.add(Stop, invoke=10**6),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_and_broken_rules(gate: Gate, tmp_path: Any, name: str) -> None:
    g = built(LIES[name])
    try_all(gate, tmp_path, g.data(), g.frames())


@pytest.mark.parametrize("field", ["values", "leaves", "site", "kind"])
@pytest.mark.parametrize("junk", [None, 3, "x", [[], []], {}, [["ref", "x"]], [["__class__"]]])
def test_fields_of_other_kinds(gate: Gate, field: str, junk: Any) -> None:
    data = built(lambda g, h: skip(g, "blocks.1", h)).data()
    data["nodes"][1][field] = junk
    refused(gate.send, data, {}, "json")


def test_fields_that_there_are_not(gate: Gate) -> None:
    for node in (lambda g, h: skip(g, "blocks.1", h), lambda g, h: g.add(Stop)):
        data = built(node).data()
        data["nodes"][1]["forward"] = "import os"
        refused(gate.send, data, {}, "json")


def test_many_stops_cost_no_more_than_they_are(gate: Gate) -> None:
    """Each waits for the last: not for all that stands before it."""
    from weft.run.plan import plan

    g = Builder()
    h = g.read("blocks.0", X)
    for _ in range(2000):
        h = g.mul(h, 1.0)
        g.add(Stop, condition=g.call("any", h))
    g.save("h", h)
    steps = plan(g.graph()).steps
    assert max(len(step.deps) for step in steps if step is not None) < 5


# -- what a worker does ----------------------------------------------------------------------------


def test_a_late_skip_is_refused_with_both_lines() -> None:
    g = Builder()
    skip(g, "blocks.0", g.read("blocks.2", X))
    g.save("end", g.read("head", (2, 3, 5)))
    with pytest.raises(LateEditError, match=r"user\.py:100") as caught:
        Bench(Chain()).price(g)
    assert "user.py:101" in caught.value.line


def test_drawn_as_on_the_users_machine() -> None:
    bench = Bench(Chain())
    g = Builder()
    h = g.read("blocks.1", X, leaf=(0, 0), port="inputs")
    skip(g, "blocks.1", g.mul(h, 2.0))
    g.save("end", g.read("head", (2, 3, 5)))
    assert bench.price(g).sites == 2
    local, drawn = bench.local(g), bench.draw(g)
    with torch.no_grad():
        x = bench.net.blocks[0](X) * 2
        for block in bench.net.blocks[2:]:
            x = block(x)
        expected = bench.net.head(x)
    assert torch.equal(local["end"], expected) and torch.equal(drawn["end"], expected)


def test_what_a_stop_leaves_out_does_not_travel() -> None:
    bench = Bench(Chain())
    g = Builder()
    early = g.read("blocks.0", X)
    g.save("early", early)
    g.add(Stop, condition=g.call("any", early))
    g.save("both", [early, g.read("head", (2, 3, 5))])
    g.save("late", g.read("head", (2, 3, 5)))
    drawn = bench.draw(g)
    assert set(drawn) == {"early", "both"}
    assert torch.equal(drawn["both"][0], drawn["early"]) and drawn["both"][1] is None


def test_a_site_that_never_fires_is_still_an_error_beside_a_stop() -> None:
    g = Builder()
    g.save("x", g.read("blocks.1", X, call=4))
    g.add(Stop, condition=g.call("any", g.read("blocks.0", X)))
    with pytest.raises((NotReachedError, GraphError)):
        Bench(Chain()).price(g)
