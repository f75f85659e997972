"""Sweeps: every point is what a block of its own gives.

Oracles: plain hooks at each point, and one trace for each point. Points share passes, so float32
is bounded by `weft.testing.same`; half precision is held against hooks on a float32 copy.
"""

from __future__ import annotations

import copy

import pytest
import torch

import weft
from tests.families import zoo
from tests.language.hooks import with_hooks
from weft.errors import InputError, UnknownOptionError
from weft.testing.same import bitwise, bounded, moves

CLEAN, IDS = [torch.tensor([row]) for row in zoo.tokens(7, 7, seed=3)]
LAYERS = range(zoo.LAYERS)
POSITIONS = range(-3, 0)


def hidden(value):
    """A layer's hidden states: some layers return a tuple."""
    return value[0] if isinstance(value, tuple) else value


def by_hand(net, paths, site, place, ids=IDS):
    """Logits after each patch of a clean run's activations, with plain hooks."""
    kept = {}
    for layer in LAYERS:
        key = site(paths, layer)
        kept[layer] = hidden(with_hooks(net, {key: None}, CLEAN)[key])
    rows = []
    for layer in LAYERS:
        for position in POSITIONS:

            def patched(value, layer=layer, position=position):
                place(hidden(value), kept[layer], position)

            rows.append(with_hooks(net, {site(paths, layer): patched}, ids).result.logits)
    return torch.stack(rows).reshape(len(LAYERS), len(POSITIONS), *rows[0].shape)


def put(tensor, clean, position):
    tensor[:, position] = clean[:, position]


SITES = {
    "layer": lambda paths, layer: f"{paths.layer(layer)}.output",
    "mlp": lambda paths, layer: f"{paths.mlp(layer)}.output",
    "attention": lambda paths, layer: f"{paths.attention(layer)}.output",
}


@pytest.mark.parametrize("what", SITES)
def test_a_patching_sweep_is_hooks_at_each_point(subject, what):
    """Layers by positions: clean activations of another prompt."""
    net, model, paths = subject.net, subject.model, subject.paths
    site = SITES[what]

    def tensor(layer):
        return hidden(getattr(model.get(site(paths, layer)[: -len(".output")]), "output"))  # noqa: B009

    with model.trace(CLEAN):
        clean = weft.save([tensor(layer) for layer in LAYERS])

    def patch(tracer, layer, position):
        put(tensor(layer), clean[layer], position)
        return tracer.result.logits

    found = model.sweep(IDS, patch, layer=LAYERS, position=POSITIONS)
    expected = by_hand(net, paths, site, put)
    assert found.dims == ("layer", "position", "dim_0", "dim_1", "dim_2")
    assert found.coords == {"layer": tuple(LAYERS), "position": tuple(POSITIONS)}
    if net.dtype == torch.float32:
        bounded(found.values, expected)
        plain = with_hooks(net, {}, IDS).result.logits.expand_as(expected)
        moves(found.values[..., -1, :], plain[..., -1, :])
    else:
        reference = by_hand(copy.deepcopy(net).float(), paths, site, put)
        bounded(found.values, expected, reference)


def test_every_point_is_a_trace_of_its_own(tiny, v):
    """Named tensors of several sites, before and after the edit, three coordinates."""
    model = tiny.model
    layers = model.model.layers

    def point(tracer, coefficient, layer, where):
        before = layers[0].output[:, 1]
        target = layers[layer].mlp.output if where == "mlp" else layers[layer].input
        target[:, -1] += coefficient * v[: target.shape[-1]].mean()
        return {"before": before, "logits": model.lm_head.output[0, -1], "length": target.shape[1]}

    grid = {"coefficient": [0.0, -2.5], "layer": [3, 1], "where": ["mlp", "input"]}
    found = model.sweep("The capital of France is", point, **grid)
    assert list(found) == ["before", "logits", "length"]
    assert found["length"].shape == (2, 2, 2)
    for coefficient in grid["coefficient"]:
        for layer in grid["layer"]:
            for where in grid["where"]:
                at = {"coefficient": coefficient, "layer": layer, "where": where}
                with model.trace("The capital of France is") as tracer:
                    expected = weft.save(point(tracer, **at))
                for name in ("before", "logits"):
                    bounded(found[name].sel(**at).values, expected[name])
                assert found["length"].sel(**at).item() == expected["length"]


