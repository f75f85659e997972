"""What a stranger's graph says of modules that are not to run, held against the pass as it is.

A skip gives what the module would: the same tensors at the same leaves, no other. What would fire
inside the module is no site of this graph. Two skips of one call, or one inside another, are
refused; so is a value that comes too late (`late`, when the graph is played through).
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from weft.errors import GraphError, NotReachedError, SiteMismatchError, WriteMismatchError
from weft.graph.node import Fill, Graph, Read, Skip, Write
from weft.graph.site import Where, leaf_text
from weft.kernels.aval import Aval
from weft.run.skips import begin_of
from weft.signatures.structure import Opaque

if TYPE_CHECKING:
    from .places import Places

Span = tuple[int, int, Skip]


def check_skips(graph: Graph, places: Places) -> None:
    """Raises where a skip does not fit the pass, or other nodes need what it leaves out."""
    spans: dict[tuple[int, int], list[Span]] = {}
    for node in graph.nodes:
        if isinstance(node, Skip):
            line = _line(graph, node)
            _check_leaves(node, places, line)
            span = places.find(begin_of(node.site), line).index, places.index(node.site), node
            spans.setdefault((node.site.invoke, node.site.step), []).append(span)
    for one in spans.values():
        one.sort(key=lambda span: span[:2])
        _check_apart(graph, one)
    if spans:
        _check_others(graph, places, spans)


def _check_leaves(node: Skip, places: Places, line: Where | None) -> None:
    signature = places.find(node.site, line)
    for leaf, what in signature.leaves:
        if isinstance(what, Opaque):
            raise GraphError(
                f"{node.site}{leaf_text(leaf)} is a {what}, which a graph cannot make, so the "
                "module cannot be skipped",
                line=line,
            )
    if [leaf for leaf, _ in signature.tensors] != list(node.leaves):
        leaves = ", ".join([leaf_text(leaf) or "the whole" for leaf, _ in signature.tensors[:6]])
        raise SiteMismatchError(
            f"a skip of {node.site.path or 'the root'} gives other tensors than it returns",
            line=line,
            fix=f"its tensors are {leaves}" if leaves else "it returns no tensor",
        )


def _check_apart(graph: Graph, spans: list[Span]) -> None:
    for (_, end, outer), (begin, _, inner) in pairwise(spans):
        if begin <= end:
            raise GraphError(
                f"{inner.site} is skipped twice, or inside {outer.site}",
                line=_line(graph, inner),
            )


def _check_others(graph: Graph, places: Places, spans: dict[tuple[int, int], list[Span]]) -> None:
    for node in graph.nodes:
        if not isinstance(node, (Read, Write, Fill)):
            continue
        index = places.index(node.site)
        there = spans.get((node.site.invoke, node.site.step), ())
        inside = [s for s in there if s[0] < index < s[1]]
        if inside:
            raise NotReachedError(
                f"{node.site} does not fire: {inside[0][2].site.path or 'the root'} is skipped",
                line=_line(graph, node),
                fix="skip only the modules inside that are not needed",
            )


def check_values(node: Skip, avals: list[Aval], places: Places, line: Where | None) -> None:
    """Raises unless values fit the leaves: shapes exactly, dtypes where not both floating."""
    for (leaf, own), value in zip(places.find(node.site, line).tensors, avals, strict=True):
        floating = own.dtype.is_floating_point and value.dtype.is_floating_point
        if value.shape != own.shape or (value.dtype != own.dtype and not floating):
            raise WriteMismatchError(
                f"{node.site}{leaf_text(leaf)} is {own!r}, but {value!r} is given for it",
                line=line,
                fix="give a tensor of the module's own shape and kind",
            )


def _line(graph: Graph, node: Skip | Read | Write | Fill) -> Where | None:
    return graph.where[node.at] if node.at < len(graph.where) else None
