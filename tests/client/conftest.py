"""A scripted server, a small module on it, and a handle whose blocks run there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.client.scripted import Scripted
from weft.client.servers import Server


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """No server, key or configuration of whoever runs the tests."""
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("WEFT_HOST", "WEFT_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture
def hidden(net: Any, x: torch.Tensor) -> torch.Tensor:
    """What the second module gives for `x`: `[3, 8]`."""
    with torch.no_grad():
        return net[1](net[0](x))


@pytest.fixture
def script(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    script = Scripted({"net": net})
    monkeypatch.setattr(time, "sleep", script.clock.sleep)
    return script


@pytest.fixture
def server(script: Scripted) -> Iterator[Server]:
    server = script.server()
    yield server
    server.close()


@pytest.fixture
def model(net: nn.Module, server: Server) -> Any:
    return weft.Model(net, remote=server)  # type: ignore[arg-type]
