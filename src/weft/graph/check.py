"""The grammar, run at every border: after recording, on load, on arrival.

`check(graph)` raises `GraphError` for the first rule that does not hold. It needs no torch and no
model: it knows names, references and bounds, not shapes (that is `kernels.abstract`). What it takes
is bounded by the size of the graph.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

from weft.errors import GraphError

from .frame import ITEM_SIZES
from .gradients import odd, odd_one
from .inside import is_port, odd_marks
from .loops import has_loops, length, odd_loop, odd_result, once
from .node import (
    SEQ_FORMS,
    VERSION,
    AnyNode,
    Apply,
    Arg,
    Backward,
    Bound,
    Call,
    Complex,
    Const,
    Fill,
    Grad,
    Graph,
    Guard,
    Log,
    Loop,
    Map,
    Name,
    Param,
    Read,
    Ref,
    Regrad,
    Save,
    Seq,
    Shape,
    Skip,
    Slice,
    Stop,
    Write,
    inputs_of,
    outs_of,
    refs,
)
from .ops import IN_GRAPHS, OPS, is_effect, is_random
from .passes import roots
from .site import RESULT, Site, split_port

MAX_NODES = 1_000_000
MAX_DEPTH = 32
MAX_TEXT = 4096
MAX_NAME = 256
MAX_OUTS = 65_536
MAX_ITEMS = 65_536
MAX_NUMBER = 2**63 - 1
MAX_LOGGED = 1024
MAX_INVOKES = 512

ACTING = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that act on a terminal or a page, or turn the direction of a line. No name has one."""

RESERVED = frozenset(("out", "device", "generator"))
"""Keywords of operations by which a graph would reach beside its own values."""

DTYPES = frozenset(ITEM_SIZES) | {"uint16", "uint32", "uint64", "complex32"} | {
    f"float8_{kind}" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
}  # fmt: skip
"""Dtypes that may stand among the arguments of an operation."""

NAMES: dict[str, frozenset[str]] = {
    "dtype": DTYPES,
    "memory_format": frozenset(
        ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
    ),
    "layout": frozenset(("strided",)),
    "ellipsis": frozenset(("",)),
    "float": frozenset(("inf", "-inf", "nan")),
}
"""What a `Name` of each form may say. Whatever it says is looked up by name."""


def check(graph: Graph) -> None:
    """Raises `GraphError` unless the graph follows the grammar."""
    _check_whole(graph)
    _check_result(graph)
    if has_loops(graph):
        _check_loops(graph)
        graph = once(graph)
    saves: set[str] = set()
    draws: set[int] = set()
    gradients = False
    for number, node in enumerate(graph.nodes):
        _check_args(graph, number, _args_of(node))
        _check_refs(graph, number, node)
        _check_node(graph, number, node)
        if isinstance(node, Save):
            _once(graph, number, node.name, saves, "a save's name")
        elif isinstance(node, Call) and node.draw is not None:
            _once(graph, number, node.draw, draws, "a draw's number")
        elif isinstance(node, (Backward, Grad, Regrad)):
            gradients = True
    _check_constants(graph)
    for bound in graph.bounds:
        _check_bound(graph, bound)
    if (unmarked := odd_marks(graph)) is not None:
        _refuse(graph, None, unmarked)
    if gradients:
        wrong = odd_one(graph, roots(graph.nodes))
        if wrong is not None:
            _refuse(graph, *wrong)


# -- the graph as a whole ------------------------------------------------------------------------


