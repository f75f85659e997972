"""The sites of a generation, step by step, as a checker and a run are told of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weft.families.call import ModelCall
from weft.families.sampling import Sampling
from weft.graph.site import Site
from weft.kernels.aval import Aval, contiguous
from weft.signatures.later import Later
from weft.signatures.signature import Signature

from .generation import Samplings, steps_of
from .known import Known
from .turns import Turns, turns_for


@dataclass(frozen=True)
class Steps:
    """The generations of one job."""

    turns: Turns
    calls: Sequence[ModelCall]
    sampling: Sequence[Sampling]

    @classmethod
    def of(cls, known: Known, calls: Sequence[ModelCall], sampling: Samplings) -> Steps | None:
        """None where the job is no generation."""
        if sampling is None or known.facts is None:
            return None
        return cls(turns_for(known.signatures, known.facts), calls, sampling)

    def signature(self, site: Site) -> Signature:
        """What the sites of a step look like. Raises LookupError for a step that never happens."""
        if site.step >= self.count(site.invoke):
            raise LookupError(f"there is no step {site.step}")
        return self.at(site.invoke, site.step)

    def count(self, invoke: int) -> int:
        """How many steps an invoke has, if it does not end early."""
        return steps_of(self.calls[invoke], self.sampling[invoke])

    def at(self, invoke: int, step: int) -> Signature:
        """What the sites of a step look like, whether it happens or not."""
        return self.turns.at(self.calls[invoke], self.sampling[invoke], step)

    def ids(self, invoke: int) -> Aval:
        """The result, if no row ends early."""
        call = self.calls[invoke]
        return contiguous((call.batch or 1, self.sampling[invoke].longest(call.begun)), torch.int64)

    def told(self) -> Later:
        """What happens to sites later on."""
        return Later(self.signature)
