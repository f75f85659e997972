"""The grammar, run at every border: after recording, on load, on arrival.

`check(graph)` raises `GraphError` for the first rule that does not hold. It needs no torch and no
model: it knows names, references and bounds, not shapes (that is `kernels.abstract`).
"""

from __future__ import annotations

from typing import NoReturn

from weft.errors import GraphError

from .frame import ITEM_SIZES
from .node import (
    NAME_FORMS,
    SEQ_FORMS,
    VERSION,
    AnyNode,
    Apply,
    Arg,
    Call,
    Const,
    Fill,
    Graph,
    Guard,
    Log,
    Map,
    Name,
    Param,
    Read,
    Ref,
    Save,
    Seq,
    Slice,
    Write,
    inputs_of,
    outs_of,
)
from .ops import OPS
from .site import PORTS, Site

MAX_NODES = 1_000_000
MAX_DEPTH = 32
MAX_TEXT = 4096
MAX_OUTS = 65_536
MAX_NUMBER = 2**63 - 1


def check(graph: Graph) -> None:
    """Raises `GraphError` unless the graph follows the grammar."""
    if graph.version != VERSION:
        _refuse(graph, None, f"version {graph.version} is not {VERSION}")
    if len(graph.nodes) > MAX_NODES:
        _refuse(graph, None, f"{len(graph.nodes)} nodes are more than {MAX_NODES}")
    names: set[str] = set()
    for number, node in enumerate(graph.nodes):
        _check_refs(graph, number, node)
        _check_node(graph, number, node, names)
    for bound in graph.bounds:
        if not _exists(graph, len(graph.nodes), bound.value):
            _refuse(graph, None, f"a bound names result {bound.value}, which does not exist")


def _check_refs(graph: Graph, number: int, node: AnyNode) -> None:
    declared = inputs_of(node)
    if isinstance(node, Call):
        given = set(declared)
        aliases = [ref for ref in node.alias if ref is not None]
        if not given.issuperset(aliases) or not given.issuperset(node.writes):
            _refuse(graph, number, "alias and writes may only name its own arguments")
        if len(node.alias) not in (0, node.outs):
            _refuse(graph, number, "alias must have an entry for each result")
    for ref in declared:
        if not _exists(graph, number, ref):
            _refuse(graph, number, f"it refers to result {ref.node}.{ref.out}, not made before it")


def _exists(graph: Graph, before: int, ref: Ref) -> bool:
    if not 0 <= ref.node < before:
        return False
    return 0 <= ref.out < outs_of(graph.nodes[ref.node])


def _check_node(graph: Graph, number: int, node: AnyNode, names: set[str]) -> None:
    if node.at < 0 or (node.at >= len(graph.where) and node.at):
        _refuse(graph, number, f"its line {node.at} does not exist")
    match node:
        case Read():
            _check_site(graph, number, node.site)
            _check_leaf(graph, number, node.leaf)
            _check_type(graph, number, node.dtype, node.shape)
        case Write() | Fill():
            _check_site(graph, number, node.site)
            _check_leaf(graph, number, node.leaf)
            if isinstance(node, Fill):
                _check_fill(graph, number, node)
        case Call():
            _check_call(graph, number, node)
        case Apply():
            _check_args(graph, number, (*node.args, *[value for _, value in node.kwargs]))
            if not 0 <= node.outs <= MAX_OUTS:
                _refuse(graph, number, f"{node.outs} results")
        case Const() | Param():
            _check_type(graph, number, node.dtype, node.shape)
        case Guard():
            _check_args(graph, number, (node.expected,))
            if node.look not in ("value", "shape"):
                _refuse(graph, number, f"unknown look {node.look!r}")
        case Save():
            _check_args(graph, number, (node.value,))
            if node.name in names or not node.name or len(node.name) > MAX_TEXT:
                _refuse(graph, number, f"save name {node.name[:40]!r} is empty, long or taken")
            names.add(node.name)
        case Log():
            _check_args(graph, number, node.parts)


def _check_call(graph: Graph, number: int, node: Call) -> None:
    op = OPS.get(node.op)
    if op is None:
        _refuse(graph, number, f"there is no operation {node.op[:60]!r}")
    if ("random" in op.kind) != (node.draw is not None):
        _refuse(graph, number, "exactly the random operations carry a draw number")
    if not 0 <= node.outs <= MAX_OUTS:
        _refuse(graph, number, f"{node.outs} results")
    if len({key for key, _ in node.kwargs}) != len(node.kwargs):
        _refuse(graph, number, "a keyword stands twice")
    _check_args(graph, number, (*node.args, *[value for _, value in node.kwargs]))


def _check_fill(graph: Graph, number: int, node: Fill) -> None:
    source = graph.nodes[node.value.node]
    same = isinstance(source, Read) and (source.site, source.leaf) == (node.site, node.leaf)
    if not same:
        _refuse(graph, number, "a fill takes an edited read of the same leaf")


def _check_site(graph: Graph, number: int, site: Site) -> None:
    if site.port not in PORTS:
        _refuse(graph, number, f"unknown port {site.port[:40]!r}")
    if site.call < 0 or site.step < 0 or len(site.path) > MAX_TEXT:
        _refuse(graph, number, "a site needs call and step from 0 and a path of sane length")


def _check_leaf(graph: Graph, number: int, leaf: tuple[str | int, ...]) -> None:
    if len(leaf) > MAX_DEPTH or any(str(key).startswith("__") for key in leaf):
        _refuse(graph, number, "a leaf is a short path of indices and keys")


def _check_type(graph: Graph, number: int, dtype: str, shape: tuple[int, ...]) -> None:
    if dtype not in ITEM_SIZES:
        _refuse(graph, number, f"unknown dtype {dtype[:40]!r}")
    if any(not 0 <= size <= MAX_NUMBER for size in shape) or len(shape) > MAX_DEPTH:
        _refuse(graph, number, f"impossible shape {list(shape)[:8]}")


def _check_args(graph: Graph, number: int, args: tuple[Arg, ...], depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        _refuse(graph, number, f"arguments nested deeper than {MAX_DEPTH}")
    for arg in args:
        match arg:
            case Seq():
                if arg.form not in SEQ_FORMS:
                    _refuse(graph, number, f"unknown container {arg.form[:40]!r}")
                _check_args(graph, number, arg.items, depth + 1)
            case Map():
                if len(arg.keys) != len(arg.values):
                    _refuse(graph, number, "a dict needs as many keys as values")
                _check_args(graph, number, arg.values, depth + 1)
            case Slice():
                _check_args(graph, number, (arg.start, arg.stop, arg.step), depth + 1)
            case Name():
                if arg.form not in NAME_FORMS:
                    _refuse(graph, number, f"unknown name {arg.form[:40]!r}")
            case str() if len(arg) > MAX_TEXT:
                _refuse(graph, number, f"a text of {len(arg)} characters")
            case int() if abs(arg) > MAX_NUMBER:
                _refuse(graph, number, "a number beyond 64 bits")


def _refuse(graph: Graph, number: int | None, what: str) -> NoReturn:
    if number is None:
        raise GraphError(f"the graph is not well formed: {what}")
    node = graph.nodes[number]
    at = graph.where[node.at] if 0 <= node.at < len(graph.where) else None
    kind = type(node).__name__.lower()
    raise GraphError(f"node {number} ({kind}) is not well formed: {what}", line=at)