def _check_whole(graph: Graph) -> None:
    if graph.version != VERSION:
        _refuse(graph, None, f"version {graph.version} is not {VERSION}")
    if len(graph.nodes) > MAX_NODES:
        _refuse(graph, None, f"{len(graph.nodes)} nodes are more than {MAX_NODES}")
    if graph.seed is not None and not 0 <= graph.seed <= MAX_NUMBER:
        _refuse(graph, None, "a seed is a whole number of 63 bits from 0")
    if graph.root is not None and not (_is_text(graph.root) and graph.root.isidentifier()):
        _refuse(graph, None, "its root is no name of a method")
    for line in graph.where:
        if max(len(line.file), len(line.text)) > MAX_TEXT or not _is_size(line.line):
            _refuse(graph, None, "a line of the user's source has an impossible place")
        if not _is_text(line.file, 0) or not _is_text(line.text.replace("\t", " "), 0):
            _refuse(graph, None, "a line of the user's source holds control characters")


def _check_loops(graph: Graph) -> None:
    for number, node in enumerate(graph.nodes):
        wrong = odd_loop(graph, number, node) if isinstance(node, Loop) else None
        if wrong is not None:
            _refuse(graph, number, wrong)
        _check_refs(graph, number, node)
    if length(graph) > MAX_NODES:
        _refuse(graph, None, f"{length(graph)} nodes of all steps are more than {MAX_NODES}")
    for bound in graph.bounds:
        _check_bound(graph, bound)


def _check_result(graph: Graph) -> None:
    wrong = odd_result(graph.nodes)
    if wrong is not None:
        _refuse(graph, *wrong)


def _check_constants(graph: Graph) -> None:
    types: dict[str, tuple[Any, ...]] = {}
    for number, node in enumerate(graph.nodes):
        if not isinstance(node, Const):
            continue
        said = node.dtype, node.shape
        if types.setdefault(node.key, said) != said:
            _refuse(graph, number, "a constant stands twice, with different types")


def _check_bound(graph: Graph, bound: Bound) -> None:
    if not _exists(graph, len(graph.nodes), bound.value):
        _refuse(graph, None, f"a bound names result {bound.value}, which does not exist")
    if not 0 <= bound.dim < 2 * MAX_DEPTH or not _is_size(bound.size) or not _is_size(bound.at):
        _refuse(graph, None, "a bound names an impossible size")


def _once(graph: Graph, number: int, name: Any, seen: set[Any], what: str) -> None:
    if name in seen:
        _refuse(graph, number, f"{what} stands twice: {str(name)[:40]!r}")
    seen.add(name)


# -- references ----------------------------------------------------------------------------------


def _check_refs(graph: Graph, number: int, node: AnyNode) -> None:
    declared = inputs_of(node)
    if isinstance(node, Call):
        _check_declared(graph, number, node, set(declared))
    for ref in declared:
        if not _exists(graph, number, ref):
            _refuse(graph, number, f"it refers to result {ref.node}.{ref.out}, not made before it")


def _check_declared(graph: Graph, number: int, node: Call, given: set[Ref]) -> None:
    aliases = [ref for ref in node.alias if ref is not None]
    if not given.issuperset(aliases) or not given.issuperset(node.writes):
        _refuse(graph, number, "alias and writes may only name its own arguments")
    if len(node.alias) not in (0, node.outs):
        _refuse(graph, number, "alias must have an entry for each result")


def _exists(graph: Graph, before: int, ref: Ref) -> bool:
    if not 0 <= ref.node < before:
        return False
    return 0 <= ref.out < outs_of(graph.nodes[ref.node])


# -- nodes ---------------------------------------------------------------------------------------


