"""`Backend`: whoever can draw a graph through a model.

One method. A recorder and a tracer know nothing else of where a graph runs; `weft.testing` has a
fake that records what it was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from weft.graph.node import Graph
from weft.graph.site import Leaf, Site


@dataclass(frozen=True)
class Request:
    """A graph, its constants, and the call of the model to draw it through.

    `strict` asks that every site has exactly the recorded shape (the graph runs on the input that
    it was recorded on). `overwritten` tells which tensors the model changes in place later on.
    `look` says that it is for a number which the recording needs. `further` are the calls of
    the invokes after the first; with `alone` each has a forward pass of its own. `merger` is asked
    which of them may share one (`run.rows.Merger`), where the module is in this process. With
    `grad`, there too, what is saved stays connected to weights and constants.

    In a generation `sampling` says how, of each invoke (`families.sampling.Sampling`), and
    `decoders(module)` gives a `run.generate.Decoder` for each, where the module is in this process.
    `sharer` is asked which of them may share forwards (`run.joined.Sharer`).

    `listen(number, stream, value)` is told what the graph streams, as it comes to be.

    In a session on a server `keeps` are the saves that stay there, and `uses` are values of it that
    stand for constants (each with a `number` and a `name`).
    """

    graph: Graph
    constants: Mapping[str, torch.Tensor]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = True
    device: torch.device | None = None
    overwritten: Callable[[Site, Leaf], bool] | None = None
    look: bool = False
    further: tuple[tuple[tuple[Any, ...], Mapping[str, Any]], ...] = ()
    alone: bool = False
    grad: bool = False
    merger: Any = None
    sampling: Any = None
    decoders: Callable[[torch.nn.Module], Sequence[Any]] | None = None
    sharer: Any = None
    listen: Callable[[int, int, tuple[Any, ...]], None] | None = None
    uses: Mapping[str, Any] = field(default_factory=dict)
    keeps: frozenset[str] = frozenset()

    @property
    def calls(self) -> tuple[tuple[tuple[Any, ...], Mapping[str, Any]], ...]:
        """The call of each invoke."""
        return ((self.args, self.kwargs), *self.further)


@dataclass(frozen=True)
class Reply:
    """What was saved, by name, and the site at which the pass could stop (None: it ran through).

    From a server also: seconds by stage (`price`, `queue`, `run`, `round trip`), bytes `up` and
    `down`, and the id of the job; in a session the number that the request has there.
    """

    saved: dict[str, Any]
    ended: Site | None = None
    stages: Mapping[str, float] = field(default_factory=dict)
    up: int = 0
    down: int = 0
    job: str | None = None
    number: int | None = None


class Backend(Protocol):
    """Runs requests, one after another or side by side; safe to call from several threads."""

    def run(self, request: Request) -> Reply:
        """Draws the graph through the model. Raises what the graph or the model raised."""
        ...
