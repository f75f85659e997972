"""Which jobs may share a forward with strangers, as far as that is known without weights.

    lane_of(known, opened, price)          # Lane("plain", tokens=12, peak=4096), or lane ""

Jobs of one model and one lane may be drawn together: in the lane `plain` through one forward, in
`steps` through one decode loop; what a lane promises the worker tries out on
its own weights (`merging`, `trial`), and a job that it cannot seat runs by itself after all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from weft.families.call import ModelCall
from weft.families.decodings import is_plain as is_plain_generation
from weft.families.sampling import Sampling
from weft.graph.node import AnyNode, Fill, Graph, Loop, Read, Write
from weft.graph.site import is_inside
from weft.run.invokes import MERGED
from weft.run.joined import KINDS
from weft.wire.messages import PriceInfo

from .generation import steps_of
from .known import Known
from .merging import facts_allow, is_plain
from .opened import Opened
from .places import tree_of

PASS_TOKENS = 4096
"""Tokens of a forward that is as good as full."""
SHARE = 0.1
"""A graph may cost so much of such a forward, so that nobody waits for a stranger's operations."""


class Lane(NamedTuple):
    """The lane of a job, "" for one that runs by itself; tokens of its inputs; bytes it needs."""

    lane: str
    tokens: int
    peak: int


def lane_of(known: Known, opened: Opened, price: PriceInfo) -> Lane:
    """The lane of an admitted job."""
    if opened.sampling is None:
        tokens = sum([(call.batch or 1) * (call.length or 1) for call in opened.calls])
        lane = "plain" if _may_share(known, opened, price) else ""
    else:
        tokens = sum([(call.batch or 1) * _longest(call, how) for call, how in _each(opened)])
        lane = "steps" if _may_step(known, opened, price) else ""
    return Lane(lane, tokens, price.peak_bytes)


def _each(opened: Opened) -> Iterator[tuple[ModelCall, Sampling]]:
    return zip(opened.calls, opened.sampling or (), strict=True)


def _longest(call: ModelCall, how: Sampling) -> int:
    return (call.length or 0) + steps_of(call, how)


def _may_share(known: Known, opened: Opened, price: PriceInfo) -> bool:
    calls = [(call.args, call.kwargs) for call in opened.calls]
    return (
        _may(known, opened, price, 1)
        and all(map(is_plain, calls))
        and _is_mild(opened.graph, MERGED)
    )


def _may_step(known: Known, opened: Opened, price: PriceInfo) -> bool:
    steps = max([steps_of(call, how) for call, how in _each(opened)])
    return (
        _may(known, opened, price, steps)
        and all(is_plain_generation(call, how) for call, how in _each(opened))
        and _is_mild(opened.graph, KINDS)
    )


def _may(known: Known, opened: Opened, price: PriceInfo, passes: int) -> bool:
    """What is asked of both."""
    if opened.alone or known.facts is None or not facts_allow(known.facts, known.skeleton):
        return False
    return price.flops <= SHARE * 2.0 * tree_of(known).size("") * PASS_TOKENS * passes


def _is_mild(graph: Graph, kinds: Collection[type]) -> bool:
    nodes = list(_every(graph.nodes))
    sites = [node.site for node in nodes if isinstance(node, (Read, Write, Fill))]
    return (
        bool(sites)
        and all(type(node) in kinds for node in nodes)
        and not any(is_inside(site.port) for site in sites)
    )


def _every(nodes: Iterable[AnyNode]) -> Iterator[AnyNode]:
    """The nodes, those of loops' bodies among them."""
    for node in nodes:
        if isinstance(node, Loop):
            yield from node.body
        else:
            yield node
