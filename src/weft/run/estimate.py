"""`Estimate`: what a graph will cost, in all, line by line and site by site; also as a page.

    found = estimate(graph, order)     # order(site): when a site fires, from a signature
    print(found)                       # tables of text; in a notebook a table of HTML
    found.lines[0].flops, found.visits[-1].site

Counted as `price` counts, on shapes alone: `tables` says it to people.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from weft.graph.node import (
    Apply,
    Backward,
    Fill,
    Grad,
    Graph,
    Guard,
    Log,
    Param,
    Read,
    Regrad,
    Save,
    Skip,
    Stop,
    Write,
)
from weft.graph.show import site_text
from weft.graph.site import Site, Where
from weft.kernels.aval import Aval, dtype_name
from weft.kernels.cost import module_flops

from .play import Order, Play
from .price import Price, price_of
from .steps import Step, line_of
from .tables import page, text


@dataclass(frozen=True)
class Line:
    """What one of the user's lines costs, and does.

    `made` are the bytes of the tensors that it makes, `saved` of those that it brings back.
    """

    where: Where | None
    operations: int
    flops: int
    made: int
    saved: int
    does: tuple[str, ...]


@dataclass(frozen=True)
class Visit:
    """What happens at one site: the tensors that are used there, their bytes, and how."""

    site: Site
    types: tuple[str, ...]
    bytes: int
    does: tuple[str, ...]


@dataclass(frozen=True)
class Forward:
    """The invokes of one forward pass, or of a generation's. Where it is not `shared`, each of
    several has a pass of its own, and they take turns. `steps`: they are generations."""

    invokes: tuple[int, ...]
    shared: bool = False
    steps: bool = False


@dataclass(frozen=True)
class Estimate:
    """See the module's text. The first seven are those of `price.Price`; `lines` stand in the order
    of the block, `visits` in that in which the sites fire, `forwards` in that in which they run."""

    sites: int
    operations: int
    flops: int
    constant_bytes: int
    saved_bytes: int
    peak_bytes: int
    ends: Site | None
    lines: tuple[Line, ...]
    visits: tuple[Visit, ...]
    forwards: tuple[Forward, ...]

    @property
    def price(self) -> Price:
        """The sums alone."""
        return Price(*[getattr(self, name) for name in Price._fields])

    def __str__(self) -> str:
        return text(self)

    def _repr_html_(self) -> str:
        return page(self)


def estimate(
    graph: Graph,
    order: Order,
    forwards: Sequence[Forward] = (),
    size: Callable[[str], int] = lambda path: 0,
) -> Estimate:
    """The estimate of a checked graph; `order` as in `price`.

    size: how many parameters the module at a path has. `forwards` is only passed on.
    """
    play = _Itemised(graph, size)
    play.run(order)
    lines = tuple([play.lines[at].line() for at in sorted(play.lines)])
    visits = tuple([play.visit(site) for site in play.sites])
    return Estimate(*price_of(play), lines, visits, tuple(forwards))


@dataclass
class _Tally:
    """A `Line` that is being counted."""

    where: Where | None
    operations: int = 0
    flops: int = 0
    made: int = 0
    saved: int = 0
    sites: dict[str, str] = field(default_factory=dict)
    else_: dict[str, None] = field(default_factory=dict)

    def line(self) -> Line:
        does = (*_grouped(self.sites), *self.else_)
        return Line(self.where, self.operations, self.flops, self.made, self.saved, does)


class _Itemised(Play):
    """A play that keeps its figures by line."""

    def __init__(self, graph: Graph, size: Callable[[str], int]) -> None:
        super().__init__(graph)
        self._parameters = size
        self.lines: dict[int, _Tally] = {}
        self._types: dict[Site, dict[Any, tuple[str, int]]] = {}

    def step(self, step: Step) -> None:
        node = step.node
        operations, flops, saved = self.operations, self.flops, self.saved
        super().step(step)
        tally = self.lines.get(node.at)
        if tally is None:
            tally = self.lines[node.at] = _Tally(line_of(self.graph, node))
        tally.operations += self.operations - operations
        tally.flops += self.flops - flops
        tally.saved += self.saved - saved
        if step.kind not in (Read, Param):
            tally.made += sum(
                [self._size(slot) for slot in range(step.slot, step.slot + step.outs)]
            )
        self._note(step, tally)

    def applied(self, step: Step) -> list[Aval]:
        args, kwargs = self.arguments(step)
        self.flops += module_flops(self._parameters(step.node.path), args, kwargs)
        return super().applied(step)

    def _size(self, slot: int) -> int:
        """Bytes of a result with a storage of its own."""
        aval = self.env.get(slot)
        return aval.nbytes if aval is not None and self.plan.family[slot] == slot else 0

    def _note(self, step: Step, tally: _Tally) -> None:
        """Says what a step does."""
        node = step.node
        if step.kind in _AT_SITES:
            verb = _AT_SITES[step.kind]
            if step.kind is not Read or site_text(node) not in tally.sites:
                tally.sites[site_text(node)] = verb
            self._meet(node, self.env[step.slot if step.kind is Read else step.uses[0]])
        elif step.kind is Skip:
            tally.sites[str(node.site).replace(".output", "", 1)] = "skips"
        elif step.kind in _SAYS:
            tally.else_[_SAYS[step.kind](node)] = None

    def _meet(self, node: Read | Write | Fill, aval: Aval) -> None:
        shown = f"{dtype_name(aval.dtype)}{list(aval.shape)}"
        self._types.setdefault(node.site, {}).setdefault(node.leaf, (shown, aval.nbytes))

    def visit(self, site: Site) -> Visit:
        """What happens at a site."""
        there = self.plan.sites[site]
        kinds = [self.plan.steps[index].kind for index in there.steps]  # type: ignore[union-attr]
        does = dict.fromkeys([_HAPPENS[kind] for kind in kinds if kind in _HAPPENS])
        if len(does) > 1:
            does.pop("read", None)
        if there.follow:
            does["followed for gradients"] = None
        types = self._types.get(site, {}).values()
        return Visit(site, tuple([t for t, _ in types]), sum([n for _, n in types]), tuple(does))


_AT_SITES = {Read: "reads", Write: "replaces", Fill: "edits"}
_HAPPENS = {Read: "read", Write: "replaced", Fill: "edited in place", Skip: "skipped"}
_SAYS: dict[type, Any] = {
    Apply: lambda node: f"applies {node.path}",
    Param: lambda node: f"uses {node.path}",
    Save: lambda node: f"saves {node.name!r}",
    Log: lambda node: "logs" if node.stream is None else "streams",
    Guard: lambda node: "looks",
    Stop: lambda node: "stops the pass",
    Backward: lambda node: "goes backward",
    Grad: lambda node: "takes a gradient",
    Regrad: lambda node: "replaces a gradient",
}
_FEW = 2


def _grouped(sites: dict[str, str]) -> list[str]:
    """`reads a.output, b.output`; of many the first, the last, and how many there are."""
    found: list[str] = []
    for verb in ("reads", "edits", "replaces", "skips"):
        named = [site for site, done in sites.items() if done == verb]
        if len(named) > _FEW:
            found.append(f"{verb} {len(named)} sites: {named[0]} ... {named[-1]}")
        elif named:
            found.append(f"{verb} {', '.join(named)}")
    return found
