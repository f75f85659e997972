"""What invokes of equal inputs have in common is computed once, where a trial has shown it may.

Oracle: each invoke in a forward of its own (`alone=True`), or the forward counted by plain hooks.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

import weft
from tests.families import zoo
from weft.engine import trunks
from weft.testing.same import bounded

A, B = [torch.tensor([row]) for row in zoo.tokens(9, 4, seed=1)]
LAYERS = range(zoo.LAYERS)


def model_of(name, **options):
    return weft.LanguageModel(zoo.build(name, **options))


def felt(model):
    merger, net = model._merger(), model.dispatch()
    return merger._felt(net, merger._refused(net))


def hidden(value):
    return value[0] if isinstance(value, tuple) else value


@contextmanager
def counted(net, paths):
    """The rows that each layer sees, by plain hooks."""
    seen = {layer: [] for layer in LAYERS}
    handles = []
    for layer in LAYERS:
        module = net.get_submodule(paths.layer(layer))
        handles.append(
            module.mlp.register_forward_pre_hook(
                lambda module, args, layer=layer: seen[layer].append(len(args[0]))
            )
            if hasattr(module, "mlp")
            else module.register_forward_pre_hook(
                lambda module, args, layer=layer: seen[layer].append(len(args[0]))
            )
        )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def sweep(model, paths, port="output", prompts=(A,), **options):
    """An edit at each layer, at two positions, for each prompt; and one invoke without."""
    found = []
    with model.trace(**options) as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                found.append(model.get(paths.head).output.save())
            for layer in LAYERS:
                for position in (1, -1):
                    with tracer.invoke(ids):
                        module = model.get(paths.layer(layer))
                        before = hidden(model.get(paths.layer(0)).output)[:, 0]
                        target = module.input if port == "input" else hidden(module.output)
                        target[:, position] *= 1.5
                        found += weft.save([before, model.get(paths.head).output])
    return found


@pytest.mark.parametrize("name", zoo.FAMILIES)
@pytest.mark.parametrize("prompts", [(A,), (A, B)], ids=["one prompt", "two prompts"])
def test_every_invoke_is_what_it_is_alone(name, prompts):
    model, paths = model_of(name), zoo.paths(name)
    assert felt(model) == set()
    for port in ("input", "output"):
        got = sweep(model, paths, port, prompts)
        bounded(got, sweep(model, paths, port, prompts, alone=True))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bloom"])
def test_layers_carry_only_who_has_been_edited(name):
    model, paths = model_of(name), zoo.paths(name)
    sweep(model, paths)  # learns shapes, and tries the model
    for port, expected in (("output", [[1], [3], [5]]), ("input", [[3], [5], [7]])):
        with counted(model.dispatch(), paths) as seen:
            sweep(model, paths, port)
        assert list(seen.values()) == expected
    with counted(model.dispatch(), paths) as seen:
        sweep(model, paths, prompts=(A, B))
    assert list(seen.values()) == [[2], [6], [10]]


def test_who_reads_early_is_left_out_later():
    model, paths = model_of("llama"), zoo.paths("llama")
    layers = model.model.layers

    def reads():
        found = []
        with model.trace() as tracer:
            for n in range(4):
                with tracer.invoke(A):
                    layers[0].output[:, n] = 0
                    found.append(layers[1 if n < 3 else 2].output.save())
        return found

    first = reads()
    with counted(model.dispatch(), paths) as seen:
        bounded(reads(), first)
    assert list(seen.values()) == [[1], [4], [1]]


def test_values_flow_between_the_invokes_of_one_input():
    model = model_of("gpt2")
    layers = model.transformer.h

    def chain(**options):
        found = []
        with model.trace(**options) as tracer:
            with tracer.invoke(A):
                value = layers[1].output[:, 2]
                found.append(model.lm_head.output.save())
            for n in (3, 4):
                with tracer.invoke(A):
                    layers[1].output[:, n] = value
                    value = layers[1].output[:, n] * 2
                    found.append(model.lm_head.output.save())
        return found

    bounded(chain(), chain(alone=True))


def test_edits_that_reach_further_than_their_site_stay_in_their_rows():
    """In GPT-2 the residual is the first norm's own input; masks are shared by all layers."""
    model = model_of("gpt2", attn_implementation="eager")
    layers = model.transformer.h

    def edits(**options):
        found = []
        with model.trace(**options) as tracer:
            for n in range(3):
                with tracer.invoke(A):
                    layers[n].ln_1.input[:, 3] = 0
                    found.append(model.lm_head.output.save())
                with tracer.invoke(A):
                    layers[n].attn.inputs[1]["attention_mask"][:, :, :, 1] = -1e9
                    found.append(model.lm_head.output.save())
        return found

    with model.trace(A):
        taken = [key for key in layers[0].attn.inputs[1] if "mask" in key]
    if "attention_mask" not in taken:
        pytest.skip("the mask has another name")
    bounded(edits(), edits(alone=True))


def test_nan_of_one_point_stays_with_it():
    model, paths = model_of("llama"), zoo.paths("llama")
    layers = model.model.layers

    def point(tracer, layer, value):
        layers[layer].output[:, 1] = value
        return model.lm_head.output[:, -1]

    values = [0.0, float("nan"), float("inf"), 1e30]
    found = model.sweep(A, point, layer=LAYERS, value=values)
    for layer in LAYERS:
        with model.trace(A) as tracer:
            expected = point(tracer, layer, 0.0).save()
        bounded(found.values[layer, 0], expected)
    with counted(model.dispatch(), paths) as seen:
        model.sweep(A, point, layer=LAYERS, value=values)
    assert [rows for (rows,) in seen.values()] == [1, 5, 9]


# -- models that must not --------------------------------------------------------------------------


class Sums(torch.nn.Module):
    """A layer whose result knows how many rows there are."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden, *args, **kwargs):
        return self.inner(hidden, *args, **kwargs) + 0.01 * hidden.shape[0]


def test_a_trial_finds_a_model_that_feels_its_rows(monkeypatch):
    """The trial of merging is made to miss it: that of the trunk does not."""
    net: Any = zoo.build("llama")
    net.model.layers[2] = Sums(net.model.layers[2])
    model = weft.LanguageModel(net)
    assert trunks.trial(model._merger(), net, model._facts, set()) is None


def test_a_model_whose_layers_are_not_in_one_list_has_no_stations():
    net: Any = zoo.build("llama")
    model = weft.LanguageModel(net)
    merger = model._merger()
    call = ((), {"input_ids": A.repeat(2, 1), "use_cache": False})
    assert len(merger.stations(call, net)) == 2 * zoo.LAYERS
    net.other = torch.nn.ModuleList([torch.nn.Identity() for _ in LAYERS])
    other = weft.LanguageModel(net)
    assert other._merger().stations(call, net) == ()


def test_where_the_trunk_is_refused_a_plain_batch_runs(monkeypatch):
    model, paths = model_of("gpt2"), zoo.paths("gpt2")
    monkeypatch.setattr(trunks, "trial", lambda *given: None)
    got = sweep(model, paths)
    with counted(model.dispatch(), paths) as seen:
        sweep(model, paths)
    assert list(seen.values()) == [[7]] * 3
    bounded(got, sweep(model, paths, alone=True))
