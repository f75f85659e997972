"""From the gradients of a block to nodes in an order in which everything looks back.

Until here a gradient names its backward by number, because it may be asked for first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from msgspec.structs import replace

from weft.errors import GradientError
from weft.graph.node import AnyNode, Bound, Const, Grad, Graph, Read, Regrad
from weft.graph.passes import live_nodes, renumbered
from weft.graph.site import Site, is_inside
from weft.signatures.starts import starts_of

from .flows import Pass
from .lines import where
from .reorder import CircleError, is_ordered, ordered
from .sources import known_inside

if TYPE_CHECKING:
    from .grads import Gradients

Nodes = tuple[AnyNode, ...]
Bounds = tuple[Bound, ...]

_NOTHING = Const(key="-", shape=(), dtype="float32")
"""Stands for a gradient that does not exist and that nothing uses."""


def finished(grads: Gradients, nodes: Nodes, bounds: Bounds) -> tuple[Nodes, Bounds]:
    """Nodes in which gradients name their backward, in an order in which all look back."""
    _refuse_pending(grads, nodes, bounds)
    found = [_resolved(grads, node) for node in nodes]
    for run in grads.passes:
        if run.node is not None:
            found[run.node] = replace(found[run.node], since=_since(grads, run))  # type: ignore[arg-type]
    if is_ordered(found):
        return tuple(found), bounds
    try:
        order = ordered(found, grads.nodes)
    except CircleError as circle:
        raise _circle(grads, found[circle.node]) from None
    place = {old: new for new, old in enumerate(order)}
    moved = tuple([renumbered(found[old], place) for old in order])
    return moved, tuple([renumbered(bound, place) for bound in bounds])


def _resolved(grads: Gradients, node: AnyNode) -> AnyNode:
    if not isinstance(node, (Grad, Regrad)):
        return node
    number = grads.passes[node.backward].node
    if number is None:
        return _NOTHING
    return replace(node, backward=number)


def _refuse_pending(grads: Gradients, nodes: Nodes, bounds: Bounds) -> None:
    """A gradient that is used needs a backward."""
    pending = grads.upcoming
    if pending is None:
        return
    mine = [
        number
        for number, node in enumerate(nodes)
        if isinstance(node, (Grad, Regrad)) and node.backward == pending.number
    ]
    cut = tuple([_NOTHING if number in mine else node for number, node in enumerate(nodes)])
    live = live_nodes(Graph(cut, bounds=bounds)) if grads.recorder.open else mine
    for number in mine:
        if number in live:
            raise GradientError(
                "no backward in this block gives this gradient",
                line=where(grads.recorder.line_of(nodes[number].at)),
                fix="call loss.backward() in the block",
            )


def _since(grads: Gradients, run: Pass) -> tuple[Site, ...]:
    """From which sites on the run must follow the model, for gradients at sites."""
    found: dict[Site, None] = {}
    for flow in run.flows.values():
        node = grads.recorder.nodes[flow.of.node]
        if isinstance(node, Read):
            found.update(dict.fromkeys(_starts(grads, node)))
    return tuple(found)


def _starts(grads: Gradients, node: Read) -> Iterator[Site]:
    recorder, site = grads.recorder, node.site
    invokes = recorder.invokes
    signature = recorder.signature if invokes is None else invokes.signatures[site.invoke]
    starts, own = starts_of(signature, site)
    for index in starts.before(own, node.leaf):
        row = starts.rows[index]
        if is_inside(row.port):
            known_inside(recorder, signature, site.invoke, row.path, row.port)
        yield Site(row.path, row.port, row.call, invoke=site.invoke)


def _circle(grads: Gradients, node: AnyNode) -> GradientError:
    return GradientError(
        "a loss depends on its own gradient",
        line=where(grads.recorder.line_of(node.at)),
        fix="read .grad after loss.backward(), and use it for what comes after the loss",
    )
