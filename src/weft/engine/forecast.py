"""Which forwards a block of several invokes will have, told before it runs and without weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from weft.families.call import ModelCall
from weft.families.sampling import Sampling
from weft.graph.node import Graph
from weft.run.estimate import Forward
from weft.run.invokes import forwards
from weft.run.joined import lanes
from weft.run.part import ModuleCall
from weft.run.plan import plan
from weft.run.rows import Lot

from .merging import Merger
from .stepping import Stepping


def sizes(module: nn.Module) -> Callable[[str], int]:
    """Tells how many parameters the module at a path below `module` has."""
    return lambda path: sum([one.numel() for one in module.get_submodule(path).parameters()])


def forecast(
    graph: Graph, calls: Sequence[ModuleCall], merger: Merger | None, module: nn.Module
) -> tuple[Forward, ...]:
    """The forwards of the graph, in order. A model that has had no trial is taken to pass it.

    merger: None where each invoke has a forward of its own.
    """
    untried = None if merger is None else merger.untried()
    found = forwards(plan(graph), calls, untried, module)
    return tuple([_forward(one) for one in found])


class Foreseen(NamedTuple):
    """A generation, where there is no model that could begin it."""

    prompt: ModelCall
    sampling: Sampling


def forecast_steps(
    graph: Graph, decoders: Sequence[Foreseen], sharer: Stepping | None, module: nn.Module
) -> tuple[Forward, ...]:
    """As `forecast`, of generations: which of them share their steps."""
    untried = None if sharer is None else sharer.untried()
    found = lanes(plan(graph), decoders, untried, module)
    return tuple([Forward(invokes, shared, steps=True) for invokes, shared in found])


def _forward(one: list[int] | Lot) -> Forward:
    return Forward(one.invokes, shared=True) if isinstance(one, Lot) else Forward(tuple(one))
