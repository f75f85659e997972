"""What a recorded block will cost: see `Tracer.plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from weft.engine.forecast import forecast, sizes
from weft.families.call import ModelCall
from weft.graph.node import Graph
from weft.graph.passes import prune
from weft.run.estimate import Estimate, estimate
from weft.signatures.signature import Signature

from .block import firing_index

if TYPE_CHECKING:
    from .handle import Handle


def estimated(
    handle: Handle,
    graph: Graph,
    calls: Sequence[ModelCall],
    signatures: Sequence[Signature],
    alone: bool,
) -> Estimate:
    """The estimate of a block's graph; `alone` as in `trace`. No weights are loaded for it."""
    graph = prune(graph)
    merger = None if alone or len(calls) < 2 else handle._merger()
    module = handle._weights.skeleton()
    passes = forecast(graph, [(call.args, call.kwargs) for call in calls], merger, module)
    return estimate(graph, firing_index(signatures), passes, sizes(module))
