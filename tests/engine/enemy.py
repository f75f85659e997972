"""Two ways in for a stranger's graph, and a model that tells whether it ran.

A graph arrives as the bytes of a submission (binary or JSON), or lies in a graph file that somebody
else wrote. What is put in is data, so it may be anything, well formed or not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

import weft
from tests.engine.bench import limits
from tests.run.graphs import Builder
from tests.run.nets import Block, example
from weft.engine.admit import admit
from weft.engine.opened import Opened, open_submit
from weft.engine.publish import know
from weft.errors import NoSuchError
from weft.graph.frame import Frame
from weft.graph.site import Where
from weft.handles.anything import Model
from weft.kernels.frames import to_frame
from weft.wire.frames import digest, write
from weft.wire.messages import Submit, decode

X = example()


class Table(nn.Module):
    """Gives a weight of another module as it is."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


class Witness(nn.Module):
    """`ran` has an entry for each forward with numbers; fake passes do not count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.table = Table()
        self.head = nn.Linear(8, 5)
        self.words = nn.Embedding(10, 8)
        self.register_buffer("scale", torch.ones(8))
        self.ran: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor and x.device.type != "meta":
            self.ran.append(len(self.ran))
        for block in self.blocks:
            x = block(x) * self.scale
        return self.head(x) + self.table(self.head.weight).mean()


class Raw(Builder):
    """Builds graphs that nobody has checked."""

    def data(self) -> dict[str, Any]:
        """The graph as plain data, to be spoilt."""
        where = [Where("user.py", 100 + n) for n in range(len(self.nodes))]
        nodes = [msgspec.to_builtins(node) for node in self.nodes]
        bounds = [msgspec.to_builtins(bound) for bound in self.bounds]
        return {"nodes": nodes, "where": msgspec.to_builtins(where), "bounds": bounds}

    def frames(self) -> dict[str, Frame]:
        return {key: to_frame(tensor) for key, tensor in self.constants.items()}


class Gate:
    """The two ways in. Each raises where a graph is refused."""

    def __init__(self) -> None:
        self.net = Witness()
        self.known = know(self.net)
        self.model: Model = weft.Model(self.net)
        with self.model.scan(X):
            pass  # knows its sites: that pass calls the forward, on fake tensors
        self.known.signatures.for_call((X,), {})

    def submission(self, graph: Any, frames: dict[str, Frame]) -> dict[str, Any]:
        """A message, as data."""
        digests = {key: digest(frame) for key, frame in frames.items()}
        inside = {digests[key]: frame for key, frame in frames.items()}
        return {
            "protocol": 1,
            "request_id": "enemy",
            "model": "m",
            "fingerprint": self.known.fingerprint,
            "graph": graph,
            "inputs": {"type": "plain", "args": [["ref", 0]]},
            "constants": digests,
            "tensors": write({"in.0": to_frame(X), **inside}),
        }

    def arrive(self, data: bytes, form: str = "msgpack", **changed: Any) -> Opened:
        """What gateway and checker do with the bytes of a submission."""
        submit = decode(data, Submit, form)
        opened = open_submit(submit, _nothing, self.known)
        admit(opened.graph, opened.call, self.known, limits(**changed), submit.strict)
        return opened

    def send(self, graph: Any, frames: dict[str, Frame], form: str, **changed: Any) -> Opened:
        message = self.submission(graph, frames)
        module = msgspec.json if form == "json" else msgspec.msgpack
        return self.arrive(module.encode(message), form, **changed)

    def load(self, path: Path, graph: Any, frames: dict[str, Frame]) -> dict[str, Any]:
        """What a user does with a file."""
        text = graph if isinstance(graph, str) else msgspec.json.encode(graph).decode()
        path.write_bytes(write(frames, {"format": "weft-graph", "graph": text}))
        return weft.Experiment.load(path).run(self.model, X)


def _nothing(name: str) -> Frame:
    raise NoSuchError("there is no such constant")
