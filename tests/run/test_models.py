"""Real architectures with random weights, against plain hooks."""

from __future__ import annotations

import pytest
import torch

from tests.families import zoo
from tests.run.graphs import Builder
from tests.run.nets import hook_count, hooked, moved, same
from weft.run import run

NAMES = ("gpt2", "llama")
LENGTH = 7


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    model = zoo.build(request.param)
    return model, zoo.paths(request.param)


def ids():
    return torch.randint(0, zoo.VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(2))


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids()).logits


def drawn(model, g, **options):
    return run(g.graph(), g.constants, model, (), {"input_ids": ids()}, **options)


def width(model):
    return model.config.hidden_size


def test_every_layer_is_what_a_hook_sees(case):
    model, paths = case
    shape = (2, LENGTH, width(model))
    g, seen = Builder(), {}
    for layer in range(zoo.LAYERS):
        g.save(f"{layer}", g.read(paths.layer(layer), shape))

    def keep(layer):
        return lambda out: seen.__setitem__(layer, out.clone())

    modules = [model.get_submodule(paths.layer(layer)) for layer in range(zoo.LAYERS)]
    with hooked(*[(m, keep(layer)) for layer, m in enumerate(modules)]):
        model(input_ids=ids())
    saved = drawn(model, g).saved
    for layer in range(zoo.LAYERS):
        assert torch.equal(saved[f"{layer}"], seen[layer])


def test_steering_patching_and_ablation(case):
    model, paths = case
    shape = (2, LENGTH, width(model))
    direction = torch.randn(width(model), generator=torch.Generator().manual_seed(4))
    g = Builder()
    h = g.read(paths.layer(0), shape)
    last = g.item(h, slice(None), -1)
    g.set(h, (slice(None), -1), g.add_(last, g.const(direction)))
    g.fill(paths.layer(0), h)
    k = g.read(paths.layer(1), shape)
    g.set(k, (0, slice(None)), g.item(k, 1))
    g.fill(paths.layer(1), k)
    attention = g.read(paths.attention(2), shape, leaf=(0,))
    g.write(paths.attention(2), g.mul(attention, 0.0), leaf=(0,))
    g.save("logits", g.read("", logits(model), leaf=("logits",)))
    result = drawn(model, g, want_result=True)

    def steer(out):
        out[:, -1] += direction

    def patch(out):
        out[0] = out[1]

    with hooked(
        (model.get_submodule(paths.layer(0)), steer),
        (model.get_submodule(paths.layer(1)), patch),
        (model.get_submodule(paths.attention(2)), lambda out: (out[0] * 0, *out[1:])),
    ):
        expected = model(input_ids=ids()).logits
    same(result.saved["logits"], expected)
    same(result.result.logits, expected)
    moved(expected, logits(model))
    assert hook_count(model) == 0


def test_an_edit_of_the_norms_input_reaches_the_residual(case):
    model, paths = case
    path = f"{paths.layer(1)}." + ("ln_1" if hasattr(model, "transformer") else "input_layernorm")
    shape = (2, LENGTH, width(model))
    place = {"leaf": (0, 0), "port": "inputs"}
    results = []
    for fill in (True, False):
        g = Builder()
        h = g.read(path, shape, **place)
        if fill:
            g.inplace("Tensor.mul_", h, -1.0)
            g.fill(path, h, **place)
        else:
            g.write(path, g.mul(h, -1.0), **place)
        results.append(drawn(model, g, want_result=True).result.logits)
    for result, change in zip(results, (lambda t: t.neg_(), lambda t: -t), strict=True):
        handle = model.get_submodule(path).register_forward_pre_hook(
            lambda m, args, change=change: (change(args[0]),)
        )
        same(result, logits(model))
        handle.remove()
    moved(*results)


def test_a_logit_lens(case):
    model, paths = case
    shape = (2, LENGTH, width(model))
    norm = "transformer.ln_f" if hasattr(model, "transformer") else "model.norm"
    g = Builder()
    for layer in range(zoo.LAYERS):
        h = g.read(paths.layer(layer), shape)
        g.save(f"{layer}", g.apply("lm_head", g.apply(norm, h)))
    found = drawn(model, g)
    same(found.saved[f"{zoo.LAYERS - 1}"], logits(model))
    assert str(found.ended) == f"{paths.layer(zoo.LAYERS - 1)}.output"
    moved(found.saved["0"], logits(model))
