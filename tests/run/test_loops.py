"""Loops of a generation: written once, they mean what the steps one by one mean.

The oracle of folding is unrolling, and the other way round; what unrolling gives is written down by
hand. What no recorder writes is refused by the grammar.
"""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from weft.errors import GraphError
from weft.graph.check import check
from weft.graph.folding import folded
from weft.graph.loops import length, once, unrolled
from weft.graph.node import (
    STEP_DRAWS,
    Call,
    Const,
    Fill,
    Graph,
    Loop,
    Read,
    Ref,
    Save,
    Seq,
    Stop,
    Write,
)
from weft.graph.show import show
from weft.graph.site import Site

H, G = Site("h", "output"), Site("g", "output")


def at(site, step):
    return replace(site, step=step)


def read(site=H, step=0):
    return Read(site=at(site, step), shape=(1, 4))


def written_out(*steps):
    """`for step in ...: site = read + const; log stays out; all.append(read)`, node by node."""
    nodes = [Const(key="c0", shape=(4,), dtype="float32")]
    seen = []
    for step in steps:
        here = len(nodes)
        seen.append(Ref(here))
        nodes += [
            read(H, step),
            Call(op="add", args=(Ref(here), Ref(0))),
            Write(site=at(G, step), value=Ref(here + 1)),
        ]
    return Graph(nodes=(*nodes, Save(name="all", value=Seq("list", tuple(seen)))))


def test_steps_that_are_alike_become_one_loop():
    graph = written_out(1, 2, 3, 4)
    small = folded(graph)
    assert [type(node) for node in small.nodes] == [Const, Loop, Save]
    assert list(small.nodes[1].steps) == [1, 2, 3, 4]
    assert unrolled(small) == graph
    check(small)
    assert "loop over steps 1 to 4" in show(small)


@pytest.mark.parametrize("steps", [(0, 2, 4), (3, 4), (0, 1, 2, 3, 4, 5)])
def test_steps_may_be_apart(steps):
    graph = written_out(*steps)
    small = folded(graph)
    assert list(small.nodes[1].steps) == list(steps)
    assert unrolled(small) == graph


@pytest.mark.parametrize("steps", [(3, 2, 1), (0,)])
def test_steps_that_go_back_are_no_loop(steps):
    graph = written_out(*steps)
    assert unrolled(folded(graph)) == graph
    assert not any(isinstance(node, Loop) for node in folded(graph).nodes)


def test_a_step_that_differs_ends_the_loop():
    nodes = list(written_out(1, 2, 3, 4).nodes)
    nodes[8] = Call(op="sub", args=(Ref(7), Ref(0)))  # of step 3
    graph = Graph(nodes=tuple(nodes))
    small = folded(graph)
    assert unrolled(small) == graph
    assert [list(node.steps) for node in small.nodes if isinstance(node, Loop)] == [[1, 2]]


def test_what_one_step_takes_from_the_one_before_is_no_loop():
    nodes = [read(H, 0)]
    for step in (1, 2, 3):
        nodes += [read(H, step), Call(op="add", args=(Ref(len(nodes)), Ref(len(nodes) - 1)))]
    graph = Graph(nodes=(*nodes, Save(name="sum", value=Ref(len(nodes) - 1))))
    assert unrolled(folded(graph)) == graph


def test_whole_numbers_and_truths_are_not_alike():
    nodes = []
    for step, factor in ((1, 1), (2, True), (3, 1.0)):
        nodes += [read(H, step), Call(op="mul", args=(Ref(len(nodes)), factor))]
        nodes.append(Write(site=at(G, step), value=Ref(len(nodes) - 1)))
    graph = Graph(nodes=tuple(nodes))
    assert folded(graph) == graph


def test_draws_count_with_the_steps():
    nodes = []
    for step in (2, 3):
        nodes += [read(H, step), Call(op="rand_like", args=(Ref(len(nodes)),))]
        nodes[-1] = replace(nodes[-1], draw=7 + step * STEP_DRAWS)
        nodes.append(Write(site=at(H, step), value=Ref(len(nodes) - 1)))
    graph = Graph(nodes=tuple(nodes))
    small = folded(graph)
    assert small.nodes[0].body[1].draw == 7
    assert unrolled(small) == graph


def test_a_save_stays_before_a_later_write():
    """What is saved and then changed in place: the save must not move behind the change."""
    nodes = []
    for step in (1, 2):
        here = len(nodes)
        nodes += [
            read(H, step),
            Save(name=f"before {step}", value=Ref(here)),
            Call(op="Tensor.add_", args=(Ref(here), 1.0), alias=(Ref(here),), writes=(Ref(here),)),
            Fill(site=at(H, step), value=Ref(here)),
        ]
    graph = Graph(nodes=tuple(nodes))
    assert unrolled(folded(graph)) == graph