def _check_node(graph: Graph, number: int, node: AnyNode) -> None:
    if node.at < 0 or (node.at >= len(graph.where) and node.at):
        _refuse(graph, number, f"its line {node.at} does not exist")
    match node:
        case Read() | Write() | Fill():
            _check_site(graph, number, node.site)
            _check_leaf(graph, number, node.leaf)
            if isinstance(node, Read):
                _check_type(graph, number, node.dtype, node.shape)
            elif isinstance(node, Fill):
                _check_fill(graph, number, node)
        case Call():
            _check_call(graph, number, node)
        case Apply():
            _check_apply(graph, number, node)
        case Const() | Param():
            _check_type(graph, number, node.dtype, node.shape)
            if not _is_text(node.path if isinstance(node, Param) else node.key):
                _refuse(graph, number, f"its name is empty, {_ODD}")
        case Guard():
            _check_guard(graph, number, node)
        case Save():
            if not _is_text(node.name):
                _refuse(graph, number, f"save name {node.name[:40]!r} is empty, {_ODD}")
        case Log():
            if len(refs(node.parts)) > MAX_LOGGED:
                _refuse(graph, number, f"more than {MAX_LOGGED} values in one log")
            if node.stream is not None and not 0 <= node.stream < MAX_LOGGED:
                _refuse(graph, number, f"streams are numbered from 0, below {MAX_LOGGED}")
        case Skip():
            _check_skip(graph, number, node)
        case Stop():
            if node.invoke is not None and not 0 <= node.invoke < MAX_INVOKES:
                _refuse(graph, number, f"invokes are numbered from 0, below {MAX_INVOKES}")
            if node.step is not None and not _is_size(node.step):
                _refuse(graph, number, "steps are numbered from 0")
        case Backward() | Grad() | Regrad():
            _check_gradient(graph, number, node)
        case _:
            _refuse(graph, number, "there is no such kind of node")


def _check_gradient(graph: Graph, number: int, node: Backward | Grad | Regrad) -> None:
    wrong = odd(graph, number, node)
    if wrong is not None:
        _refuse(graph, number, wrong)
    for site in node.since if isinstance(node, Backward) else ():
        _check_site(graph, number, site)


def _check_call(graph: Graph, number: int, node: Call) -> None:
    op = OPS.get(node.op)
    if op is None:
        _refuse(graph, number, f"there is no operation {node.op[:60]!r}")
    if op.kind not in IN_GRAPHS:
        _refuse(graph, number, f"{node.op} gives no tensor, so it is no operation of a graph")
    if is_random(node.op) != (node.draw is not None):
        _refuse(graph, number, "exactly the random operations carry a draw number")
    if node.draw is not None and not 0 <= node.draw <= MAX_NUMBER:
        _refuse(graph, number, "draws are numbered from 0")
    if node.seed is not None and (node.draw is None or not 0 <= node.seed <= MAX_NUMBER):
        _refuse(graph, number, "a draw's seed is a whole number of 63 bits from 0")
    if not 0 <= node.outs <= MAX_OUTS:
        _refuse(graph, number, f"{node.outs} results")
    _check_keywords(graph, number, node.kwargs)
    reserved = sorted(RESERVED.intersection([key for key, _ in node.kwargs]))
    if reserved:
        _refuse(graph, number, f"{reserved[0]}= cannot be given to {node.op} in a graph")
    if node.writes and not is_effect(node.op):
        _refuse(graph, number, f"{node.op} changes no argument")
    if _changes_argument(node):
        _refuse(graph, number, f"{node.op} would change an argument when called like this")


def _check_apply(graph: Graph, number: int, node: Apply) -> None:
    if not 0 <= node.outs <= MAX_OUTS or len(node.types) > MAX_OUTS:
        _refuse(graph, number, f"{node.outs} results")
    if not _is_text(node.path, 0):
        _refuse(graph, number, f"its path is {_ODD}")
    _check_keywords(graph, number, node.kwargs)
    for dtype, shape in node.types:
        _check_type(graph, number, dtype, shape, DTYPES)


def _check_keywords(graph: Graph, number: int, kwargs: tuple[tuple[str, Arg], ...]) -> None:
    names = {key for key, _ in kwargs}
    if len(names) != len(kwargs):
        _refuse(graph, number, "a keyword stands twice")
    if not all(_is_text(name, 1, MAX_NAME) for name in names):
        _refuse(graph, number, f"a keyword is empty, {_ODD}")


def _check_fill(graph: Graph, number: int, node: Fill) -> None:
    source = graph.nodes[node.value.node]
    same = isinstance(source, Read) and (source.site, source.leaf) == (node.site, node.leaf)
    if not same:
        _refuse(graph, number, "a fill takes an edited read of the same leaf")


