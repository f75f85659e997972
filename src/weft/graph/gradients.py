"""Gradients in a graph: their grammar, and which nodes come with which.

A `Backward` differentiates its losses. A `Grad` that names it is the gradient with respect to one
value, a `Regrad` puts another gradient in its place, from which on the gradients flow that lie
behind. All three only look back: a gradient is of a value made before its backward, and stands
after it.

    %2 = ... ; %3 = Backward(losses=(Ref(2),)) ; %4 = Grad(backward=3, of=Ref(0))
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from .node import (
    AnyNode,
    Backward,
    Call,
    Fill,
    Grad,
    Graph,
    Param,
    Read,
    Ref,
    Regrad,
    Skip,
    Write,
    inputs_of,
    outs_of,
)

MAX_BACKWARDS = 4096
MAX_LOSSES = 1024
MAX_SINCE = 4096


def has_gradients(nodes: Iterable[AnyNode]) -> bool:
    """Whether there is any backward."""
    return any(type(node) is Backward for node in nodes)


def partners(nodes: tuple[AnyNode, ...], live: Collection[int]) -> set[int]:
    """The nodes without which gradients among the `live` ones would mean something else.

    A gradient needs its backward, and a backward the replacements of what flows through it.
    """
    found = {
        node.backward
        for number, node in enumerate(nodes)
        if isinstance(node, (Grad, Regrad)) and number in live
    }
    found.update(
        number
        for number, node in enumerate(nodes)
        if isinstance(node, Regrad) and (node.backward in live or node.backward in found)
    )
    return found


# -- grammar -------------------------------------------------------------------------------------


def odd(graph: Graph, number: int, node: Backward | Grad | Regrad) -> str | None:
    """What is wrong with a node, if anything is."""
    if isinstance(node, Backward):
        return _odd_backward(node)
    if not 0 <= node.backward < number or not isinstance(graph.nodes[node.backward], Backward):
        return f"there is no backward at node {node.backward}, before it"
    if node.of.node >= node.backward:
        return "a gradient is of a value that is made before the backward"
    return None


def _odd_backward(node: Backward) -> str | None:
    if not 0 < len(node.losses) <= MAX_LOSSES:
        return f"it has {len(node.losses)} losses; 1 to {MAX_LOSSES} there may be"
    if len(node.seeds) not in (0, len(node.losses)):
        return "there is a gradient for each of the losses, or for none"
    if len(node.since) > MAX_SINCE:
        return f"more than {MAX_SINCE} sites are followed"
    return None


def odd_one(graph: Graph, roots: dict[Ref, Ref]) -> tuple[int, str] | None:
    """A node that breaks a rule about several nodes, and what it breaks."""
    nodes = graph.nodes
    backwards = [number for number, node in enumerate(nodes) if type(node) is Backward]
    if len(backwards) > MAX_BACKWARDS:
        return backwards[-1], f"{len(backwards)} backwards are more than {MAX_BACKWARDS}"
    bit = {number: place for place, number in enumerate(backwards)}
    reached = reaching(nodes, roots) if backwards else []
    for number, node in enumerate(nodes):
        if not isinstance(node, (Grad, Regrad)) or type(nodes[node.of.node]) in _IN_THE_MODEL:
            continue
        if not reached[node.of.node] >> bit[node.backward] & 1:
            return number, "the losses do not depend on the value whose gradient it is"
    return None


_IN_THE_MODEL = (Read, Param)


def reaching(nodes: tuple[AnyNode, ...], roots: dict[Ref, Ref]) -> list[int]:
    """Of each node: which backwards' losses may depend on it, a bit for each backward.

    What is written to a site may matter to every loss: only the model knows.
    """
    bits = [0] * len(nodes)
    stored: dict[Ref, int] = {}  # by the owner of a storage: who depends on what is in it
    left = count = sum([type(node) is Backward for node in nodes])
    for number in range(len(nodes) - 1, -1, -1):
        node = nodes[number]
        if type(node) is Backward:
            left -= 1
            bits[number] |= 1 << left
        elif isinstance(node, (Write, Fill, Skip)):
            bits[number] = (1 << count) - 1
        elif isinstance(node, Call):
            for ref in node.writes:
                bits[number] |= stored.get(roots.get(ref, ref), 0)
        elif isinstance(node, Grad):
            bits[node.backward] |= bits[number]
        elif isinstance(node, Regrad):
            bits[number] = (1 << count) - 1
        if bits[number]:
            _hand_on(node, bits, bits[number], stored, roots)
    return bits


def _hand_on(
    node: AnyNode, bits: list[int], own: int, stored: dict[Ref, int], roots: dict[Ref, Ref]
) -> None:
    for ref in inputs_of(node) if not isinstance(node, Regrad) else (node.value,):
        bits[ref.node] |= own
        owner = roots.get(ref, ref)
        stored[owner] = stored.get(owner, 0) | own


def invokes_behind(
    nodes: tuple[AnyNode, ...], losses: Iterable[Ref], roots: dict[Ref, Ref]
) -> set[int]:
    """The invokes on whose forwards these values may depend: what they are made of, and what was
    put into the forwards that it comes from."""
    made: dict[Ref, list[Ref]] = {}  # by the owner of a storage: of what all that is in it is made
    put: dict[int, list[Ref]] = {}
    for number, node in enumerate(nodes):
        sources = inputs_of(node)
        if isinstance(node, (Write, Fill, Skip)):
            put.setdefault(node.site.invoke, []).extend(sources)
        elif isinstance(node, Grad):
            made[Ref(number)] = list(inputs_of(nodes[node.backward]))
        else:
            results = [Ref(number, out) for out in range(outs_of(node))]
            written = node.writes if isinstance(node, Call) else ()
            for ref in (*results, *written):
                made.setdefault(roots.get(ref, ref), []).extend(sources)
    found: set[int] = set()
    seen: set[Ref] = set()
    waiting = list(losses)
    while waiting:
        ref = waiting.pop()
        owner = roots.get(ref, ref)
        if owner in seen:
            continue
        seen.add(owner)
        waiting += made.get(owner, ())
        node = nodes[owner.node]
        if isinstance(node, Read) and node.site.invoke not in found:
            found.add(node.site.invoke)
            waiting += put.get(node.site.invoke, ())
    return found
