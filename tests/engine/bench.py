"""A model, a call of it, and graphs by hand: what the tests of admitting and drawing share.

bench = Bench(Chain())
bench.price(g)                  # as a checker does
bench.draw(g)["h"]              # as a worker does
bench.local(g)["h"]             # the same graph, run as on the user's machine
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tests.run.graphs import Builder
from tests.run.nets import example
from weft.engine.admit import admit
from weft.engine.draw import Drawn, draw, overwritten_by
from weft.engine.known import Known
from weft.engine.opened import Opened
from weft.engine.publish import know
from weft.families.call import ModelCall
from weft.graph.node import Graph
from weft.kernels.frames import to_frame, to_tensor
from weft.run import run
from weft.settings import Settings
from weft.wire.messages import Limits, PriceInfo
from weft.wire.structures import build


def limits(**changed: Any) -> Limits:
    """The default limits, some of them changed."""
    settings = replace(Settings(), **changed)
    return Limits(**{name: getattr(settings, name) for name in Limits.__struct_fields__})


class Bench:
    """One model and one call."""

    def __init__(self, net: nn.Module, *args: Any, known: Known | None = None) -> None:
        self.net = net
        self.args = args or (example(),)
        self.known = known or know(net)
        self.call = ModelCall(self.args)

    def opened(self, g: Builder) -> Opened:
        frames = {key: to_frame(tensor) for key, tensor in g.constants.items()}
        return Opened(g.graph(), frames, self.call)

    def price(self, g: Builder | Graph, strict: bool = True, **changed: Any) -> PriceInfo:
        graph = g if isinstance(g, Graph) else g.graph()
        return admit(graph, self.call, self.known, limits(**changed), strict)

    def draw(self, g: Builder, strict: bool = True, **changed: Any) -> dict[str, Any]:
        return values_of(self.drawn(g, strict, **changed))

    def drawn(self, g: Builder, strict: bool = True, **changed: Any) -> Drawn:
        options = {name: changed.pop(name) for name in [*changed] if name in _OPTIONS}
        opened = self.opened(g)
        told = overwritten_by(self.known, self.call)
        return draw(
            self.net, opened, overwritten=told, limits=limits(**changed), strict=strict, **options
        )

    def local(self, g: Builder) -> dict[str, Any]:
        told = overwritten_by(self.known, self.call)
        return run(g.graph(), g.constants, self.net, self.args, overwritten=told).saved


_OPTIONS = ("on_log", "on_value", "on_progress", "cancelled")


def values_of(drawn: Drawn) -> dict[str, Any]:
    """What a client makes of a result."""

    def value(ref: Any) -> torch.Tensor:
        return to_tensor(drawn.frames[str(ref.node)])

    return {name: build(arg, value) for name, arg in drawn.manifest.saved}


def state_of(net: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and buffers, copied; those that are not in the state dict too."""
    named = [*net.named_parameters(), *net.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}
