"""An order of nodes in which a backward stands between what it needs and what it gives.

In a block a gradient may be asked for before its backward, and of a site that is named only after
it. In a graph everything looks back. `ordered` finds an order in which all nodes mean what they
mean in the program: what touches the same storage, site or gradient, and changes it, keeps its
place among the others that do. Where there is none, a loss depends on its own gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from heapq import heapify, heappop, heappush
from typing import Any

from weft.graph.node import (
    AnyNode,
    Backward,
    Call,
    Fill,
    Grad,
    Log,
    Read,
    Ref,
    Regrad,
    Skip,
    Stop,
    Write,
    inputs_of,
)
from weft.graph.passes import roots

_LOG = "log"
_STOP = "stop"  # what was named before a stop stays before it


class CircleError(Exception):
    """No order: `node` is the first of a circle."""

    def __init__(self, node: int) -> None:
        super().__init__(node)
        self.node = node


def is_ordered(nodes: list[AnyNode]) -> bool:
    """Whether every gradient looks back."""
    for number, node in enumerate(nodes):
        if isinstance(node, (Grad, Regrad)) and not node.of.node < node.backward < number:
            return False
    return not any(late for late in _late_edits(nodes))


def _late_edits(nodes: list[AnyNode]) -> list[tuple[int, int]]:
    """(edit, backward): edits of a site after a backward that asks for the gradient there."""
    owner = roots(tuple(nodes))
    asked: dict[Ref, list[int]] = {}
    for node in nodes:
        if isinstance(node, (Grad, Regrad)):
            root = owner.get(node.of, node.of)
            if isinstance(nodes[root.node], Read):
                asked.setdefault(root, []).append(node.backward)
    found = []
    for number, node in enumerate(nodes):
        if isinstance(node, Call) and node.writes and asked:
            for ref in node.writes:
                backwards = asked.get(owner.get(ref, ref), ())
                found += [(number, backward) for backward in backwards if backward < number]
    return found


def ordered(nodes: list[AnyNode], flows: Mapping[int, Any]) -> list[int]:
    """The old numbers in their new order. `flows` tells gradients that are the same by node.

    Raises `CircleError`.
    """
    return _sorted(len(nodes), _Order(nodes, flows).before)


class _Order:
    """`before[n]`: the nodes that must come before node n."""

    def __init__(self, nodes: list[AnyNode], flows: Mapping[int, Any]) -> None:
        self.nodes = nodes
        self.owner = roots(tuple(nodes))
        self.before: list[set[int]] = [{ref.node for ref in inputs_of(node)} for node in nodes]
        self.wrote: dict[Any, int] = {}  # what is touched -> who changed it last
        self.used: dict[Any, list[int]] = {}  # -> who has used it since then
        self.asked: dict[int, list[Any]] = {}  # backward -> storages whose gradients it gives
        for node in nodes:
            if isinstance(node, (Grad, Regrad)):
                root = self.owner.get(node.of, node.of)
                if not isinstance(nodes[root.node], Read):
                    self.asked.setdefault(node.backward, []).append(root)
        for number, node in enumerate(nodes):
            self.touch(number, node, flows)
            if isinstance(node, (Grad, Regrad)):
                self.before[number].add(node.backward)
                self.before[node.backward].add(node.of.node)
        for edit, backward in _late_edits(nodes):
            self.before[backward].add(edit)
        inside: dict[int, set[int]] = {}
        for node in nodes:
            if isinstance(node, Regrad):
                if node.backward not in inside:
                    inside[node.backward] = self.descendants(node.backward)
                self.bring(node, inside[node.backward])

    def touch(self, number: int, node: AnyNode, flows: Mapping[int, Any]) -> None:
        changed: list[Any] = []
        used: list[Any] = [] if isinstance(node, (Grad, Regrad)) else self.storages(node)
        if isinstance(node, Call):
            changed = [self.owner.get(ref, ref) for ref in node.writes]
        elif isinstance(node, (Write, Fill)):
            changed = [(node.site, node.leaf)]
            used.append(_STOP)
        elif isinstance(node, Skip):
            changed = [(node.site, leaf) for leaf in node.leaves]
            used.append(_STOP)
        elif isinstance(node, Read):
            used = [(node.site, node.leaf), _STOP]
        elif isinstance(node, Grad):
            used = [flows[number]] if number in flows else []
        elif isinstance(node, Regrad):
            changed, used = [flows[number]], self.storages(node)
        elif isinstance(node, Log):
            changed = [_LOG]
        elif isinstance(node, Stop):
            changed = [_STOP]
        elif isinstance(node, Backward):
            used += self.asked.get(number, [])
        for what in used:
            if what in self.wrote:
                self.before[number].add(self.wrote[what])
            if what not in changed:
                self.used.setdefault(what, []).append(number)
        for what in changed:
            self.before[number].update(self.used.pop(what, ()))
            if what in self.wrote:
                self.before[number].add(self.wrote[what])
            self.wrote[what] = number
        self.before[number].discard(number)

    def storages(self, node: AnyNode) -> list[Any]:
        given = (node.value,) if isinstance(node, Regrad) else inputs_of(node)
        return [self.owner.get(ref, ref) for ref in given]

    def bring(self, node: Regrad, inside: set[int]) -> None:
        """What a replacement needs beside gradients must be there before the backward."""
        waiting, seen = [node.value.node], set()
        while waiting:
            one = waiting.pop()
            if one in seen:
                continue
            seen.add(one)
            if one not in inside:
                self.before[node.backward].add(one)
            else:
                waiting += [n for n in self.before[one] if n != node.backward]

    def descendants(self, backward: int) -> set[int]:
        after: dict[int, list[int]] = {}
        for number, before in enumerate(self.before):
            for one in before:
                after.setdefault(one, []).append(number)
        found, waiting = {backward}, [backward]
        while waiting:
            for number in after.get(waiting.pop(), ()):
                if number not in found:
                    found.add(number)
                    waiting.append(number)
        return found


def _sorted(count: int, before: list[set[int]]) -> list[int]:
    left = [len(one) for one in before]
    after: list[list[int]] = [[] for _ in range(count)]
    for number, one in enumerate(before):
        for other in one:
            after[other].append(number)
    ready = [number for number in range(count) if not left[number]]
    heapify(ready)
    order = []
    while ready:
        number = heappop(ready)
        order.append(number)
        for other in after[number]:
            left[other] -= 1
            if not left[other]:
                heappush(ready, other)
    if len(order) < count:
        done = set(order)
        raise CircleError(next(number for number in range(count) if number not in done))
    return order
