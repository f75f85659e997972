"""Shape rules: a rule is published only for a module that keeps it everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.families import zoo
from weft.engine.rules import rule_for


class Keeps(nn.Module):
    def forward(self, x):
        return x * 2


class Gives(Keeps):
    def forward(self, x):
        return x


class Widens(Keeps):
    def forward(self, x):
        return x.float()


class Cuts(Keeps):
    def forward(self, x):
        return x[..., :4096] * 1


class Moves(Keeps):
    def forward(self, x):
        return (x * 1).transpose(-1, -2).contiguous() if x.dim() == 3 else x * 1


class Strides(Keeps):
    def forward(self, x):
        return (x * 1).transpose(0, -1) if x.dim() > 1 else x * 1


class Pairs(Keeps):
    def forward(self, x):
        return x * 1, x


class Places(Keeps):
    def forward(self, x):
        return x.mul_(2)


class Norm(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True) * self.weight


class Halves(Norm):
    def forward(self, x):
        return super().forward(x)[..., ::2].contiguous()


def test_plain_layers():
    assert rule_for(nn.Linear(3, 4)) == "linear"
    assert rule_for(nn.Embedding(3, 4)) == "embedding"
    assert rule_for(nn.LayerNorm(4)) == "same"
    assert rule_for(nn.GELU()) == "same"


def test_layers_of_transformers_by_what_they_do():
    net = zoo.build("gpt2")
    assert rule_for(net.transformer.h[0].mlp.c_fc) == "transposed"
    assert rule_for(net.transformer.h[0].mlp.act) == "same"
    net = zoo.build("llama")
    assert rule_for(net.model.norm) == "same"
    assert rule_for(net.model.rotary_emb) is None


@pytest.mark.parametrize("kind", [Gives, Widens, Cuts, Moves, Strides, Pairs, Places, Halves])
def test_what_breaks_a_rule_somewhere_has_none(kind):
    assert rule_for(kind()) is None


@pytest.mark.parametrize("kind", [Keeps, Norm])
def test_what_keeps_it_has_it(kind):
    assert rule_for(kind()) == "same"


def test_hooks_and_replaced_forwards_take_it_away():
    hooked = nn.Linear(3, 4)
    hooked.register_forward_hook(lambda module, args, output: output[..., :1])
    replaced = nn.Linear(3, 4)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    for module in (hooked, replaced, nn.Sequential(nn.Linear(3, 4))):
        assert rule_for(module) is None