@pytest.mark.parametrize("batch", [1, 2, 5, 100, "auto"])
def test_the_batch_changes_nothing(gpt2, batch):
    model, layers = gpt2.model, gpt2.model.transformer.h

    def point(tracer, layer, position):
        layers[layer].output[:, position] *= 2
        return model.lm_head.output[:, -1]

    found = model.sweep(IDS, point, layer=LAYERS, position=POSITIONS, batch=batch)
    expected = by_hand(
        gpt2.net,
        gpt2.paths,
        SITES["layer"],
        lambda tensor, clean, position: tensor[:, position].mul_(2),
    )
    bounded(found.values, expected[..., -1, :])


def test_alone_is_to_the_bit(gpt2):
    model, layers = gpt2.model, gpt2.model.transformer.h

    def point(tracer, layer):
        layers[layer].output[:, 2] *= 2
        return model.lm_head.output

    found = model.sweep(IDS, point, layer=LAYERS, alone=True)
    for layer in LAYERS:
        with model.trace(IDS) as tracer:
            expected = point(tracer, layer).save()
        bitwise(found.sel(layer=layer).values, expected)


def test_rows_of_a_batch_are_swept_together(gpt2):
    """The input of every point is two prompts of one length."""
    model, layers = gpt2.model, gpt2.model.transformer.h
    ids = torch.cat([IDS, CLEAN])

    def point(tracer, layer):
        layers[layer].output[1, 2] = 0
        return model.lm_head.output[:, -1]

    found = model.sweep(ids, point, layer=LAYERS)
    assert found.shape[:2] == (zoo.LAYERS, 2)
    for layer in LAYERS:
        with model.trace(ids) as tracer:
            expected = point(tracer, layer).save()
        bounded(found.sel(layer=layer).values, expected)


def test_padded_prompts_are_swept(tiny):
    model = tiny.model

    def point(tracer, layer):
        model.model.layers[layer].output[:, -1] *= 3
        assert tracer.lengths == (6, 3)
        return model.lm_head.output[:, -1]

    prompts = ["The capital of France is", "Mary gave"]
    with model.trace(prompts) as tracer:
        if tracer.lengths != (6, 3):
            pytest.skip("the tokenizer has changed")
        model.lm_head.output.save()
    found = model.sweep(prompts, point, layer=[1, 2])
    for layer in (1, 2):
        with model.trace(prompts) as tracer:
            expected = point(tracer, layer).save()
        bounded(found.sel(layer=layer).values, expected)


def test_a_seed_draws_at_each_point_what_a_trace_draws(gpt2):
    model, layers = gpt2.model, gpt2.model.transformer.h

    def point(tracer, layer, scale):
        h = layers[layer].output
        h += scale * torch.randn_like(h)
        return model.lm_head.output[:, -1]

    grid = {"layer": [0, 2], "scale": [0.5, 1.0]}
    found = model.sweep(IDS, point, **grid, seed=5)
    for layer in grid["layer"]:
        for scale in grid["scale"]:
            with model.trace(IDS, seed=5) as tracer:
                expected = point(tracer, layer, scale).save()
            bounded(found.sel(layer=layer, scale=scale).values, expected)


def test_a_point_may_look(gpt2):
    """A branch on a number is taken at each point by itself."""
    model, layers = gpt2.model, gpt2.model.transformer.h

    def point(tracer, layer):
        h = layers[layer].output[:, -1]
        if float(h[0, 0]) > 0:
            h *= 2
        else:
            h.zero_()
        return model.lm_head.output[:, -1]

    found = model.sweep(IDS, point, layer=LAYERS)
    for layer in LAYERS:
        with model.trace(IDS) as tracer:
            expected = point(tracer, layer).save()
        bounded(found.sel(layer=layer).values, expected)


def test_gradients_skips_and_stops_are_as_in_a_trace(gpt2):
    model, layers = gpt2.model, gpt2.model.transformer.h

    def gradient(tracer, layer):
        h = layers[layer].output
        loss = model.lm_head.output[0, -1].logsumexp(0)
        loss.backward()
        return h.grad

    def skipped(tracer, layer):
        layers[layer].skip(layers[layer].input)
        return model.lm_head.output[:, -1]

    def stopped(tracer, layer):
        h = layers[layer].output[:, -1]
        tracer.stop()
        return h

    for point in (gradient, skipped, stopped):
        found = model.sweep(IDS, point, layer=LAYERS)
        for layer in LAYERS:
            with model.trace(IDS) as tracer:
                expected = point(tracer, layer).save()
            bounded(found.sel(layer=layer).values, expected)


