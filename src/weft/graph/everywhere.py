"""An edit of a model as a part of a generation: what it does at every step.

    everywhere(edit, steps=20)      # its nodes at step 0, and at each step after it

An edit holds for every input, so its nodes are the same at each step; whether they fit the one
position that a later step sees is checked where the graph is drawn, as for any other graph.
"""

from __future__ import annotations

from msgspec.structs import replace

from weft.errors import GraphError

from .folding import folded
from .loops import at_step
from .node import AnyNode, Apply, Bound, Call, Const, Fill, Graph, Param, Read, Skip, Write
from .passes import renumbered

KINDS = (Read, Write, Fill, Skip, Call, Apply, Param, Const)
"""What an edit may hold: it brings nothing back, looks at nothing, and ends nothing."""
_ONCE = (Param, Const)


def check_pure_edit(graph: Graph) -> None:
    """Raises `GraphError` for what cannot be a part of an edit."""
    for node in graph.nodes:
        site = getattr(node, "site", None)
        if not isinstance(node, KINDS) or (site is not None and (site.invoke or site.step)):
            raise GraphError(
                f"a {type(node).__name__.lower()} cannot be part of an edit",
                line=graph.where[node.at] if node.at < len(graph.where) else None,
                fix="record it with model.edit() and write it with edited.save_edits(path)",
            )


def everywhere(edit: Graph, steps: int) -> Graph:
    """The edit at each of so many steps."""
    nodes: list[AnyNode] = list(edit.nodes)
    bounds: list[Bound] = list(edit.bounds)
    place = {number: number for number in range(len(edit.nodes))}
    for step in range(1, steps):
        for number, node in enumerate(edit.nodes):
            if not isinstance(node, _ONCE):
                place[number] = len(nodes)
                nodes.append(at_step(renumbered(node, place), step))
        bounds += [renumbered(bound, place) for bound in edit.bounds]
    return folded(replace(edit, nodes=tuple(nodes), bounds=tuple(bounds)))
