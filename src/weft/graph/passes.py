"""Passes over a graph: graph in, graph out, meaning kept.

`prune` drops what nothing needs: reads that were only handed out, operations without a use, fills
that a later fill replaces. Sound by construction: the effects (`EFFECTS`) stay, and with them all
that they need; an in-place operation stays while anything still reads what it changed, and a result
whose size was read as a number stays, because on another input the size is checked.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from .gradients import has_gradients, partners
from .node import (
    EFFECTS,
    AnyNode,
    Apply,
    Backward,
    Bound,
    Call,
    Fill,
    Grad,
    Graph,
    Guard,
    Log,
    Loop,
    Map,
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
)


def roots(nodes: tuple[AnyNode, ...]) -> dict[Ref, Ref]:
    """For each result that is a view: the result that owns its storage."""
    found: dict[Ref, Ref] = {}
    for number, node in enumerate(nodes):
        if isinstance(node, Call) and node.alias:
            for out, source in enumerate(node.alias):
                if source is not None:
                    found[Ref(number, out)] = found.get(source, source)
    return found


def prune(graph: Graph) -> Graph:
    """The same graph without what nothing needs."""
    live = live_nodes(graph)
    if len(live) == len(graph.nodes):
        return graph
    place = {old: new for new, old in enumerate(sorted(live))}
    nodes = tuple([_moved(graph.nodes[old], place) for old in place])
    bounds = tuple([_bound(bound, place) for bound in graph.bounds])
    return replace(graph, nodes=nodes, bounds=bounds)


def silent(graph: Graph) -> Graph:
    """The same graph without logs: for a run that will be done again."""
    quiet = [_silent(node) for node in graph.nodes]
    place = {old: new for new, old in enumerate([n for n, one in enumerate(quiet) if one])}
    nodes = tuple([_moved(quiet[old], place) for old in place])  # type: ignore[arg-type]
    return replace(graph, nodes=nodes, bounds=tuple([_bound(one, place) for one in graph.bounds]))


def _silent(node: AnyNode) -> AnyNode | None:
    if not isinstance(node, Loop):
        return None if isinstance(node, Log) else node
    kept = [number for number, one in enumerate(node.body) if not isinstance(one, Log)]
    first = len(node.takes) + len(node.along)
    place = {n: n for n in range(first)} | {first + old: first + n for n, old in enumerate(kept)}
    body: Any = tuple([_moved(node.body[old], place) for old in kept])
    return replace(node, body=body, gives=_arg(node.gives, place)) if kept else None


def invokes_of(graph: Graph) -> set[int]:
    """The invokes whose sites a graph names."""
    inside = [one for node in graph.nodes if isinstance(node, Loop) for one in node.body]
    sites = [n.site for n in (*graph.nodes, *inside) if isinstance(n, (Read, Write, Fill, Skip))]
    named = {site.invoke for site in sites}
    followed = [site for n in graph.nodes if isinstance(n, Backward) for site in n.since]
    return named | {site.invoke for site in followed}


def asks_nothing(graph: Graph) -> bool:
    """Whether a run of the graph would have no effect."""
    return not any(isinstance(node, EFFECTS) for node in reversed(graph.nodes))  # a save is late


def live_nodes(graph: Graph) -> set[int]:
    """The ids of the nodes that an effect or a bound needs, effects included."""
    needed = {bound.value.node for bound in graph.bounds}  # their sizes are checked on other inputs
    live = _live(graph.nodes, set(needed))
    if has_gradients(graph.nodes):
        while not (wanted := partners(graph.nodes, live)) <= live:
            needed |= wanted
            live = _live(graph.nodes, set(needed))
    return live


def _live(nodes: tuple[AnyNode, ...], needed: set[int]) -> set[int]:
    owner = roots(nodes)
    replaced = _replaced_fills(nodes)
    live: set[int] = set()
    needed_storage: set[Ref] = set()
    for number in range(len(nodes) - 1, -1, -1):
        node = nodes[number]
        wanted = isinstance(node, EFFECTS) or number in needed
        if isinstance(node, Call) and node.writes and not wanted:
            wanted = any(owner.get(ref, ref) in needed_storage for ref in node.writes)
        if not wanted or number in replaced:
            continue
        live.add(number)
        for ref in inputs_of(node):
            needed.add(ref.node)
            needed_storage.add(owner.get(ref, ref))
    return live


def _replaced_fills(nodes: tuple[AnyNode, ...]) -> set[int]:
    """Fills that a later fill of the same leaf replaces, unseen by any read in between."""
    replaced: set[int] = set()
    last: dict[Any, tuple[int, Ref]] = {}
    for number, node in enumerate(nodes):
        if isinstance(node, (Read, Write)):
            last.pop((node.site, node.leaf), None)
        elif isinstance(node, Fill):
            key = (node.site, node.leaf)
            before = last.get(key)
            if before is not None and before[1] == node.value:
                replaced.add(before[0])
            last[key] = (number, node.value)
    return replaced


def renumbered(item: Any, place: Any) -> Any:
    """A node or bound whose references name other places: by node, or as a function says."""
    return _bound(item, place) if isinstance(item, Bound) else _moved(item, place)


def _bound(bound: Bound, place: dict[int, int]) -> Bound:
    return replace(bound, value=_ref(bound.value, place))


def _ref(ref: Ref, place: Any) -> Any:
    if callable(place):
        return place(ref)
    return Ref(place[ref.node], ref.out)


def _moved(node: AnyNode, place: dict[int, int]) -> AnyNode:
    """`node` with its references renumbered."""
    if isinstance(node, Call):
        return replace(
            node,
            args=_arg(node.args, place),
            kwargs=_arg(node.kwargs, place),
            alias=_arg(node.alias, place),
            writes=_arg(node.writes, place),
        )
    if isinstance(node, Apply):
        return replace(node, args=_arg(node.args, place), kwargs=_arg(node.kwargs, place))
    if isinstance(node, (Write, Fill, Save)):
        return replace(node, value=_arg(node.value, place))
    if isinstance(node, Guard):
        expected = _arg(node.expected, place)
        return replace(node, value=_arg(node.value, place), expected=expected)
    if isinstance(node, Log):
        return replace(node, parts=_arg(node.parts, place), after=_arg(node.after, place))
    if isinstance(node, Skip):
        return replace(node, values=_arg(node.values, place))
    if isinstance(node, Stop):
        return replace(node, condition=_arg(node.condition, place))
    if isinstance(node, Backward):
        losses, seeds = _arg(node.losses, place), _arg(node.seeds, place)
        return replace(node, losses=losses, seeds=seeds)
    if isinstance(node, Grad):
        return replace(node, backward=place[node.backward], of=_ref(node.of, place))
    if isinstance(node, Regrad):
        of, value = _ref(node.of, place), _ref(node.value, place)
        return replace(node, backward=place[node.backward], of=of, value=value)
    if isinstance(node, Loop):
        return replace(node, takes=_arg(node.takes, place), along=_arg(node.along, place))
    return node


def _arg(arg: Any, place: dict[int, int]) -> Any:
    kind = type(arg)
    if kind is Ref:
        return _ref(arg, place)
    if kind is tuple:
        return tuple([_arg(item, place) for item in arg])
    if kind is Seq:
        return Seq(arg.form, _arg(arg.items, place))
    if kind is Map:
        return Map(arg.keys, _arg(arg.values, place))
    if kind is Slice:
        return Slice(*[_arg(item, place) for item in (arg.start, arg.stop, arg.step)])
    if kind is Shape:
        return Shape(_ref(arg.of, place))
    return arg
