"""`rename=`: other names for modules, in the tree, in errors and caches; never in a graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weft
from tests.language.hooks import with_hooks
from weft.errors import UnknownOptionError, UnknownPathError
from weft.testing.same import bitwise

NAMES = {"transformer.h": "layers", "lm_head": "head", "mlp": ["ffn", "feed"], "attn.c_proj": "o"}


@pytest.fixture
def named(place, gpt2):
    """The same model under other names."""
    return place.language(gpt2.net, rename=NAMES)


def test_sites_under_other_names(gpt2, named):
    key = "transformer.h.1.mlp.output"
    expected = with_hooks(gpt2.net, {key: lambda h: h * 2}, gpt2.ids)
    with named.trace(gpt2.ids):
        named.layers[1].ffn.output *= 2
        got = named.layers[1].feed.output.save()
        logits = named.head.output.save()
    bitwise(got, expected[key])
    bitwise(logits, expected.result.logits)


def test_an_alias_is_the_module_itself(named):
    assert named.layers is named.transformer.h
    assert named.layers[0].ffn is named.transformer.h[0].mlp
    assert named.transformer.h[2].o is named.transformer.h[2].attn.c_proj
    assert named.layers.path == "transformer.h"
    assert named.get("layers.0.ffn.c_fc").path == "transformer.h.0.mlp.c_fc"
    paths = [module.path for module in named.modules()]
    assert len(paths) == len(set(paths)) == len(dict(named.named_modules()))


def test_skips_and_caches_take_them(gpt2, named):
    with named.trace(gpt2.ids) as tracer:
        named.layers[1].ffn.skip(named.layers[1].ffn.input)
        cache = tracer.cache(["layers.1.ffn", "head"], inputs=True)
    assert list(cache.keys()) == ["transformer.h.1.mlp", "lm_head"]
    bitwise(cache["layers.1.ffn"].output, cache.layers[1].feed.input)
    assert "head" in cache


def test_graphs_have_the_true_paths(gpt2, named, tmp_path):
    with named.trace(gpt2.ids) as tracer:
        named.layers[0].ffn.output[:] = 0
        named.head.output.save("logits")
    assert "layers" not in str(tracer.graph) and "transformer.h.0.mlp" in str(tracer.graph)
    tracer.graph.save(tmp_path / "g.weft")
    again = weft.Experiment.load(tmp_path / "g.weft").run(gpt2.model, gpt2.ids)
    expected = with_hooks(gpt2.net, {"transformer.h.0.mlp.output": lambda h: h * 0}, gpt2.ids)
    bitwise(again["logits"], expected.result.logits)


def test_weights_through_them(gpt2, named):
    with named.trace(gpt2.ids):
        named.layers[0].ffn.output.save()
        weight = named.head.weight.save()
    bitwise(weight, gpt2.net.lm_head.weight.detach())


def test_the_nearest_names_are_the_new_ones_too(named):
    with pytest.raises(UnknownPathError, match="layers"):
        _ = named.layerz
    with pytest.raises(UnknownPathError, match=r"transformer\.h\.0\.ffn"):
        _ = named.layers[0].ffm
    assert "layers" in dir(named) and "ffn" in dir(named.layers[0])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.out = nn.Linear(2, 2)
        self.note = "x"

    def forward(self, x):
        return self.out(self.body(x))


def test_of_any_module(place):
    net = Net()
    model = weft.Model(net, rename={"body.0": "first", "out": "head"})
    x = torch.ones(1, 2)
    with model.trace(x):
        got = model.first.output.save()
        out = model.head.output.save()
    bitwise(got, net.body[0](x).detach())
    bitwise(out, net(x).detach())


WRONG = {
    "a child": {"out": "body"},
    "a weight": {"body": "note"},
    "a verb": {"out": "output"},
    "another verb": {"out": "skip"},
    "an attribute of every module": {"out": "train"},
    "two modules": {"out": "x", "body": "x"},
    "a path": {"out": "a.b"},
    "nothing": {"out": ""},
    "a private one": {"out": "_out"},
    "a number": {"out": 3},
}


@pytest.mark.parametrize("case", WRONG)
def test_names_that_are_taken_or_none(place, case):
    with pytest.raises(UnknownOptionError, match="rename") as caught:
        weft.Model(Net(), rename=WRONG[case])
    assert "Model(" in caught.value.line


def test_keys_that_lead_nowhere(place):
    with pytest.raises(UnknownPathError, match="no module 'bodi'") as caught:
        weft.Model(Net(), rename={"bodi": "x"})
    assert "body" in caught.value.fix
    with pytest.raises(UnknownPathError):
        weft.Model(Net(), rename={"body.7": "x"})
    with pytest.raises(UnknownOptionError, match="takes a dict"):
        weft.Model(Net(), rename=["body"])
