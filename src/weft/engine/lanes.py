"""Which jobs may share a forward with strangers, as far as that is known without weights.

    lane_of(known, opened, price)          # Lane("plain", tokens=12, peak=4096), or lane ""

Jobs of one model and one lane may be drawn together; what a lane promises the worker tries out on
its own weights (`merging`, `trial`), and a job that it cannot seat runs by itself after all.
"""

from __future__ import annotations

from typing import NamedTuple

from weft.graph.node import Fill, Graph, Read, Write
from weft.graph.site import is_inside
from weft.run.invokes import MERGED
from weft.wire.messages import PriceInfo

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
    tokens = sum([(call.batch or 1) * (call.length or 1) for call in opened.calls])
    return Lane("plain" if _may(known, opened, price) else "", tokens, price.peak_bytes)


def _may(known: Known, opened: Opened, price: PriceInfo) -> bool:
    if opened.alone or opened.sampling is not None or known.facts is None:
        return False
    calls = [(call.args, call.kwargs) for call in opened.calls]
    return (
        facts_allow(known.facts)
        and all(map(is_plain, calls))
        and _is_mild(opened.graph)
        and price.flops <= SHARE * 2.0 * tree_of(known).size("") * PASS_TOKENS
    )


def _is_mild(graph: Graph) -> bool:
    sites = [node.site for node in graph.nodes if isinstance(node, (Read, Write, Fill))]
    return (
        bool(sites)
        and all(type(node) in MERGED for node in graph.nodes)
        and not any(is_inside(site.port) for site in sites)
    )
