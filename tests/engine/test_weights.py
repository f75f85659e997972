"""The mark of a model's weights: the same for copies, another after training or an edit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import weft
from tests.families import zoo
from weft.engine.publish import know
from weft.engine.weights import refuse_other_weights, weights_mark
from weft.errors import OtherModelError
from weft.testing import tiny_path
from weft.testing.service import serve


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_copies_have_one(dtype):
    net = zoo.build("llama", dtype)
    assert weights_mark(net) == weights_mark(copy.deepcopy(net)) == weights_mark(net)


def test_weights_on_meta_have_none():
    assert weights_mark(know(tiny_path()).skeleton) is None


def a_step(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    net(torch.tensor(zoo.tokens(9))).logits.square().mean().backward()
    optimizer.step()


@torch.no_grad()
def _scaled(net):
    net.transformer.h[1].mlp.c_fc.weight.mul_(1.001)


def _replaced(net):
    net.transformer.ln_f.bias = nn.Parameter(net.transformer.ln_f.bias.detach() + 1)


CHANGES = {
    "training": a_step,
    "one weight in place": _scaled,
    "another parameter": _replaced,
    "another checkpoint": lambda net: net.load_state_dict(zoo.build("gpt2", seed=3).state_dict()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_numbers_have_another(name):
    net = zoo.build("gpt2")
    before = weights_mark(net)
    CHANGES[name](net)
    assert weights_mark(net) != before
    with pytest.raises(OtherModelError, match="other weights"):
        refuse_other_weights(net, before)


def test_odd_parameters():
    net = nn.Module()
    net.empty = nn.Parameter(torch.empty(0, 3))
    net.one = nn.Parameter(torch.tensor(2.0))
    net.turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
    mark = weights_mark(net)
    net.turned.data = net.turned.data.contiguous()
    assert weights_mark(net) == mark
    refuse_other_weights(net, None)


def test_a_server_with_other_weights_refuses():
    mine, x = nn.Linear(3, 2), torch.ones(1, 3)
    with serve({"theirs": copy.deepcopy(mine)}) as server:
        model = weft.Model(mine, remote=server.url)
        with model.trace(x):
            out = model.output.save()
        assert torch.equal(out, mine(x).detach())
        with torch.no_grad():
            mine.weight.add_(1)
        with pytest.raises(OtherModelError, match="other weights") as caught, model.trace(x):
            model.output.save()
        assert "by its name" in caught.value.fix