def _check_skip(graph: Graph, number: int, node: Skip) -> None:
    _check_site(graph, number, node.site)
    if split_port(node.site.port)[1] != "output":
        _refuse(graph, number, "what is skipped is named by its output")
    if len(node.leaves) != len(node.values) or len(set(node.leaves)) < len(node.leaves):
        _refuse(graph, number, "a skip needs different leaves, and a value for each")
    if len(node.leaves) > MAX_ITEMS:
        _refuse(graph, number, f"more than {MAX_ITEMS} values")
    for leaf in node.leaves:
        _check_leaf(graph, number, leaf)


def _check_guard(graph: Graph, number: int, node: Guard) -> None:
    if node.look not in ("value", "shape"):
        _refuse(graph, number, f"unknown look {node.look[:40]!r}")
    if node.look == "shape":
        sizes = node.expected.items if isinstance(node.expected, Seq) else None
        if sizes is None or len(sizes) > MAX_DEPTH or not all(map(_is_size, sizes)):
            _refuse(graph, number, "a shape is a row of sizes")
    elif not _is_numbers(node.expected):
        _refuse(graph, number, "a guard expects numbers, in lists or alone")


def _is_numbers(arg: Arg) -> bool:
    if isinstance(arg, Seq):
        return arg.form != "size" and all(map(_is_numbers, arg.items))
    return isinstance(arg, (bool, int, float, Complex)) or (
        isinstance(arg, Name) and arg.form == "float"
    )


def _check_site(graph: Graph, number: int, site: Site) -> None:
    if not is_port(site.port) and site.port != RESULT:
        _refuse(graph, number, f"unknown port {site.port[:40]!r}")
    if not _is_size(site.call) or not _is_size(site.step):
        _refuse(graph, number, "a site needs call and step from 0")
    if not _is_size(site.invoke) or site.invoke >= MAX_INVOKES:
        _refuse(graph, number, f"invokes are numbered from 0, below {MAX_INVOKES}")
    if not _is_text(site.path, 0):
        _refuse(graph, number, f"its path is {_ODD}")


def _check_leaf(graph: Graph, number: int, leaf: tuple[str | int, ...]) -> None:
    if len(leaf) > MAX_DEPTH or not all(map(_is_key, leaf)):
        _refuse(graph, number, "a leaf is a short path of indices and keys")


def _is_key(key: str | int) -> bool:
    if isinstance(key, str):
        return not key.startswith("__") and _is_text(key, 0, MAX_NAME)
    return abs(key) <= MAX_NUMBER


_ODD = "too long, or holds control characters"


def _is_text(text: str, least: int = 1, most: int = MAX_TEXT) -> bool:
    """Whether a name is of sane length and can be shown."""
    return least <= len(text) <= most and (text.isprintable() or not ACTING.search(text))


def _check_type(
    graph: Graph,
    number: int,
    dtype: str,
    shape: tuple[int, ...],
    dtypes: frozenset[str] | dict[str, int] = ITEM_SIZES,
) -> None:
    if dtype not in dtypes:
        _refuse(graph, number, f"unknown dtype {dtype[:40]!r}")
    if not all(map(_is_size, shape)) or len(shape) > MAX_DEPTH:
        _refuse(graph, number, f"impossible shape {list(shape)[:8]}")


def _is_size(size: Any) -> bool:
    return type(size) is int and 0 <= size <= MAX_NUMBER


# -- operations that would change an argument when told to ---------------------------------------

ASKS: dict[str, tuple[int, str]] = {
    **{f"nn.functional.{name}": (1, "inplace") for name in (
        "hardsigmoid", "hardswish", "mish", "relu", "relu6", "selu", "silu"
    )},
    **{f"nn.functional.{name}": (2, "inplace") for name in ("celu", "elu", "leaky_relu")},
    **{f"nn.functional.{name}": (3, "inplace") for name in ("hardtanh", "threshold")},
    "nn.functional.embedding": (3, "max_norm"),
    "nn.functional.normalize": (4, "out"),
    "norm": (4, "out"),
    "tensordot": (3, "out"),
}  # fmt: skip
"""The argument that asks for it, by place and by name."""
_STATISTICS = ("nn.functional.batch_norm", "nn.functional.instance_norm")


