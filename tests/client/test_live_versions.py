"""Another model than the one recorded on, and another version of Weft."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.client.live import plain_net
from weft import errors
from weft.testing import tiny_path
from weft.testing.same import bitwise

LAYER = """
import torch

class Layer(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x){}
"""


@pytest.fixture
def layer(tmp_path: Path) -> Callable[[str], nn.Sequential]:
    """Nets of one tree, whose class stands in a file that says something else each time."""

    def net(more: str) -> nn.Sequential:
        file = tmp_path / more.strip(" *") / "layers.py"
        file.parent.mkdir()
        file.write_text(LAYER.format(more))
        spec = importlib.util.spec_from_file_location("layers", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return nn.Sequential(module.Layer()).eval()

    return net


def test_a_model_with_other_source_code_is_refused(live: Any, x: Any, layer: Any) -> None:
    live.add("other", layer(" * 2"))
    try:
        model = weft.Model(layer(" * 1"), remote=live.url)
        refused = pytest.raises(errors.WrongModelError, match="no model like this one")
        with refused as caught, model.trace(x):
            model[0].output.save()
        assert caught.value.code == "wrong-model" and "other" in str(caught.value)
    finally:
        live.remove("other")


def test_a_model_that_was_replaced_since_it_was_opened_is_refused(
    live: Any, x: Any, layer: Any
) -> None:
    live.add("other", layer(" * 1"))
    try:
        model = weft.Model("other", remote=live.url)
        with model.trace(x):
            h = model[0].output.save()
        bitwise(h, torch.relu(x))
        live.add("other", layer(" * 2"))
        before = len(live.ledger.jobs("local", limit=10_000))
        with pytest.raises(errors.OtherModelError) as caught, model.trace(x):
            model[0].output.save()
        assert caught.value.code == "other-model" and caught.value.fix
        after = live.ledger.jobs("local", limit=10_000)
        assert all(job.state != "done" for job in after[: len(after) - before])
        model = weft.Model("other", remote=live.url)  # opened anew
        with model.trace(x):
            h = model[0].output.save()
        bitwise(h, torch.relu(x) * 2)
    finally:
        live.remove("other")
    for told in ("other", "it serves: tiny"):  # at first by the server, then from its list
        gone = pytest.raises(errors.WrongModelError, match=told)
        with gone, model.trace(x):
            model[0].output.save()


def test_a_model_of_the_same_name_that_is_another_is_refused(live: Any, tmp_path: Path) -> None:
    folder, here = tmp_path / "theirs", tiny_path()
    shutil.copytree(here, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    live.add(here, folder)
    try:
        model = weft.LanguageModel(here)
        with pytest.raises(errors.OtherModelError), model.trace("one two", remote=live.url):
            model.lm_head.output.save()
        with model.trace("one two", remote="auto") as tracer:
            model.lm_head.output.save()
        assert tracer.where == "here"
    finally:
        live.remove(here)


def test_a_graph_for_another_model_is_refused(live: Any, net: Any, x: Any) -> None:
    deeper = nn.Sequential(*plain_net(), nn.Linear(2, 2)).eval()
    model = weft.Model(deeper)
    with model.trace(x) as tracer:
        model[3].output.save("h")  # not there
    with pytest.raises(errors.GraphError, match="another model") as caught:
        tracer.graph.run(weft.Model(net, remote=live.url), x)
    assert f"{__file__}:" in str(caught.value.line) and "# not there" in str(caught.value.line)


def test_a_client_of_another_version_is_refused(
    live: Any, net: Any, x: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("weft.client.core.PROTOCOL", 7)
    model = weft.Model(net, remote=live.url)
    with pytest.raises(errors.VersionMismatchError) as caught, model.trace(x):
        model[1].output.save()
    assert caught.value.code == "version-mismatch"
    assert weft.__version__ in str(caught.value) and caught.value.fix
