"""A scripted server with a small module on it, and a live one; handles whose blocks run there."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.client.live import Proxy, check_nothing_left, gated_net, held, plain_net, slow_net
from tests.client.scripted import Scripted
from tests.home import own_home
from tests.leftovers import only_here
from weft.client import close
from weft.client.servers import Server
from weft.testing import tiny_path


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """No server, key or configuration of whoever runs the tests."""
    own_home(monkeypatch, tmp_path)


@pytest.fixture
def net() -> nn.Module:
    return plain_net()


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
    monkeypatch.setattr(time, "sleep", only_here(script.clock.sleep, time.sleep))
    return script


@pytest.fixture
def server(script: Scripted) -> Iterator[Server]:
    server = script.server()
    yield server
    server.close()


@pytest.fixture
def model(net: nn.Module, server: Server) -> Any:
    return weft.Model(net, remote=server)  # type: ignore[arg-type]


# -- a live server -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """One server for all tests: `tiny`, a trained language model, and small modules."""
    from weft.testing.service import serve

    state = tmp_path_factory.mktemp("state")
    nets = {"net": plain_net(), "gated": gated_net(), "slow": slow_net()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(state))
        with serve({"tiny": tiny_path(), **nets}) as server:
            yield server, state


@pytest.fixture
def live(_live: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The live server, found by its address. Afterwards nothing that a test opened is left."""
    server, state = _live
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before = held()
    yield server
    close()
    check_nothing_left(before)
    assert not list(scratch.iterdir())


@pytest.fixture
def proxy(live: Any, monkeypatch: Any) -> Iterator[Proxy]:
    """The way to the server that `remote=True` takes."""
    with Proxy(live.url) as proxy:
        monkeypatch.setenv("WEFT_HOST", proxy.url)
        monkeypatch.setenv("WEFT_KEY", live.key)
        yield proxy
        close()


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The language model itself, for plain hooks."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_path()).eval()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_path())


@pytest.fixture
def gated(live: Any) -> Any:
    """A handle on the server's model that waits at its second module."""
    return weft.Model("gated", remote=live.url)
