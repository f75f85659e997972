"""Where a block runs, against a live server."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.client.live import plain_net, soon
from tests.language.hooks import with_hooks
from weft.errors import AccessError, ServerAwayError, UnknownOptionError, WrongModelError
from weft.testing import tiny_path
from weft.testing.same import bitwise, bounded

PROMPT = "The capital of France is"
AWAY = "http://127.0.0.1:9"


def jobs(server: Any) -> int:
    """How many jobs the server has had."""
    return len(server.ledger.jobs("local", limit=10_000))


def ran_there(server: Any, model: Any, x: Any, hidden: Any, **options: Any) -> bool:
    """Runs a block whose numbers are checked; tells whether the server had a job for it."""
    before = jobs(server)
    with model.trace(x, **options) as tracer:
        h = model[1].output.save()
    bounded(h, hidden)
    there = jobs(server) == before + 1
    assert there == (tracer.where == server.url) == ("round trip" in tracer.stages)
    return there


def configured(text: str) -> None:
    file = Path(os.environ["XDG_CONFIG_HOME"]) / "weft" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text(text)


def test_true_asks_the_server_of_the_environment(
    live: Any, net: Any, x: Any, hidden: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("WEFT_HOST", live.url)
    model = weft.Model(net)
    assert ran_there(live, model, x, hidden, remote=True)
    assert not ran_there(live, model, x, hidden)


def test_true_asks_the_server_of_the_file(live: Any, net: Any, x: Any, hidden: Any) -> None:
    configured(f'host = "{live.url}"\n')
    assert ran_there(live, weft.Model(net), x, hidden, remote=True)


def test_true_asks_the_only_server_here(live: Any, net: Any, x: Any, hidden: Any) -> None:
    assert ran_there(live, weft.Model(net), x, hidden, remote=True)


def test_an_address_asks_that_server(
    live: Any, net: Any, x: Any, hidden: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("WEFT_HOST", AWAY)
    assert ran_there(live, weft.Model(net), x, hidden, remote=live.url)


def test_a_handle_says_where_its_blocks_run_unless_they_say_so(
    live: Any, net: Any, x: Any, hidden: Any
) -> None:
    model = weft.Model(net, remote=live.url)
    assert ran_there(live, model, x, hidden)
    assert not ran_there(live, model, x, hidden, remote=False)
    assert not ran_there(live, model, x, hidden, remote="local")


def test_local_is_all_but_the_network(
    live: Any, net: Any, x: Any, hidden: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("WEFT_HOST", AWAY)
    model = weft.Model(net, remote="local")
    with model.trace(x) as tracer:
        h = model[1].output.save()
    bounded(h, hidden)
    assert tracer.where == "here, as a server would"
    assert tracer.traffic.up > 100 and tracer.traffic.down > h.nbytes
    with pytest.raises(weft.RemoteError, match="out of bounds"), model.trace(x):
        model[1].output[torch.tensor([7])].save()


@pytest.mark.parametrize("remote", ["there", 3, "127.0.0.1:1", "ftp://a", ""])
def test_what_means_no_place_is_refused(net: Any, x: Any, remote: Any) -> None:
    with pytest.raises(UnknownOptionError, match=r"(?s)means no place.*\n.*'auto'"):
        weft.Model(net).trace(x, remote=remote)
    with pytest.raises(UnknownOptionError, match="means no place"):
        weft.Model(net, remote=remote)


# -- auto ----------------------------------------------------------------------------------------


def test_auto_takes_a_server_that_has_the_model(
    live: Any, net: Any, x: Any, hidden: Any, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setenv("WEFT_HOST", live.url)
    caplog.set_level(logging.INFO, "weft")
    model = weft.Model(net, remote="auto")
    assert ran_there(live, model, x, hidden)
    assert ran_there(live, model, x, hidden)
    (record,) = [r for r in caplog.records if r.name == "weft"]
    assert live.url in record.getMessage() and "has the model" in record.getMessage()


@pytest.mark.parametrize("host", [AWAY, None])
def test_auto_stays_here_without_a_server(
    live: Any, net: Any, x: Any, hidden: Any, monkeypatch: Any, tmp_path: Path, host: Any
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    if host is not None:
        monkeypatch.setenv("WEFT_HOST", host)
    assert not ran_there(live, weft.Model(net, remote="auto"), x, hidden)


def test_auto_stays_here_where_the_server_has_another_model(
    live: Any, x: Any, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setenv("WEFT_HOST", live.url)
    caplog.set_level(logging.INFO, "weft")
    other = nn.Sequential(nn.Linear(4, 8), nn.Tanh()).eval()
    with torch.no_grad():
        hidden = other(x)
    assert not ran_there(live, weft.Model(other, remote="auto"), x, hidden)
    assert "it serves: tiny, net" in caplog.text


def test_auto_with_a_language_model(live: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("WEFT_HOST", live.url)
    model = weft.LanguageModel(tiny_path(), remote="auto")
    with model.trace(PROMPT) as tracer:
        model.lm_head.output.save()
    assert tracer.where == live.url


# -- the same source -----------------------------------------------------------------------------


@pytest.mark.parametrize("opened", [tiny_path(), "tiny"], ids=["folder", "id"])
def test_the_same_source_gives_the_same_there(
    live: Any, tiny: Any, tokenizer: Any, opened: str
) -> None:
    def halved(h: torch.Tensor) -> torch.Tensor:
        return torch.cat([h[:, :-1], h[:, -1:] * 0.5], 1)

    hooks = {"model.layers.1.output": None, "model.layers.2.mlp.output": halved}
    seen = with_hooks(tiny, hooks, **tokenizer(PROMPT, return_tensors="pt"))
    before = jobs(live)
    model = weft.LanguageModel(opened, remote=live.url)
    with model.trace(PROMPT):
        h = model.model.layers[1].output.save()
        model.model.layers[2].mlp.output[:, -1] *= 0.5
        logits = model.lm_head.output.save()
    bounded((h, logits), (seen["model.layers.1.output"], seen.result.logits))
    assert jobs(live) == before + 1


@pytest.mark.parametrize("remote", [False, "local"])
def test_a_model_without_weights_runs_only_there(live: Any, monkeypatch: Any, remote: Any) -> None:
    monkeypatch.setenv("WEFT_HOST", live.url)
    model = weft.LanguageModel("tiny", remote=True)
    refused = pytest.raises(weft.WeftError, match=f"no weights of tiny here.*{live.url}")
    with refused as caught, model.trace(PROMPT, remote=remote):
        model.lm_head.output.save()
    assert caught.value.fix and "remote=" in caught.value.fix
    with model.trace(PROMPT, remote="auto") as tracer:
        model.lm_head.output.save()
    assert tracer.where == live.url


def test_many_threads_ask_one_handle(live: Any, net: Any, x: Any, hidden: Any) -> None:
    model = weft.Model(net, remote=live.url)

    def block(number: int) -> bool:
        with model.trace(x):
            h = (model[1].output * number).save()
        bitwise(h, hidden * number)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(block, range(24)))


def test_an_experiment_runs_again_there(live: Any, net: Any, x: Any, hidden: Any) -> None:
    model = weft.Model(net)
    with model.trace(x) as tracer:
        (model[1].output + 1).save("h")
    before = jobs(live)
    found = tracer.graph.run(model, x[:2], remote=live.url)
    bitwise(found["h"], hidden[:2] + 1)
    assert jobs(live) == before + 1


def test_models_and_status_of_a_server(live: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("WEFT_HOST", live.url)
    found = {model.id: model for model in weft.models()}
    assert {"tiny", "net", "gated"} <= set(found)
    assert found["net"].parameters == sum(p.numel() for p in plain_net().parameters())
    assert found["tiny"].class_name == "LlamaForCausalLM" and found["tiny"].family == "language"
    status = weft.status()
    assert status.version == weft.__version__ and status.seconds > 0
    assert {"tiny", "net", "gated"} <= {model.id for model in status.models}
    idle = lambda m: (m.state, m.waiting, m.running) == ("ready", 0, 0)
    soon(lambda: all(idle(m) for m in weft.status().models))  # jobs of others may be about to end
    assert [m.id for m in weft.models(live.url)] == list(found)


# -- a server as one finds it --------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "weft_another"])
def test_a_server_wants_a_key_that_it_knows(
    live: Any, net: Any, x: Any, monkeypatch: Any, tmp_path: Path, key: Any
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("WEFT_HOST", live.url)
    if key is not None:
        monkeypatch.setenv("WEFT_KEY", key)
    before = jobs(live)
    with pytest.raises(AccessError, match="key") as caught:
        weft.models()
    assert caught.value.code == "access" and caught.value.fix
    model = weft.Model(net, remote=True)
    with pytest.raises(AccessError), model.trace(x):
        model[1].output.save()
    assert jobs(live) == before


def test_a_server_that_is_away_is_named(net: Any, x: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("WEFT_RETRY_SECONDS", "0.2")
    model = weft.Model(net, remote=AWAY)
    away = pytest.raises(ServerAwayError, match=f"no server answers at {AWAY}")
    with away as caught, model.trace(x):
        h = model[1].output.save()
    assert caught.value.code == "server-away" and isinstance(caught.value, ConnectionError)
    assert "weft serve" in str(caught.value) and "WEFT_HOST" in str(caught.value)
    assert f"{__file__}:" in str(caught.value.line)
    with pytest.raises(weft.WeftError, match="no server answers"):
        h + 1
    with pytest.raises(ServerAwayError):
        weft.LanguageModel("tiny", remote=AWAY)


def test_a_model_that_is_not_there_is_refused_when_it_is_opened(live: Any) -> None:
    with pytest.raises(WrongModelError, match=r"no model 'gpt5'; it serves: tiny, net"):
        weft.LanguageModel("gpt5", remote=live.url)
    with pytest.raises(UnknownOptionError, match=r"weft\.LanguageModel"):
        weft.Model("tiny", remote=live.url)
    with pytest.raises(UnknownOptionError, match=r"weft\.Model") as caught:
        weft.LanguageModel("net", remote=live.url)
    assert "net is of the plain family" in caught.value.message
    assert f"{__file__}:" in str(caught.value.line)
    with pytest.raises(UnknownOptionError, match="dtype") as caught:
        weft.LanguageModel("tiny", remote=live.url, dtype=torch.bfloat16)
    assert "dtype: tiny is loaded already, by the server" in caught.value.message
    assert "remote=False" in str(caught.value.fix) and f"{__file__}:" in str(caught.value.line)


def test_a_key_that_was_not_there_yet_is_looked_for_again(
    live: Any, net: Any, x: Any, hidden: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    state = os.environ["XDG_STATE_HOME"]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "empty"))
    model = weft.Model(net, remote=live.url)
    with pytest.raises(AccessError), model.trace(x):
        model[1].output.save()
    monkeypatch.setenv("XDG_STATE_HOME", state)  # as when the server has started meanwhile
    assert ran_there(live, model, x, hidden, remote=live.url)
