"""Folding: steps of a generation that were recorded one by one and are alike become one loop.

    folded(graph)      # means the same; a body that 200 steps share is written once

Two runs of nodes are alike if one is the other at another step: the same nodes, lines included,
with what stands before them the same, and what they make themselves in the same places. Saves of
what nobody changes any more move behind the loops, for a loop has none in it.
"""

from __future__ import annotations

from typing import Any, get_args

import msgspec
from msgspec.structs import replace

from .loops import at_no_step
from .node import AnyNode, BodyNode, Call, Graph, Loop, Ref, Save, Stop, inputs_of
from .passes import renumbered, roots

LONGEST = 4096
"""Nodes of a body that is looked for."""

_BODY = get_args(BodyNode)
_ENCODER = msgspec.msgpack.Encoder()


def folded(graph: Graph) -> Graph:
    """The graph with loops in place of steps that are alike; itself where there are none."""
    if not any(_step(node) for node in graph.nodes):
        return graph
    return _Folding(_saves_last(graph)).graph()


def _step(node: Any) -> int:
    """The step of what has one; 0 else."""
    site = getattr(node, "site", None)
    if site is not None:
        return site.step
    return (node.step or 0) if isinstance(node, Stop) else 0


def _saves_last(graph: Graph) -> Graph:
    """Moves saves to the end, those that mean the same there."""
    owner = roots(graph.nodes)
    written: set[Ref] = set()  # storages that later nodes write into
    last: list[int] = []
    for number in range(len(graph.nodes) - 1, -1, -1):
        node = graph.nodes[number]
        if isinstance(node, Save):
            if not any(owner.get(ref, ref) in written for ref in inputs_of(node)):
                last.append(number)
        elif isinstance(node, Call):
            written.update([owner.get(ref, ref) for ref in node.writes])
    moved = set(last)
    order = [n for n in range(len(graph.nodes)) if n not in moved] + last[::-1]
    place = {old: new for new, old in enumerate(order)}
    nodes = tuple([renumbered(graph.nodes[old], place) for old in order])
    bounds = tuple([renumbered(bound, place) for bound in graph.bounds])
    return replace(graph, nodes=nodes, bounds=bounds)


class _Folding:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._nodes = graph.nodes
        self._bound = {bound.value.node for bound in graph.bounds}
        self._new: list[AnyNode] = []
        self._place: dict[
            int, Any
        ] = {}  # of a node: its number, or its outs as the loop gives them
        self._last: dict[Ref, int] = {}  # of a result: the last node that uses it
        for number, node in enumerate(self._nodes):
            for ref in inputs_of(node):
                self._last[ref] = number
        self._next = self._find_next()

    def graph(self) -> Graph:
        number = 0
        while number < len(self._nodes):
            length, turns, by = self._run(number)
            if turns > 1:
                self._fold(number, length, turns, by)
                number += length * turns
            else:
                self._place[number] = len(self._new)
                self._new.append(renumbered(self._nodes[number], self._outer))
                number += 1
        bounds = tuple([renumbered(bound, self._outer) for bound in self._graph.bounds])
        return replace(self._graph, nodes=tuple(self._new), bounds=bounds)

    def _outer(self, ref: Ref) -> Ref:
        there = self._place[ref.node]
        return there[ref.out] if isinstance(there, dict) else Ref(there, ref.out)

    # Runs that are alike

    def _find_next(self) -> dict[int, int]:
        """For each node at a site: the next one that is the same at another step."""
        seen: dict[Any, int] = {}
        found: dict[int, int] = {}
        for number in range(len(self._nodes) - 1, -1, -1):
            node: Any = self._nodes[number]
            site = getattr(node, "site", None)
            if site is None:
                continue
            key = type(node), site.path, site.port, site.call, site.invoke, node.at
            if key in seen:
                found[number] = seen[key]
            seen[key] = number
        return found

    def _run(self, start: int) -> tuple[int, int, int]:
        """(nodes of a body, turns, steps from one to the next) of the loop that begins here."""
        after = self._next.get(start)
        if after is None or after - start > LONGEST:
            return 0, 1, 1
        length = after - start
        by = _step(self._nodes[after]) - _step(self._nodes[start])
        body = self._alike(start, length)
        if by < 1 or body is None:
            return 0, 1, 1
        turns, step = 1, _step(self._nodes[start])
        while True:
            place = start + turns * length
            same = place + length <= len(self._nodes)
            if not same or _step(self._nodes[place]) != step + turns * by:
                break
            if self._alike(place, length) != body:
                break
            turns += 1
        return length, turns, by

    def _alike(self, start: int, length: int) -> bytes | None:
        """The nodes of one turn without what differs between turns; None where it is no turn."""
        nodes = self._nodes[start : start + length]
        step = _step(nodes[0])

        def inner(ref: Ref) -> Ref:
            return Ref(start - ref.node - 1, ref.out) if ref.node >= start else ref

        found = []
        for number, node in enumerate(nodes, start):
            if not isinstance(node, _BODY) or number in self._bound:
                return None
            plain = at_no_step(node, step)
            if plain is None:
                return None
            found.append(renumbered(plain, inner))
        return _ENCODER.encode(found)

    # One loop

    def _fold(self, start: int, length: int, turns: int, by: int) -> None:
        end, step = start + length * turns, _step(self._nodes[start])
        takes: dict[Ref, None] = {}
        for node in self._nodes[start : start + length]:
            takes.update(dict.fromkeys([ref for ref in inputs_of(node) if ref.node < start]))
        names = {ref: Ref(n) for n, ref in enumerate(takes)}

        def inner(ref: Ref) -> Ref:
            return names.get(ref) or Ref(len(names) + ref.node - start, ref.out)

        body = [
            renumbered(at_no_step(node, step), inner)
            for node in self._nodes[start : start + length]
        ]
        wanted = {
            Ref((ref.node - start) % length, ref.out)
            for ref, last in self._last.items()
            if start <= ref.node < end <= last
        }
        gives = sorted(wanted, key=lambda ref: (ref.node, ref.out))
        index = len(self._new)
        for turn in range(turns):
            for number in range(length):
                self._place[start + turn * length + number] = {
                    ref.out: Ref(index, turn * len(gives) + n)
                    for n, ref in enumerate(gives)
                    if ref.node == number
                }
        self._new.append(
            Loop(
                start=step,
                stop=step + (turns - 1) * by + 1,
                by=by,
                body=tuple(body),
                takes=tuple([self._outer(ref) for ref in takes]),
                gives=tuple([Ref(len(names) + ref.node, ref.out) for ref in gives]),
                at=self._nodes[start].at,
            )
        )
