"""When values exist: firing indices of sites, which are comparable within one invoke only.

A time is `invoke * FIRINGS + step * TURN + index`; -1 for what needs no site. `late_index` of
several takes the largest, so a value of two invokes has a time of one of them: who needs the whole
truth looks at the graph (`last_needed`, `run.turns`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from weft.graph.node import AnyNode, Call, Fill, Read, Ref, Skip, Write, inputs_of
from weft.graph.passes import roots
from weft.graph.site import Site

FIRINGS = 1 << 52
"""Times of different invokes are so far apart: none is before or after another invoke's."""

TURN = 1 << 28
"""Times of different steps of a generation are so far apart: each step is after the one before."""

Index = Callable[[Site], int]


def last_needed(
    nodes: tuple[AnyNode, ...], index: Index, effects: tuple[type, ...]
) -> Mapping[int, int]:
    """Of each invoke: the index of the last of its sites that anything but an edit of it needs.

    `effects` are the nodes that need something for good: saves, logs, guards.
    """
    owner = roots(nodes)
    reach: list[dict[int, int]] = []  # of each node: the last site of each invoke that is in it
    written: dict[Ref, dict[int, int]] = {}  # what in-place operations have brought to a storage
    last: dict[int, int] = {}
    for node in nodes:
        found: dict[int, int] = {}
        for ref in inputs_of(node):
            _join(found, reach[ref.node])
            _join(found, written.get(owner.get(ref, ref), {}))
        if isinstance(node, Read):
            _join(found, {node.site.invoke: index(node.site)})
        elif isinstance(node, Call):
            for ref in node.writes:
                _join(written.setdefault(owner.get(ref, ref), {}), found)
        elif isinstance(node, (Write, Fill, Skip)):
            found.pop(node.site.invoke, None)
            _join(last, found)
        elif isinstance(node, effects):
            _join(last, found)
        reach.append(found)
    return last


def _join(into: dict[int, int], other: Mapping[int, int]) -> None:
    for invoke, index in other.items():
        into[invoke] = max(into.get(invoke, -1), index)
