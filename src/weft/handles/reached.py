"""What an experiment that was run again brings back: what its block would show as `tracer.results`.

A list that grew after it was saved stands in a graph as two saves, `name` and `name+`; here it is
one. Lists go without what was not reached: steps that did not happen, what a stop has left out. Of
a dict or tuple the graph does not say where in it lists have grown: that stays under `name+`.
"""

from __future__ import annotations

from typing import Any

from weft.graph.node import Arg, Graph, Map, Ref, Save, Seq


def reached(graph: Graph, saved: dict[str, Any]) -> dict[str, Any]:
    """What was saved, by name, without what was not reached."""
    args = {node.name: node.value for node in graph.nodes if isinstance(node, Save)}
    found: dict[str, Any] = {}
    for name, value in saved.items():
        if name[0] == "<" or _is_missed(args[name], value):
            continue
        kept, before = _kept(args[name], value), found.get(name.removesuffix("+"))
        if name[-1] == "+" and isinstance(before, list):
            before += kept  # what a list has gained since it was saved
        else:
            found[name] = kept
    return found


def _is_missed(arg: Arg, value: Any) -> bool:
    return isinstance(arg, Ref) and value is None


def _kept(arg: Arg, value: Any) -> Any:
    if isinstance(arg, Seq) and arg.form != "size":
        pairs = zip(arg.items, value, strict=True)
        items = [_kept(a, v) for a, v in pairs if arg.form != "list" or not _is_missed(a, v)]
        return items if arg.form == "list" else tuple(items)
    if isinstance(arg, Map):
        pairs = zip(arg.keys, arg.values, value.values(), strict=True)
        return {key: _kept(a, v) for key, a, v in pairs}
    return value
