"""`kill -9` of the worker between the requests of a session, and in the middle of one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.home import own_home
from tests.service.processes import kill, one, until
from weft.client.servers import close as close_clients
from weft.service.fleet.keys import LOCAL_OWNER, open_keys
from weft.testing import tiny_path
from weft.testing.process import served
from weft.testing.same import bitwise

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

PROMPTS = ("Tom and Anna", "The capital of France is")
SIZE, LONG = 500, 150
"""Products of matrices of this size: they keep a request running for the seconds in which its
worker is killed."""


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A home of its own, and clients with patience."""
    own_home(monkeypatch, tmp_path, OMP_NUM_THREADS="1", WEFT_RETRY_SECONDS="90")
    yield
    close_clients()


def trained(model: Any, remote: Any, between: Any = None, during: Any = None) -> Any:
    """Four steps of an adapter, and a value of the first trace that is used in the last."""
    torch.manual_seed(0)
    down, up = nn.Linear(128, 4, bias=False), nn.Linear(4, 128, bias=False)
    layer, losses = model.model.layers[2], []
    with model.session(remote=remote) as session:
        optimizer = torch.optim.AdamW([*down.parameters(), *up.parameters()], lr=1e-2)
        with model.trace(PROMPTS[0]):
            first = layer.output[:, -1]
        for step in range(4):
            optimizer.zero_grad()
            with model.trace(PROMPTS[step % 2]):
                h = layer.mlp.output
                if step == 2:  # takes its time
                    x = (h.sum() * 0).expand(SIZE, SIZE) + 1 / SIZE
                    y = x
                    for _ in range(LONG):
                        y = y @ x
                    h = h + 0 * y[0, 0]
                layer.mlp.output = h + up(down(layer.mlp.input))
                loss = model.lm_head.output[0, -1].logsumexp(-1)
                loss.backward()
            optimizer.step()
            losses.append(loss)
            if between is not None and step == 0:
                between(session)
            if during is not None and step == 2:
                during(session)
        with model.trace(PROMPTS[1]):
            layer.output[:, -1] = first
            logits = model.lm_head.output.save()
        losses = [loss + 0 for loss in losses]
    return logits, losses, down.weight.detach(), up.weight.detach()


def test_a_session_survives_kills_of_its_worker(tmp_path: Path) -> None:
    """To the bit: each request is whole, or was never there."""
    killed = []

    def job(session: Any, number: int) -> Any:
        (room,) = session._rooms.values()
        with open_keys(server.data) as ledger:
            return ledger.find(LOCAL_OWNER, f"{room._info.id}-{number}")

    again: list[Any] = []

    def shoot() -> None:
        worker = one(server.process.pid, "worker")
        killed.append(worker)
        kill(worker)

    def between(session: Any) -> None:
        (room,) = session._rooms.values()
        until(lambda: job(session, room.number).state == "done", "the end of the first step")
        shoot()

    def during(session: Any) -> None:
        (room,) = session._rooms.values()
        number = room.number - 1  # the last one is the step of the optimiser
        until(lambda: job(session, number).state == "running", "the long request")
        shoot()
        again.append(job(session, number).id)

    model = weft.LanguageModel(tiny_path())
    with served(tiny_path()) as server:
        mine = trained(model, server.url, between, during)
        said = server.said()
        with open_keys(server.data) as ledger:
            assert [ledger.job(id).attempts for id in again] == [2]
    assert len(killed) == 2
    assert "Traceback" not in said, said
    for found, expected in zip(mine, trained(model, False), strict=True):
        bitwise(found, expected)
