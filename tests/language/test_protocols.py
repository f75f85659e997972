"""Values in Python's own protocols: comparison with anything, in-place activations, defaults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.language.hooks import with_hooks
from weft.testing.same import bitwise, moves


def test_a_value_compares_with_anything_as_a_tensor_does(model: Any, ids: torch.Tensor) -> None:
    plain = torch.ones(2)
    with model.trace(ids):
        h = model.transformer.h[0].output
        assert (h == None) is (plain == None)  # noqa: E711
        assert (h != "text") is (plain != "text")
        same = weft.save((h == h).all())
    assert same


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU(inplace=True)])
def test_an_in_place_activation_reaches_the_model(
    model: Any, net: nn.Module, ids: torch.Tensor, activation: nn.Module
) -> None:
    path = "transformer.h.0.mlp"
    seen = with_hooks(net, {f"{path}.output": activation}, ids)
    with model.trace(ids):
        activation(model.get(path).output)
        logits = model.lm_head.output.save()
    bitwise(logits, seen.result.logits)
    with torch.no_grad():
        moves(logits, net(ids).logits)


def test_a_factory_keeps_the_default_dtype_of_its_recording(model: Any, ids: torch.Tensor) -> None:
    with model.trace(ids) as tracer:
        torch.set_default_dtype(torch.float64)
        try:
            torch.zeros(model.lm_head.output.shape).save("zeros")
        finally:
            torch.set_default_dtype(torch.float32)
    assert tracer.results["zeros"].dtype == torch.float64
    assert tracer.graph.run(model, ids)["zeros"].dtype == torch.float64
