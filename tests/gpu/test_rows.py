"""Rows of several invokes in one forward: what a model's trial decides on the device's own kernels.

What is shared is within the bound of the trial of what it is alone; `alone=True` is to the bit.
"""

from __future__ import annotations

import pytest
import torch

import weft
from tests.families import zoo
from tests.gpu import place
from tests.gpu.place import DEVICE
from tests.language.hooks import with_hooks
from weft.engine.sharing import shares_steps
from weft.engine.trial import agree
from weft.testing.same import bitwise

pytestmark = pytest.mark.gpu

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
LENGTHS = (33, 7, 48, 12)
KINDS = [("gpt2", "sdpa"), ("gpt2", "eager"), ("llama", "sdpa"), ("llama", "eager")]


def layers_of(model, name):
    return model.get(zoo.paths(name).layer_list)


def hooked(net, name, ids, v):
    """Layer 1 edited at the last position, layer 2 read: by hooks, on this prompt alone."""
    path = zoo.paths(name).layer_list

    def add(h):
        h[:, -1] += v

    seen = with_hooks(net, {f"{path}.1.output": add, f"{path}.2.output": None}, ids)
    return [seen[f"{path}.2.output"], seen.result.logits]


def blocks(model, name, prompts, v, **options):
    found = []
    with model.trace(**options) as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                layers_of(model, name)[1].output[:, -1] += v
                h = layers_of(model, name)[2].output.save()
                found.append([h, model.lm_head.output.save()])
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "attention"), KINDS)
def test_prompts_of_different_lengths(name, attention, dtype, record_property):
    net = place.larger(name, dtype, attn_implementation=attention)
    model = weft.LanguageModel(net)
    v = torch.linspace(-1, 1, 256, dtype=dtype)
    prompts = [place.tokens(length, seed=length) for length in LENGTHS]
    expected = [hooked(net, name, ids.to(DEVICE), v.to(DEVICE)) for ids in prompts]
    refused = model._merger()._refused(net)
    blocks(model, name, prompts, v)
    count = place.forwards(net)
    shared = blocks(model, name, prompts, v)
    rows = count()
    for got, own in zip(shared, expected, strict=True):
        assert all(agree(a, b) for a, b in zip(got, own, strict=True))
    count = place.forwards(net)
    alone = blocks(model, name, prompts, v, alone=True)
    assert count() == [1] * len(LENGTHS)
    bitwise(alone, expected)
    print(f"\n{name} {attention} {dtype}: refused {refused if refused is None else len(refused)},")
    print(f"forwards of {rows} rows; apart {worst(shared, expected):.2g} of the largest")
    assert refused is not None and rows == [4]


def worst(got, expected):
    """The largest difference, as a part of the largest magnitude."""
    pairs = [pair for a, b in zip(got, expected, strict=True) for pair in zip(a, b, strict=True)]
    return max(float((a - b).double().abs().max() / b.double().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompts_that_are_equal(name, dtype):
    """A trunk of one row, which grows."""
    net = place.larger(name, dtype)
    model, ids = weft.LanguageModel(net), place.tokens(24)
    v = torch.linspace(-1, 1, 256, dtype=dtype)

    def steer(tracer, layer, strength):
        layers_of(model, name)[layer].output[:, -1] += strength * v
        return model.lm_head.output[0, -1]

    grid = {"layer": range(4), "strength": [-2.0, 0.5, 3.0]}
    count = place.forwards(net)
    model.sweep(ids, steer, **grid)
    count()
    count = place.forwards(net)
    shared = model.sweep(ids, steer, **grid).values
    rows = count()
    alone = model.sweep(ids, steer, alone=True, **grid).values
    expected = []
    for layer in grid["layer"]:
        for strength in grid["strength"]:

            def add(h, strength=strength):
                h[:, -1] += strength * v.to(DEVICE)

            key = f"{zoo.paths(name).layer_list}.{layer}.output"
            expected.append(with_hooks(net, {key: add}, ids.to(DEVICE)).result.logits[0, -1])
    expected = torch.stack(expected).unflatten(0, (4, 3))
    assert shared.device == expected.device
    assert agree(shared, expected)
    bitwise(alone, expected)
    felt = model._merger()._felt(net, model._merger()._refused(net) or set())
    gap = worst([[shared]], [[expected]])
    print(f"\n{name} {dtype}: trunk {felt is not None}, rows {rows}; apart {gap:.2g}")
    assert len(rows) == 1 and felt is not None


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_every_family_in_float32(name):
    """Small models; what their trials admit is what it is alone."""
    net = place.net(name)
    model, paths = weft.LanguageModel(net), zoo.paths(name)
    prompts = [place.tokens(n, seed=n) for n in (9, 4, 14)]
    found = []
    with model.trace() as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                found.append(model.get(paths.mlp(1)).output.save())
    for got, ids in zip(found, prompts, strict=True):
        key = f"{paths.mlp(1)}.output"
        expected = with_hooks(net, {key: None}, ids.to(DEVICE))[key]
        one, other = (t[0] if isinstance(t, tuple) else t for t in (got, expected))
        assert agree(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_steps_of_generations(name, dtype):
    net = place.larger(name, dtype)
    model = weft.LanguageModel(net)
    prompts = [place.tokens(n, seed=n) for n in (6, 17, 6, 9)]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    verdict = shares_steps(net, model._merger()._facts)

    def once(alone):
        found = []
        with model.generate(**options, alone=alone) as tracer:
            for ids in prompts:
                with tracer.invoke(ids):
                    logits = []
                    for _ in tracer.iter[:]:
                        logits.append(model.lm_head.output[:, -1])
                    found.append((tracer.result.save(), weft.save(logits)))
        return found

    once(False)
    count = place.forwards(net)
    shared = once(False)
    rows = count()
    alone = once(True)
    for number, ids in enumerate(prompts):
        with torch.no_grad():
            expected = net.generate(ids.to(DEVICE), **options)
        assert torch.equal(alone[number][0], expected)
        for one, other in zip(shared[number][1], alone[number][1], strict=True):
            assert agree(one, other)
            if not torch.equal(one.argmax(-1), other.argmax(-1)):
                break  # two tokens as likely: they go apart
        else:
            assert torch.equal(shared[number][0], expected)
    print(f"\n{name} {dtype}: steps {verdict}, rows {rows}")
    assert verdict and len(rows) < 4 * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_go_from_prompt_to_prompt(dtype):
    net = place.larger("llama", dtype)
    model = weft.LanguageModel(net)
    clean, corrupt = place.tokens(12, seed=1), place.tokens(12, seed=2)
    with model.trace() as tracer:
        with tracer.invoke(clean):
            h = model.model.layers[1].output[:, -1]
        with tracer.invoke(corrupt):
            model.model.layers[1].output[:, -1] = h
            logits = model.lm_head.output.save()
    kept = with_hooks(net, {"model.layers.1.output": None}, clean.to(DEVICE))

    def put(h):
        h[:, -1] = kept["model.layers.1.output"][:, -1]

    expected = with_hooks(net, {"model.layers.1.output": put}, corrupt.to(DEVICE)).result.logits
    assert agree(logits, expected)
