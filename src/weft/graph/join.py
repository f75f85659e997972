"""Two graphs as one: what the first does comes before what the second does, at each site.

    graph, constants = joined((edit, its), (experiment, others))

`constants` may be anything: they are only renamed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from msgspec.structs import replace

from .loops import is_of_steps, unrolled
from .node import STEP_DRAWS, AnyNode, Call, Const, Graph, Loop
from .passes import renumbered
from .site import Where

T = TypeVar("T")
Pair = tuple[Graph, Mapping[str, T]]


def joined(first: Pair[T], second: Pair[T]) -> tuple[Graph, dict[str, T]]:
    """One graph, with the constants of both. Draws and lines of the second keep their order."""
    before, constants = first[0], dict(first[1])
    after, others = second
    names = {key: _free(key, constants) for key in others}
    constants.update({names[key]: value for key, value in others.items()})
    shift, lines = len(before.nodes), len(before.where)
    place = {number: number + shift for number in range(len(after.nodes))}
    draws = _next_draw(before, after)
    nodes = [_moved(renumbered(node, place), node.at + lines, names, draws) for node in after.nodes]
    bounds = [replace(renumbered(bound, place), at=bound.at + lines) for bound in after.bounds]
    graph = Graph(
        nodes=(*before.nodes, *nodes),
        where=(*before.where, *(after.where or (Where("<unknown>", 0),))),
        bounds=(*before.bounds, *bounds),
        seed=before.seed if after.seed is None else after.seed,
        sources=(*before.sources, *[one for one in after.sources if one not in before.sources]),
    )
    return graph, constants


def _free(key: str, taken: Mapping[str, Any]) -> str:
    while key in taken:
        key += "'"
    return key


def _next_draw(before: Graph, after: Graph) -> int:
    """By how much the draws of the second graph move, so that none is there twice."""
    first, second = _draws(unrolled(before)), _draws(unrolled(after))
    if first.isdisjoint(second):
        return 0
    if not is_of_steps(before):
        return max(first) + 1
    places = [number % STEP_DRAWS for number in first]  # a draw stays one of its step
    return max(places) - min(places) + 1


def _draws(graph: Graph) -> set[int]:
    return {n.draw for n in graph.nodes if isinstance(n, Call) and n.draw is not None}


def _moved(node: Any, at: int, names: Mapping[str, str], draws: int) -> AnyNode:
    if isinstance(node, Const):
        return replace(node, at=at, key=names[node.key])
    if isinstance(node, Call) and node.draw is not None:
        return replace(node, at=at, draw=node.draw + draws)
    if isinstance(node, Loop):
        body = [_moved(one, one.at + at - node.at, names, draws) for one in node.body]
        return replace(node, at=at, body=tuple(body))
    return replace(node, at=at)
