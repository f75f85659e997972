"""Modules of the user's own in a generation: called, read and edited at each step.

The oracle is `transformers`' own `generate` with the same module in plain hooks.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weft
from tests.language.generated import generated
from weft.errors import NotReachedError, RecordingError
from weft.testing.same import bitwise, moves

NEW = 4
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
LAYER = "transformer.h.1.output"


class Coder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.encoder, self.decoder = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x):
        return self.decoder(self.encoder(x).relu())


@pytest.fixture
def coder():
    return Coder().requires_grad_(False)


@pytest.fixture
def layer(model, coder):
    block = model.transformer.h[1]
    block.coder = coder
    yield block
    del block.coder


def coded(coder, change=None):
    """A hook that puts the module's result in the layer's place; what its encoder gave."""
    kept = {}

    def hook(step, h):
        inside = coder.encoder(h)
        if change is not None:
            change(step, inside)
        kept[step] = inside.clone()
        return coder.decoder(inside.relu())

    return hook, kept


def test_it_is_read_inside_at_each_step(net, model, ids, layer, coder):
    hook, kept = coded(coder)
    expected = generated(net, ids, {LAYER: hook}, max_new_tokens=NEW)
    plain = generated(net, ids, {LAYER: None}, max_new_tokens=NEW)
    with model.generate(ids, **GREEDY) as tracer:
        features, outputs = weft.save([]), weft.save([])
        for _ in tracer.iter[:]:
            layer.output = layer.coder(layer.output)
            features.append(layer.coder.encoder.output)
            outputs.append(layer.output)
        result = tracer.result.save()
    bitwise(list(features), [kept[step] for step in range(NEW)])
    bitwise(list(outputs), [expected[LAYER, step] for step in range(NEW)])
    bitwise(result, expected.result)
    moves(outputs[1], plain[LAYER, 1])


@pytest.mark.parametrize("steps", [None, [1, 3]])
def test_its_inside_is_edited_at_each_step(net, model, ids, layer, coder, steps):
    """Outside of loops, and at some steps."""

    def double(step, inside):
        if steps is None or step in steps:
            inside[..., 3:9] *= 4

    hook, _ = coded(coder, double)
    hooks = {LAYER: lambda step, h: hook(step, h) if steps is None or step in steps else None}
    expected = generated(net, ids, {**hooks, "lm_head.output": None}, max_new_tokens=NEW)
    unchanged = generated(
        net, ids, {LAYER: coded(coder)[0], "lm_head.output": None}, max_new_tokens=NEW
    )

    def change():
        new = layer.coder(layer.output)
        layer.coder.encoder.output[..., 3:9] *= 4
        layer.output = new

    with model.generate(ids, **GREEDY) as tracer:
        if steps is None:
            change()
        else:
            for _ in tracer.iter[steps]:
                change()
        logits = weft.save([])
        for _ in tracer.iter[:]:
            logits.append(model.lm_head.output)
        result = tracer.result.save()
    bitwise(list(logits), [expected["lm_head.output", step] for step in range(NEW)])
    bitwise(result, expected.result)
    moves(logits[1], unchanged["lm_head.output", 1])


def test_a_step_shows_its_own_call(net, model, ids, layer, coder):
    hook, kept = coded(coder)
    generated(net, ids, {LAYER: hook}, max_new_tokens=1)
    with model.generate(ids, **GREEDY) as tracer:
        layer.coder(layer.output)
        with tracer.iter[2], pytest.raises(NotReachedError, match="not been called at step 2"):
            layer.coder.encoder.output.save()
        h = layer.coder.encoder.output.save()
    bitwise(h, kept[0])


def test_another_step_does_not_edit_it(model, ids, layer):
    with (
        pytest.raises(RecordingError, match="outside of the step that called it") as caught,
        model.generate(ids, **GREEDY) as tracer,
    ):
        new = layer.coder(layer.output)
        inside = layer.coder.encoder.output
        with tracer.iter[0]:
            inside[:] *= 2  # here
        layer.output = new
    assert "# here" in caught.value.line
