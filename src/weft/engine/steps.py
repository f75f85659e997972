"""The sites of a generation, step by step, as a checker and a run are told of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch

from weft.families.call import ModelCall
from weft.families.sampling import Sampling
from weft.graph.inside import Place, inside_of_graph, own_place, sites_inside
from weft.graph.node import Graph
from weft.graph.site import Site
from weft.kernels.aval import Aval, contiguous
from weft.signatures.later import Later
from weft.signatures.signature import Signature

from .generation import Samplings, steps_of
from .known import Known
from .turns import Forward, Turns, turns_for


@dataclass(frozen=True)
class Steps:
    """The generations of one job. `inside`: the sources whose operations each invoke names."""

    turns: Turns
    calls: Sequence[ModelCall]
    sampling: Sequence[Sampling]
    inside: Mapping[int, Iterable[Place]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        known: Known,
        calls: Sequence[ModelCall],
        sampling: Samplings,
        graph: Graph | None = None,
    ) -> Steps | None:
        """None where the job is no generation."""
        if sampling is None or known.facts is None:
            return None
        inside = inside_of_graph(graph) if graph is not None and graph.sources else {}
        return cls(turns_for(known.signatures, known.facts), calls, sampling, inside)

    def signature(self, site: Site) -> Signature:
        """What the sites of a step look like. Raises LookupError for a step that never happens."""
        return self._of(site, own_place(site))

    def whole(self, site: Site) -> Signature:
        """The same, with all operations that are named."""
        return self._of(site, self.inside.get(site.invoke, ()))

    def learn(self, graph: Graph, look: Callable[[], None]) -> None:
        """Learns what the operations look like that a graph names; `look` is called in between."""
        for site, _ in sites_inside(graph) if self.inside else ():
            look()
            with suppress(LookupError):  # there is no such step: for others to say
                self.signature(site)

    def forward(self, site: Site) -> Forward:
        """The forward in which a site fires."""
        return self.forward_at(site.invoke, site.step)

    def forward_at(self, invoke: int, step: int) -> Forward:
        """The forward of a step."""
        return Forward(self.turns, self.calls[invoke], self.sampling[invoke], step)

    def _of(self, site: Site, inside: Iterable[Place]) -> Signature:
        if site.step >= self.count(site.invoke):
            raise LookupError(f"there is no step {site.step}")
        return self.at(site.invoke, site.step, inside)

    def count(self, invoke: int) -> int:
        """How many steps an invoke has, if it does not end early."""
        return steps_of(self.calls[invoke], self.sampling[invoke])

    def at(
        self, invoke: int, step: int, inside: Iterable[Place] = (), cached: bool = False
    ) -> Signature:
        """What the sites of a step look like, whether it happens or not; `cached`: with a cache,
        whether there is one or not."""
        how = self.sampling[invoke]
        how = replace(how, use_cache=True) if cached else how
        return self.turns.at(self.calls[invoke], how, step, inside)

    def ids(self, invoke: int) -> Aval:
        """The result, if no row ends early."""
        call = self.calls[invoke]
        return contiguous((call.batch or 1, self.sampling[invoke].longest(call.begun)), torch.int64)

    def told(self) -> Later:
        """What happens to sites later on."""
        return Later(self.signature, self.whole)