def _changes_argument(node: Call) -> bool:
    named = dict(node.kwargs)
    if named.get("out") is not None or named.get("inplace"):
        return True
    place, name = ASKS.get(node.op, (0, ""))
    if name and _given(node, named, place, name):
        return True
    if node.op in _STATISTICS and _given(node, named, 1, "running_mean"):
        keyword = "training" if node.op == _STATISTICS[0] else "use_input_stats"
        return bool(_given(node, named, 5, keyword, keyword == "use_input_stats"))
    return False


def _given(node: Call, named: dict[str, Arg], place: int, name: str, default: Any = None) -> Any:
    """An argument, by place or by name."""
    return named.get(name, node.args[place] if len(node.args) > place else default)


# -- arguments -----------------------------------------------------------------------------------


def _args_of(node: AnyNode) -> tuple[Arg, ...]:
    match node:
        case Call() | Apply():
            return (*node.args, *[value for _, value in node.kwargs])
        case Guard():
            return (node.value, node.expected)
        case Save() | Write() | Fill():
            return (node.value,)
        case Log():
            return (*node.parts, node.after)
    return ()


def _check_args(
    graph: Graph, number: int, args: tuple[Arg, ...], depth: int = 0, room: int = MAX_ITEMS
) -> int:
    """Checks arguments; returns how many more there may be."""
    room -= len(args)
    if depth > MAX_DEPTH:
        _refuse(graph, number, f"arguments nested deeper than {MAX_DEPTH}")
    if room < 0:
        _refuse(graph, number, f"more than {MAX_ITEMS} arguments")
    for arg in args:
        match arg:
            case None | bool() | float() | Ref() | Complex() | Shape():
                pass
            case int():
                if abs(arg) > MAX_NUMBER:
                    _refuse(graph, number, "a number beyond 64 bits")
            case str():
                if len(arg) > MAX_TEXT:
                    _refuse(graph, number, f"a text of {len(arg)} characters")
            case Name():
                if arg.name not in NAMES.get(arg.form, ()):
                    said = f"{arg.form[:40]!r} {arg.name[:40]!r}"
                    _refuse(graph, number, f"unknown name {said}")
            case _:
                room = _check_args(graph, number, _inner(graph, number, arg), depth + 1, room)
    return room


def _inner(graph: Graph, number: int, arg: Arg) -> tuple[Arg, ...]:
    """What stands in a container."""
    if isinstance(arg, Seq):
        if arg.form not in SEQ_FORMS or (arg.form == "size" and not all(map(_is_size, arg.items))):
            _refuse(graph, number, f"unknown container {arg.form[:40]!r}, or a size of no sizes")
        return arg.items
    if isinstance(arg, Map):
        if not len(set(arg.keys)) == len(arg.keys) == len(arg.values):
            _refuse(graph, number, "a dict needs different keys, and a value for each")
        if any(len(key) > MAX_TEXT for key in arg.keys):
            _refuse(graph, number, "a key of a dict is too long")
        return arg.values
    if not isinstance(arg, Slice):
        _refuse(graph, number, f"an argument of unknown kind {type(arg).__name__[:40]!r}")
    return (arg.start, arg.stop, arg.step)


def _refuse(graph: Graph, number: int | None, what: str) -> NoReturn:
    if number is None:
        raise GraphError(f"the graph is not well formed: {what}")
    node = graph.nodes[number]
    at = graph.where[node.at] if 0 <= node.at < len(graph.where) else None
    kind = type(node).__name__.lower()
    raise GraphError(f"node {number} ({kind}) is not well formed: {what}", line=at)
