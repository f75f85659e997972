"""Loops: the steps of a generation that are alike, written once.

    unrolled(graph)        # the same graph with the nodes of every step, and no loop
    once(graph)            # with those of the first step of each loop: for the grammar

A loop is a way of writing. What a graph with loops means is what its unrolled form means, so
whoever runs or prices one unrolls it first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from msgspec.structs import replace

from .node import (
    DRAWS,
    STEP_DRAWS,
    AnyNode,
    BodyNode,
    Call,
    Fill,
    Graph,
    Loop,
    Read,
    Ref,
    Save,
    Skip,
    Stop,
    Write,
    inputs_of,
    outs_of,
)
from .passes import renumbered
from .site import RESULT

MAX_TURNS = 65_536
_BODY = get_args(BodyNode)


def has_loops(graph: Graph) -> bool:
    return any(type(node) is Loop for node in graph.nodes)


def is_of_steps(graph: Graph) -> bool:
    """Whether the graph is one of a generation: it has steps, or its ids."""
    for node in graph.nodes:
        site = getattr(node, "site", None)
        if isinstance(node, Loop) or (site is not None and (site.step or site.port == RESULT)):
            return True
    return False


def length(graph: Graph) -> int:
    """How many nodes the unrolled graph has."""
    return sum([_length(node) for node in graph.nodes])


def _length(node: AnyNode) -> int:
    return len(node.steps) * len(node.body) if isinstance(node, Loop) else 1


def results_in(graph: Graph) -> int:
    """How many results the unrolled graph has, where a node without one counts as one."""
    count = 0
    for node in graph.nodes:
        if isinstance(node, Loop):
            count += len(node.steps) * sum([max(outs_of(one), 1) for one in node.body])
        else:
            count += max(outs_of(node), 1)
    return count


def unrolled(graph: Graph) -> Graph:
    """The graph without loops; itself where there are none."""
    return _Unrolling(graph, None).graph() if has_loops(graph) else graph


def once(graph: Graph) -> Graph:
    """The graph with one turn of each loop, whose results stand for those of all turns."""
    return _Unrolling(graph, 1).graph() if has_loops(graph) else graph


class _Unrolling:
    def __init__(self, graph: Graph, turns: int | None) -> None:
        self._graph = graph
        self._turns = turns
        self._nodes: list[AnyNode] = []
        self._place: list[int] = []  # of each node that is no loop: where it is now
        self._gives: dict[int, list[Ref]] = {}  # of each loop: its results, turn by turn

    def graph(self) -> Graph:
        for number, node in enumerate(self._graph.nodes):
            self._place.append(len(self._nodes))
            if isinstance(node, Loop):
                self._unroll(number, node)
            else:
                self._nodes.append(renumbered(node, self._outer))
        bounds = tuple([renumbered(bound, self._outer) for bound in self._graph.bounds])
        return replace(self._graph, nodes=tuple(self._nodes), bounds=bounds)

    def _outer(self, ref: Ref) -> Ref:
        given = self._gives.get(ref.node)
        if given is None:
            return Ref(self._place[ref.node], ref.out)
        return given[ref.out % len(given)]  # `once` has the results of one turn

    def _unroll(self, number: int, loop: Loop) -> None:
        taken = [self._outer(ref) for ref in loop.takes]
        given = self._gives[number] = []
        for turn, step in enumerate(loop.steps[: self._turns]):
            outer = [*taken, *[self._beside(ref, turn) for ref in loop.along]]
            base = len(self._nodes) - len(outer)

            def inner(ref: Ref, outer: list[Ref] = outer, base: int = base) -> Ref:
                is_outer = 0 <= ref.node < len(outer)
                return outer[ref.node] if is_outer else Ref(base + ref.node, ref.out)

            for node in loop.body:
                self._nodes.append(at_step(renumbered(node, inner), step))
            given += [inner(ref) for ref in loop.gives]

    def _beside(self, ref: Ref, turn: int) -> Ref:
        loop: Any = self._graph.nodes[ref.node]
        return self._gives[ref.node][turn * len(loop.gives) + ref.out]


def at_step(node: Any, step: int) -> AnyNode:
    """A node of a body in one of the steps."""
    if isinstance(node, (Read, Write, Fill, Skip)):
        return replace(node, site=replace(node.site, step=step))
    if isinstance(node, Stop):
        return replace(node, step=step)
    if isinstance(node, Call) and node.draw is not None:
        return replace(node, draw=node.draw + step * STEP_DRAWS)
    return node


def at_no_step(node: Any, step: int) -> AnyNode | None:
    """A node of this step as a body has it; None where it belongs to another one."""
    if isinstance(node, (Read, Write, Fill, Skip)):
        here = node.site.step == step and node.site.port != RESULT
        return replace(node, site=replace(node.site, step=0)) if here else None
    if isinstance(node, Stop):
        return replace(node, step=None) if node.step == step else None
    if isinstance(node, Call) and node.draw is not None:
        draw = node.draw - step * STEP_DRAWS
        return replace(node, draw=draw) if draw >= 0 and draw % DRAWS < STEP_DRAWS else None
    return node


def every(graph: Graph) -> Iterator[AnyNode]:
    """All nodes, those of loops once."""
    for node in graph.nodes:
        if isinstance(node, Loop):
            yield from node.body
        else:
            yield node


def odd_loop(graph: Graph, number: int, loop: Loop) -> str | None:
    """What is not well formed about a loop itself; its nodes are those of `once`."""
    if not 0 <= loop.start < loop.stop <= MAX_TURNS or not 1 <= loop.by <= MAX_TURNS:
        return f"a loop goes over steps from 0 to below {MAX_TURNS}"
    if not loop.body:
        return "the loop has no nodes"
    outer = len(loop.takes) + len(loop.along)
    for place, node in enumerate(loop.body, outer):
        wrong = _odd_inside(node, place, outer)
        if wrong is not None:
            return wrong
    for ref in loop.gives:
        if not 0 <= ref.node < outer + len(loop.body):
            return "the loop gives what it does not have"
    for ref in loop.along:
        other = graph.nodes[ref.node] if 0 <= ref.node < number else None
        if not isinstance(other, Loop) or other.steps != loop.steps:
            return "what comes along must be of an earlier loop over the same steps"
        if not 0 <= ref.out < len(other.gives):
            return "what comes along is named by its number in one turn"
    return None


def _odd_inside(node: Any, place: int, outer: int) -> str | None:
    if not isinstance(node, _BODY):
        return f"a {type(node).__name__.lower()} cannot stand in a loop"
    site = getattr(node, "site", None)
    if site is not None and (site.step or site.port == RESULT):
        return "a site in a loop is one of the model's, at step 0, which stands for the loop's"
    if isinstance(node, Stop) and node.step is not None:
        return "a stop in a loop has the loop's step"
    if isinstance(node, Call) and node.draw is not None and not 0 <= node.draw % DRAWS < STEP_DRAWS:
        return f"draws in a loop are numbered from 0, below {STEP_DRAWS}"
    for ref in inputs_of(node):
        if not 0 <= ref.node < place or (ref.node < outer and ref.out):
            return "a node in a loop names what is not before it"
    return None


def odd_result(nodes: tuple[AnyNode, ...]) -> tuple[int, str] | None:
    """The first node that does more with the ids of a generation than to save them."""
    results = set()
    for number, node in enumerate(nodes):
        site = getattr(node, "site", None)
        if site is not None and site.port == RESULT:
            if not isinstance(node, Read) or site.path or site.call or site.step or node.leaf:
                return number, "the result of a generation is only read, whole, at the root"
            results.add(number)
        elif results and not isinstance(node, Save):
            used = any(ref.node in results for ref in inputs_of(node))
            if used:
                return number, "the result of a generation is there when all else is over: save it"
    return None
