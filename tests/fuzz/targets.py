"""Small models to draw graphs through, with a stranger's way in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from typing import Any

import msgspec
import torch
from torch import nn

from tests.engine.bench import limits
from tests.engine.enemy import Table
from tests.run.nets import Block, example
from weft.engine.admit import admit
from weft.engine.draw import Drawn, draw, overwritten_by
from weft.engine.kept import Kept
from weft.engine.opened import Opened, open_submit
from weft.engine.publish import know
from weft.errors import NoSuchError
from weft.families.loading import Source, load
from weft.graph.frame import Frame
from weft.graph.node import Graph
from weft.kernels.frames import to_frame
from weft.testing import tiny_path
from weft.wire.frames import digest, write
from weft.wire.messages import Submit, decode

LIMITS = {"memory_bytes": 50_000_000, "flops": 10**9, "result_bytes": 20_000_000, "nodes": 500}


class Counting(nn.Module):
    """What is easily spoilt: statistics, a weight with two names, one that is read at a site, and a
    buffer that forwards change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.words.weight
        self.table = Table()
        self.register_buffer("scale", torch.ones(8))
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for block in self.blocks:
            x = block(x) * self.scale
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x) + self.table(self.head.weight).mean()


class Target:
    """A model, and what to send with each graph."""

    def __init__(self, net: nn.Module, inputs: dict[str, Any], tensors: dict[str, Any]) -> None:
        self.net = net
        self.known = know(net)
        self._inputs = inputs
        self._tensors = {name: to_frame(tensor) for name, tensor in tensors.items()}
        self.call = open_submit(self._decoded(Graph(nodes=()), {}), _nothing, self.known).call
        self.signature = self.known.signatures.for_call(self.call.args, dict(self.call.kwargs))
        Kept.of(net).stays = True  # as in a worker

    @cached_property
    def sites(self) -> list[tuple[str, str, int]]:
        """Where there are tensors."""
        return [one for one in self.signature.order if self.signature.site(*one).tensors]

    @cached_property
    def weights(self) -> list[tuple[str, nn.Parameter]]:
        """Each parameter once, by path."""
        return sorted(self.net.named_parameters())

    @cached_property
    def modules(self) -> list[tuple[str, nn.Module]]:
        """What can be applied."""
        kinds = (nn.Linear, nn.LayerNorm, nn.Embedding)
        return [(path, one) for path, one in self.net.named_modules() if isinstance(one, kinds)]

    def _decoded(self, graph: Graph, frames: dict[str, Frame]) -> Submit:
        return decode(msgspec.msgpack.encode(self.message(graph, frames)), Submit, "msgpack")

    def message(self, graph: Graph, frames: dict[str, Frame]) -> dict[str, Any]:
        """A submission, as data."""
        digests = {key: digest(frame) for key, frame in frames.items()}
        return {
            "protocol": 1,
            "request_id": "fuzz",
            "model": "m",
            "fingerprint": self.known.fingerprint,
            "graph": msgspec.to_builtins(graph),
            "inputs": self._inputs,
            "constants": digests,
            "tensors": write({**self._tensors, **{digests[k]: f for k, f in frames.items()}}),
        }

    def admitted(self, graph: Graph, frames: dict[str, Frame]) -> Opened:
        """What gateway, checker and worker make of it. Raises `WeftError` where they refuse."""
        return self._admitted(self._decoded(graph, frames))

    def admitted_text(self, graph: bytes, frames: dict[str, Frame]) -> Opened:
        """The same of a graph's JSON, whatever that is."""
        message = self.message(Graph(nodes=()), frames) | {"graph": msgspec.Raw(graph)}
        return self._admitted(decode(msgspec.json.encode(message), Submit, "json"))

    def _admitted(self, submit: Submit) -> Opened:
        opened = open_submit(submit, _nothing, self.known)
        admit(opened.graph, opened.call, self.known, limits(**LIMITS))
        return opened

    def drawn(self, opened: Opened) -> Drawn:
        told = overwritten_by(self.known, opened.call, graph=opened.graph)
        bounds = limits(**LIMITS, run_seconds=20.0)
        return draw(self.net, opened, overwritten=told, limits=bounds, on_log=_silent)

    def mark(self) -> str:
        """The SHA-256 of every parameter and buffer, with names, shapes, strides and flags."""
        seen = hashlib.sha256()
        for name, tensor in [*self.net.named_parameters(), *self.net.named_buffers()]:
            about = name, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad
            seen.update(repr((*about, tensor.grad)).encode())
            seen.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return seen.hexdigest()


def counting() -> Target:
    """The small one of our own."""
    x = example()
    return Target(Counting().eval(), {"type": "plain", "args": [["ref", 0]]}, {"in.0": x})


def tiny() -> Target:
    """The language model that ships with Weft."""
    net = load(Source.of(tiny_path()))
    ids = torch.tensor([[5, 9, 3, 7], [1, 2, 8, 4]])
    return Target(net, {"type": "language", "given": ["input_ids"]}, {"input_ids": ids})


TARGETS: dict[str, Callable[[], Target]] = {"counting": counting, "tiny": tiny}


def _nothing(name: str) -> Frame:
    raise NoSuchError("there is no such constant")


def _silent(text: str) -> None:
    pass
