"""The work of the load test: jobs of six kinds, recorded once, to be sent again and again.

    works = record(folder, net, server, variants=8)     # 48 of them, kinds in turn
    body = works[0].message("0123...")                  # what the client sent, under another id

Each is recorded by the real client on the real server, so its message is what a user's would be;
and run here, by itself, so that what must come back is known. Sending a recorded message costs the
users' side next to nothing, which matters where it shares its cores with the server.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import torch
from torch.nn.utils.rnn import pad_sequence

import weft
from weft.client.backend import Reply, Request
from weft.client.local import LocalBackend
from weft.client.results import opened
from weft.client.servers import Server
from weft.client.travel import Parcel
from weft.testing.same import bounded
from weft.wire.messages import Submit, decode

from .models import prompt, waited

SHORTEST, LONGEST = 8, 32
NEW_TOKENS = 6
POSITIONS, STRENGTHS = (1, 3, 5), (-2.0, 2.0)
GREEDY: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}

NAMES = (
    {"model.layers": "blocks", "model.norm": "last_norm"},
    {"transformer.h": "blocks", "transformer.ln_f": "last_norm"},
)
"""Names of ours for the parts of both layouts."""


@dataclass(frozen=True, eq=False)
class Work:
    """One job: the client's message without its request id, and what the server must answer.

    `bare` is the model alone on the same rows: a forward of them all, or their generation.
    """

    kind: str
    rows: torch.Tensor
    head: bytes
    tail: bytes
    parcel: Parcel
    expected: dict[str, Any]
    bare: Callable[[], object]

    def message(self, request_id: str) -> bytes:
        return self.head + request_id.encode() + self.tail

    def check(self, result: bytes) -> None:
        """Raises `AssertionError` for a result that is not the local run's, within the bound."""
        _, saved = opened(result)
        bounded(dict(sorted(saved.items())), dict(sorted(self.expected.items())))


@dataclass(frozen=True)
class Task:
    """What one job is to do."""

    kind: str
    ids: torch.Tensor
    layer: int
    vector: torch.Tensor

    def on(self, model: Any, **where: Any) -> None:
        """Records and runs it."""
        _KINDS[self.kind](self, model, where)

    def rows(self) -> int:
        """How many rows its forward has."""
        return len(POSITIONS) * len(STRENGTHS) if self.kind == "sweep" else 1


# -- what users do -------------------------------------------------------------------------------


def _read(task: Task, model: Any, where: dict[str, Any]) -> None:
    with model.trace(task.ids, **where):
        model.blocks[task.layer].output[:, -1].save("h")
        model.lm_head.output[:, -1].save("logits")


def _patch(task: Task, model: Any, where: dict[str, Any]) -> None:
    with model.trace(task.ids, **where):
        model.blocks[task.layer].output[:, 3] = task.vector
        model.lm_head.output[:, -1].save("logits")


def _lens(task: Task, model: Any, where: dict[str, Any]) -> None:
    with model.trace(task.ids, **where):
        for number, block in enumerate(model.blocks):
            model.lm_head(model.last_norm(block.output[:, -1])).save(f"layer {number}")


def _steer(task: Task, model: Any, where: dict[str, Any]) -> None:
    with model.trace(task.ids, **where):
        model.blocks[task.layer].output[:] += 0.5 * task.vector
        model.blocks[task.layer].mlp.output[:, -1] *= 0.5
        model.lm_head.output[:, -1].save("logits")


def _sweep(task: Task, model: Any, where: dict[str, Any]) -> None:
    def steered(tracer: Any, position: int, strength: float) -> Any:
        model.blocks[task.layer].output[:, position] += strength * task.vector
        return model.lm_head.output[0, -1]

    model.sweep(task.ids, steered, position=POSITIONS, strength=STRENGTHS, **where)


def _generate(task: Task, model: Any, where: dict[str, Any]) -> None:
    with model.generate(task.ids, **GREEDY, **where) as tracer:
        model.blocks[task.layer].output[:, -1] += 0.5 * task.vector
        tracer.result.save("ids")


_KINDS: dict[str, Callable[[Task, Any, dict[str, Any]], None]] = {
    "read": _read,
    "patch": _patch,
    "lens": _lens,
    "steer": _steer,
    "sweep": _sweep,
    "generate": _generate,
}
KINDS = tuple(_KINDS)


def tasks(net: Any, variants: int) -> list[Task]:
    """`variants` of each kind, kinds in turn; prompts, layers and directions of their own."""
    config = net.config
    chance = random.Random(0)
    found = []
    for number in range(variants):
        for kind in KINDS:
            generator = torch.Generator().manual_seed(len(found))
            length = chance.randint(SHORTEST, LONGEST)
            ids = prompt(length, config.vocab_size).roll(number, -1)
            layer = chance.randrange(config.num_hidden_layers)
            vector = torch.randn(config.hidden_size, generator=generator)
            found.append(Task(kind, ids, layer, vector))
    return found


# -- recording -----------------------------------------------------------------------------------


def record(folder: str, net: Any, server: Server, variants: int) -> list[Work]:
    """The work for one model. Raises `AssertionError` where the server answers otherwise than the
    model does here."""
    paths = dict(net.named_modules()).keys()
    rename = next(names for names in NAMES if names.keys() <= paths)
    noting = _Noting(lambda: net)
    here = weft.LanguageModel(net, backend=noting, rename=rename)
    wire = _Wire()
    heard = Server(server.place, server.settings, transport=wire)
    there = weft.LanguageModel(folder, remote=heard, rename=rename)
    found = []
    for task in tasks(net, variants):
        task.on(here)
        expected = {
            name: value.cpu() if isinstance(value, torch.Tensor) else value
            for name, value in noting.reply.saved.items()
        }
        wire.bodies.clear()
        task.on(there)
        (body,) = wire.bodies
        found.append(_work(task, net, body, expected))
    heard.close()
    return found


def _work(task: Task, net: Any, body: bytes, expected: dict[str, Any]) -> Work:
    message = decode(body, Submit)
    head, tail = body.split(message.request_id.encode())
    parcel = Parcel(message.graph, message.inputs, dict(message.constants), {}, {})
    rows = task.ids.expand(task.rows(), -1)
    way = _generation if task.kind == "generate" else _forward
    bare = partial(way, net, rows, torch.ones_like(rows))
    return Work(task.kind, rows, head, tail, parcel, expected, bare)


@torch.no_grad()
def _forward(net: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
    net(input_ids=ids.to(net.device), attention_mask=mask.to(net.device), use_cache=False)
    waited(net.device)


@torch.no_grad()
def _generation(net: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
    ids, mask = ids.to(net.device), mask.to(net.device)
    net.generate(ids, attention_mask=mask, pad_token_id=0, **GREEDY)
    waited(net.device)


def all_at_once(works: Sequence[Work], net: Any) -> None:
    """The model alone on the rows of all these jobs, padded: one forward, and one generation."""
    for way, generates in ((_forward, False), (_generation, True)):
        rows = [row for one in works if (one.kind == "generate") is generates for row in one.rows]
        side = "left" if generates else "right"
        ids = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side=side)
        way(net, ids.clamp(min=0), (ids >= 0).long())


class _Noting(LocalBackend):
    """The model here; keeps the last reply."""

    reply: Reply

    def run(self, request: Request) -> Reply:
        self.reply = super().run(request)
        return self.reply


class _Wire(httpx.HTTPTransport):
    """The network; keeps what is submitted."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: list[bytes] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if (request.method, request.url.path) == ("POST", "/api/jobs"):
            self.bodies.append(request.read())
        return super().handle_request(request)