def test_what_comes_along_is_of_the_same_step():
    graph = Graph(
        nodes=(
            read(),
            Loop(start=1, stop=3, body=(read(), Call(op="neg", args=(Ref(0),))), gives=(Ref(1),)),
            Loop(
                start=1,
                stop=3,
                takes=(Ref(0),),
                along=(Ref(1, 0),),
                body=(
                    Call(op="add", args=(Ref(0), Ref(1))),
                    Write(site=G, value=Ref(2)),
                    Stop(condition=Ref(2)),
                ),
            ),
            Save(name="second", value=Ref(1, 1)),
        )
    )
    check(graph)
    assert length(graph) == 12
    assert unrolled(graph).nodes == (
        read(),
        read(H, 1),
        Call(op="neg", args=(Ref(1),)),
        read(H, 2),
        Call(op="neg", args=(Ref(3),)),
        Call(op="add", args=(Ref(0), Ref(2))),
        Write(site=at(G, 1), value=Ref(5)),
        Stop(condition=Ref(5), step=1),
        Call(op="add", args=(Ref(0), Ref(4))),
        Write(site=at(G, 2), value=Ref(8)),
        Stop(condition=Ref(8), step=2),
        Save(name="second", value=Ref(4)),
    )
    assert len(once(graph).nodes) == 7


BODY = (read(), Write(site=G, value=Ref(0)))
ODD = {
    "no steps": Loop(start=3, stop=3, body=BODY),
    "backwards": Loop(start=3, stop=1, body=BODY),
    "before the first": Loop(start=-1, stop=2, body=BODY),
    "without end": Loop(start=0, stop=2**40, body=BODY),
    "standing still": Loop(start=0, stop=2, by=0, body=BODY),
    "empty": Loop(start=0, stop=2, body=()),
    "a save inside": Loop(start=0, stop=2, body=(read(), Save(name="x", value=Ref(0)))),
    "a loop inside": Loop(start=0, stop=2, body=(Loop(start=0, stop=2, body=BODY),)),
    "a site of a step": Loop(start=0, stop=2, body=(read(H, 1),)),
    "the ids inside": Loop(start=0, stop=2, body=(Read(site=Site("", "result"), shape=(1, 2)),)),
    "what comes later": Loop(start=0, stop=2, body=(Write(site=G, value=Ref(1)), read())),
    "what is not there": Loop(start=0, stop=2, body=(Write(site=G, value=Ref(-1)),)),
    "another result": Loop(
        start=0, stop=2, takes=(Ref(0),), body=(Write(site=G, value=Ref(0, 1)),)
    ),
    "itself": Loop(start=0, stop=2, takes=(Ref(1),), body=BODY),
    "too little": Loop(start=0, stop=2, body=BODY, gives=(Ref(9),)),
    "no result": Loop(start=0, stop=2, body=BODY, gives=(Ref(1),)),
    "along no loop": Loop(start=0, stop=2, along=(Ref(0),), body=BODY),
    "a stop elsewhere": Loop(start=0, stop=2, body=(read(), Stop(step=1))),
    "a draw of another step": Loop(
        start=0, stop=2, body=(read(), Call(op="rand_like", args=(Ref(0),), draw=STEP_DRAWS))
    ),
    "an alias of nothing": Loop(
        start=0, stop=2, body=(read(), Call(op="add", args=(Ref(0), 1), alias=(Ref(-7),)))
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_loops_are_refused(name):
    nodes = (read(), ODD[name], Save(name="s", value=Seq("list", (Ref(0), Ref(1)))))
    if not ODD[name].gives:
        nodes = nodes[:2]
    with pytest.raises(GraphError):
        check(Graph(nodes=nodes))


def test_steps_are_counted_before_they_are_written_out():
    loop = Loop(start=0, stop=60_000, body=BODY * 20)
    with pytest.raises(GraphError, match="nodes of all steps"):
        check(Graph(nodes=(loop,)))


def test_the_ids_are_only_saved():
    ids = Read(site=Site("", "result"), shape=(1, 9), dtype="int64")
    check(Graph(nodes=(ids, Save(name="ids", value=Ref(0)))))
    for bad in (
        Write(site=Site("", "result"), value=Ref(0)),
        Call(op="add", args=(Ref(0), 1)),
        Read(site=Site("h", "result"), shape=(1, 9)),
        Read(site=Site("", "result", step=1), shape=(1, 9)),
        Loop(start=0, stop=2, takes=(Ref(0),), body=(Write(site=G, value=Ref(0)),)),
    ):
        with pytest.raises(GraphError):
            check(Graph(nodes=(ids, bad)))
