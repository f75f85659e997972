"""What a graph costs, before it runs: from its shapes alone, without weights or numbers.

    price(graph, order)        # order(site): when a site fires, from a signature
    print(price(graph, order))

The steps are played through in firing order (`play`). Memory is what the graph itself keeps alive:
its constants and results, the model's tensors that it holds on to, and saves. Not counted: the
model's own memory, memory inside an operation, and copies of values that wait while they are
edited.
"""

from __future__ import annotations

from typing import NamedTuple

from weft.graph.node import Graph
from weft.graph.site import Site

from .play import Order, Play


class Price(NamedTuple):
    """`ends` is the last site that the run needs: there the forward may stop."""

    sites: int
    operations: int
    flops: int
    constant_bytes: int
    saved_bytes: int
    peak_bytes: int
    ends: Site | None

    def rows(self) -> list[tuple[str, str]]:
        """What it says, as (name, text)."""
        return [
            ("sites", f"{self.sites}"),
            ("operations", f"{self.operations}"),
            ("flops", short(self.flops, 1000, "")),
            ("constants", short(self.constant_bytes, 1024, "B")),
            ("saved", short(self.saved_bytes, 1024, "B")),
            ("peak memory", short(self.peak_bytes, 1024, "B")),
            ("ends at", "no site is needed" if self.ends is None else str(self.ends)),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{name:<12} {text}" for name, text in self.rows())


def price(graph: Graph, order: Order) -> Price:
    """The price of a checked graph.

    `order` gives the firing index of a site, as a function or by `(path, port, call)`.
    """
    play = Play(graph)
    play.run(order)
    return price_of(play)


def price_of(play: Play) -> Price:
    """The price that a play came to."""
    return Price(
        sites=len(play.sites),
        operations=play.operations,
        flops=play.flops,
        constant_bytes=play.constants,
        saved_bytes=play.saved,
        peak_bytes=play.memory.peak,
        ends=play.sites[-1] if play.sites else None,
    )


def short(number: float, base: int, unit: str) -> str:
    """`1536` as `1.5 KB`."""
    for prefix in ("", "K", "M", "G", "T"):
        if number < base or prefix == "T":
            break
        number /= base
    digits = f"{number:.0f}" if not prefix else f"{number:.1f}"
    return f"{digits} {prefix}{unit}".strip()