def test_any_module_can_be_swept():
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    model, x = weft.Model(net), torch.randn(3, 4)

    def point(tracer, unit):
        model[1].output[:, unit] = 0
        return model[2].output

    found = model.sweep(x, point, unit=range(8))
    for unit in range(8):
        with torch.no_grad():
            h = net[1](net[0](x))
            h[:, unit] = 0
            bounded(found.sel(unit=unit).values, net[2](h))


def test_what_a_function_returns_may_be_there_already(gpt2):
    model = gpt2.model

    def point(tracer, n):
        model.lm_head.output[:, -1].save(f"mine {n}")
        return {"tensor": torch.full((2,), float(n)), "number": n, "truth": n > 1}

    found = model.sweep(IDS, point, n=[1, 2, 3])
    assert found["tensor"].values.tolist() == [[1, 1], [2, 2], [3, 3]]
    assert found["number"].values.tolist() == [1, 2, 3]
    assert found["truth"].values.tolist() == [False, True, True]


def test_coordinates_may_be_tensors_texts_and_tuples(gpt2):
    model, layers = gpt2.model, gpt2.model.transformer.h

    def point(tracer, pair, name, scale):
        layer, position = pair
        assert isinstance(scale, float) and isinstance(name, str)
        h = layers[layer].output if name == "layer" else layers[layer].mlp.output
        h[:, position] *= scale
        return model.lm_head.output[0, -1]

    pairs, scales = [(0, 1), (2, -1)], torch.linspace(0, 2, 3)
    grid = {"pair": pairs, "name": ("layer", "mlp"), "scale": scales}
    found = model.sweep(IDS, point, **grid)
    assert found.shape == (2, 2, 3, zoo.VOCAB)
    with model.trace(IDS) as tracer:
        expected = point(tracer, (2, -1), "mlp", 2.0).save()
    bounded(found.sel(pair=(2, -1), name="mlp", scale=2.0).values, expected)


# -- what is refused -----------------------------------------------------------------------------


def reading(tracer, layer):
    return tracer.result.logits


REFUSED = {
    "no function": ((IDS,), {"layer": LAYERS}, InputError, "function of its points, not Tensor"),
    "no coordinate": ((IDS, reading), {}, InputError, "needs coordinates"),
    "one value": ((IDS, reading), {"layer": 3}, UnknownOptionError, "layer=3 is one value"),
    "no values": ((IDS, reading), {"layer": []}, InputError, "layer has no values"),
    "twice": ((IDS, reading), {"layer": [1, 1]}, InputError, "has 1 twice"),
    "another name": ((IDS, reading), {"layr": LAYERS}, InputError, "argument: 'layer'"),
    "one more": ((IDS, reading), {"layer": LAYERS, "head": [1]}, InputError, "'head'"),
    "dimensions": (
        (IDS, reading),
        {"layer": torch.zeros(2, 2)},
        InputError,
        "a coordinate has one",
    ),
    "unknown": ((IDS, reading), {"layer": LAYERS, "sead": 3}, UnknownOptionError, "'sead'"),
    "batch": ((IDS, reading), {"layer": LAYERS, "batch": 0}, UnknownOptionError, "batch is 'auto'"),
    "grad": ((IDS, reading), {"layer": LAYERS, "grad": True}, UnknownOptionError, "grad=True"),
    "blocking": (
        (IDS, reading),
        {"layer": LAYERS, "blocking": False},
        UnknownOptionError,
        "blocking=False",
    ),
    "seed": ((IDS, reading), {"layer": LAYERS, "seed": [1, 2]}, UnknownOptionError, "seed is"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_sweep_is_refused(model, name):
    inputs, options, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text):
        model.sweep(*inputs, **options)


def test_a_sweep_inside_a_block_is_refused(model):
    with pytest.raises(weft.WeftError, match="inside another block"), model.trace(IDS):
        model.sweep(IDS, reading, layer=LAYERS)
