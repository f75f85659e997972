"""Graphs as text for people.

%0 = read transformer.h.5.output                     float32[1, 9, 768]   # demo.py:7
%1 = Tensor.mul(%0, 2.0)                                                   # demo.py:7
     write transformer.h.5.output = %1                                     # demo.py:7
"""

from __future__ import annotations

from msgspec.structs import replace

from .loops import unrolled
from .node import (
    AnyNode,
    Apply,
    Arg,
    Backward,
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
    outs_of,
)
from .site import Site, Where, leaf_text, split_port


def show(graph: Graph) -> str:
    """The whole graph, a line per node with the user's line beside it."""
    rows = [row for i, node in enumerate(graph.nodes) for row in _rows(graph, i, node)]
    width = min(max((len(left) for left, _, _ in rows), default=0), 72)
    sizes = max((len(size) for _, size, _ in rows), default=0)
    lines = [f"{a:<{width}}  {b:<{sizes}}  {c}".rstrip() for a, b, c in rows]
    bounds = [f"bound: {_arg(b.value)}.shape[{b.dim}] was read as {b.size}" for b in graph.bounds]
    head = [] if graph.root is None else [f"a call of {graph.root}"]
    return "\n".join(head + lines + bounds)


def sites(graph: Graph) -> list[Site]:
    """The sites a graph reads or changes, in the order of its lines, each once."""
    nodes = unrolled(graph).nodes
    touched = [node.site for node in nodes if isinstance(node, (Read, Write, Fill, Skip))]
    return list(dict.fromkeys(touched))


def _rows(graph: Graph, number: int, node: AnyNode) -> list[tuple[str, str, str]]:
    """The line of a node; those of a loop's body stand below it, with numbers of their own."""
    rows = [(_left(number, node), _sizes(node), _where(graph, node))]
    if isinstance(node, Loop):
        first = len(node.takes) + len(node.along)
        for inside, one in enumerate(node.body, first):
            rows.append((f"  {_left(inside, one)}", _sizes(one), _where(graph, one)))
    return rows


def _left(number: int, node: AnyNode) -> str:
    named = outs_of(node) or isinstance(node, Backward)
    name = f"%{number} = " if named else "     "
    return name + _body(node)


def _body(node: AnyNode) -> str:
    match node:
        case Read():
            return f"read {site_text(node)}"
        case Write():
            return f"write {site_text(node)} = {_arg(node.value)}"
        case Fill():
            return f"fill {site_text(node)} with {_arg(node.value)}"
        case Call():
            seed = "" if node.seed is None else f", seed {node.seed}"
            draw = "" if node.draw is None else f"  (draw {node.draw}{seed})"
            return f"{node.op}({_args(node.args, node.kwargs)}){draw}"
        case Apply():
            return f"apply {node.path}({_args(node.args, node.kwargs)})"
        case Param():
            return f"param {node.path}"
        case Const():
            return f"const {node.key}"
        case Guard():
            what = "shape of " if node.look == "shape" else ""
            return f"guard {what}{_arg(node.value)} is {_arg(node.expected)}"
        case Save():
            return f"save {node.name!r} = {_arg(node.value)}"
        case Log():
            what = "log" if node.stream is None else f"stream {node.stream}:"
            after = "" if node.after is None else f" after {_arg(node.after)}"
            return f"{what} {_args(node.parts, ())}{after}"
        case Skip():
            return _skip(node)
        case Stop():
            when = "" if node.condition is None else f" if {_arg(node.condition)}"
            return f"stop{when}" if node.invoke is None else f"stop invoke {node.invoke}{when}"
        case Backward():
            seeds = f" with {', '.join(map(_arg, node.seeds))}" if any(node.seeds) else ""
            return f"backward of {', '.join(map(_arg, node.losses))}{seeds}"
        case Grad():
            return f"grad of %{node.backward} at {_arg(node.of)}"
        case Loop():
            return _loop(node)
        case Regrad():
            return f"grad of %{node.backward} at {_arg(node.of)} = {_arg(node.value)}"


def _loop(node: Loop) -> str:
    by = f" by {node.by}" if node.by != 1 else ""
    text = f"loop over steps {node.start} to {node.steps[-1]}{by}"
    given = [f"%{n} is {_arg(ref)}" for n, ref in enumerate(node.takes)]
    given += [
        f"%{n} is {_arg(ref)} of the same step" for n, ref in enumerate(node.along, len(node.takes))
    ]
    gives = f", gives {', '.join(map(_arg, node.gives))}" if node.gives else ""
    return f"{text}{' where ' if given else ''}{', '.join(given)}{gives}:"


def _skip(node: Skip) -> str:
    pairs = zip(node.leaves, node.values, strict=True)
    given = [f"{leaf_text(leaf)}{': ' if leaf else ''}{_arg(value)}" for leaf, value in pairs]
    site = str(node.site).replace(".output", "", 1)
    return f"skip {site} = {', '.join(given) or 'nothing'}"


def site_text(node: Read | Write | Fill) -> str:
    """The site and leaf of a node; the first positional or a keyword input by its own name."""
    inside, last = split_port(node.site.port)
    if last == "inputs" and len(node.leaf) == 2:
        part, key = node.leaf
        site = str(replace(node.site, port=f"{inside}input"))
        return site if (part, key) == (0, 0) else f"{site}[{key!r}]"
    return f"{node.site}{leaf_text(node.leaf)}"


def _sizes(node: AnyNode) -> str:
    if isinstance(node, (Read, Const)):
        return f"{node.dtype}{list(node.shape)}"
    return ""


def _where(graph: Graph, node: AnyNode) -> str:
    if node.at >= len(graph.where):
        return ""
    at: Where = graph.where[node.at]
    return f"# {at.file.replace(chr(92), '/').rsplit('/', 1)[-1]}:{at.line}"


def _args(args: tuple[Arg, ...], kwargs: tuple[tuple[str, Arg], ...]) -> str:
    return ", ".join([_arg(arg) for arg in args] + [f"{key}={_arg(v)}" for key, v in kwargs])


def _arg(arg: Arg) -> str:
    match arg:
        case Ref():
            return f"%{arg.node}" + (f".{arg.out}" if arg.out else "")
        case Seq(form="list"):
            return f"[{', '.join(map(_arg, arg.items))}]"
        case Seq():
            inside = ", ".join(map(_arg, arg.items))
            return f"({inside},)" if len(arg.items) == 1 else f"({inside})"
        case Map():
            pairs = zip(arg.keys, arg.values, strict=True)
            return "{" + ", ".join(f"{key}: {_arg(value)}" for key, value in pairs) + "}"
        case Slice():
            parts = ["" if p is None else _arg(p) for p in (arg.start, arg.stop, arg.step)]
            return ":".join(parts if parts[2] else parts[:2])
        case Name(form="ellipsis"):
            return "..."
        case Name():
            return arg.name
        case Complex():
            return str(complex(arg.real, arg.imag))
        case Shape():
            return f"{_arg(arg.of)}.shape"
    return repr(arg)
