"""Sites inside forwards: the grammar of their ports, and the marks of their sources.

    source.attention_interface_0.output
    source.attention_interface_0.source.nn_functional_softmax_0.output

A graph with such sites has a `Mark` for each source on the way: the hash of the text that the names
were taken from. Whoever runs it compares, so that a name never means another line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .loops import every
from .node import AnyNode, Backward, Fill, Graph, Mark, Read, Skip, Write
from .site import PORTS, Site, is_inside, operations_of

DEEPEST = 8
MOST_MARKS = 65_536

_PORT = re.compile(r"(?:source\.[A-Za-z_][A-Za-z0-9_]{0,255}\.)+(?:inputs|output)")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")

Place = tuple[str, tuple[str, ...]]
"""(path of a module, operations on the way): which source."""


def is_port(port: str) -> bool:
    """Whether a site may have this port."""
    if port in PORTS:
        return True
    return len(port) < 300 * DEEPEST and port.count(".") <= 2 * DEEPEST and bool(
        _PORT.fullmatch(port)
    )  # fmt: skip


def sites_of(node: AnyNode) -> tuple[Site, ...]:
    """The sites that a node names."""
    if isinstance(node, (Read, Write, Fill, Skip)):
        return (node.site,)
    return node.since if isinstance(node, Backward) else ()


def sites_inside(graph: Graph) -> Iterator[tuple[Site, int]]:
    """The sites of a graph that are operations, and the lines that name them."""
    for node in every(graph):
        for site in sites_of(node):
            if is_inside(site.port):
                yield site, node.at


def places_of(site: Site) -> Iterator[Place]:
    """The sources that a site is inside of, from the forward on."""
    names = operations_of(site.port)
    for depth in range(len(names)):
        yield site.path, names[:depth]


def own_place(site: Site) -> tuple[Place, ...]:
    """The source whose operation a site is; none for a module's own."""
    return ((site.path, operations_of(site.port)[:-1]),) if is_inside(site.port) else ()


def inside_of_graph(graph: Graph) -> dict[int, dict[Place, None]]:
    """Of each invoke the sources whose operations a graph names."""
    found: dict[int, dict[Place, None]] = {}
    for site, _ in sites_inside(graph):
        place = site.path, operations_of(site.port)[:-1]
        found.setdefault(site.invoke, {})[place] = None
    return found


def marks_of(graph: Graph) -> dict[Place, str]:
    """The hash of each source that a graph names."""
    return {(mark.path, mark.inside): mark.digest for mark in graph.sources}


def odd_marks(graph: Graph) -> str | None:
    """What is wrong with the marks of a graph, if anything is."""
    if len(graph.sources) > MOST_MARKS:
        return f"more than {MOST_MARKS} marks of sources"
    for mark in graph.sources:
        if not _is_mark(mark):
            return "a mark of a source has an odd place or hash"
    if not graph.sources and not _goes_inside(graph):
        return None
    marks = marks_of(graph)
    if len(marks) < len(graph.sources):
        return "a source is marked twice"
    for site, _ in sites_inside(graph):
        if any(place not in marks for place in places_of(site)):
            return f"{str(site)[:200]} is inside a source that has no mark"
    return None


def _goes_inside(graph: Graph) -> bool:
    """Whether any site is an operation. Every graph is asked, so this has no detours."""
    for node in graph.nodes:
        if isinstance(node, (Read, Write, Fill, Skip)):
            if "." in node.site.port:
                return True
        elif isinstance(node, Backward) and any(is_inside(site.port) for site in node.since):
            return True
    return False


def _is_mark(mark: Mark) -> bool:
    names = all(_NAME.fullmatch(name) for name in mark.inside)
    sane = len(mark.path) <= 4096 and mark.path.isprintable() and len(mark.inside) < DEEPEST
    return names and sane and _DIGEST.fullmatch(mark.digest) is not None
