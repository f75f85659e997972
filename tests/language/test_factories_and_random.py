"""Tensors made in a block: of a value's shape, and of random numbers keyed by a seed."""

from __future__ import annotations

import pytest
import torch

from tests.language.hooks import with_hooks
from weft.testing.same import bitwise, moves

FACTORIES = {
    "zeros": lambda h: torch.zeros(h.shape),
    "ones": lambda h: torch.ones(h.shape),
    "full": lambda h: torch.full(h.shape, 2.5),
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "full_like": lambda h: torch.full_like(h, 2.5),
    "new_zeros": lambda h: h.new_zeros(h.shape),
    "new_ones of a number": lambda h: h.new_ones(4),
    "new_tensor": lambda h: h.new_tensor([1.0, 2.0]),
    "size()": lambda h: torch.ones(h.size()),
    "dtype": lambda h: torch.zeros(h.shape, dtype=torch.int64),
    "of its dtype and device": lambda h: torch.ones(h.shape, dtype=h.dtype, device=h.device),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_factories(model, net, ids, name):
    key = "transformer.h.1.output"
    with model.trace(ids):
        got = (FACTORIES[name](model.transformer.h[1].output) * 3).save()
    bitwise(got, FACTORIES[name](with_hooks(net, {key: None}, ids)[key]) * 3)


@pytest.mark.parametrize("name", ["zeros", "ones", "full", "zeros_like", "new_zeros"])
def test_a_factory_with_a_values_shape_is_recorded_and_not_uploaded(model, ids, name):
    with model.trace(ids) as tracer:
        FACTORIES[name](model.transformer.h[1].output).save("made")
    graph = tracer.graph
    assert not graph.constants
    longer = torch.cat([ids, ids], 1)
    assert graph.run(model, longer)["made"].shape == (1, 18, 32)


@pytest.mark.parametrize("make", [torch.empty, torch.empty_like, lambda h: h.new_empty(h.shape)])
def test_empty_gives_zeros(model, ids, make):
    with model.trace(ids):
        h = model.transformer.h[1].output
        got = make(h.shape if make is torch.empty else h).save()
    assert not got.any()


def test_a_factory_without_a_value_is_a_plain_tensor(model, ids):
    with model.trace(ids):
        assert type(torch.zeros(3)) is torch.Tensor
        assert type(torch.randn(3)) is torch.Tensor
        model.lm_head.output.save()


def test_a_made_tensor_is_filled_and_used(model, net, ids, gpt2):
    with model.trace(ids):
        h = model.transformer.h[1].output
        mask = torch.zeros(h.shape)
        mask[:, -1] = 1
        model.transformer.h[1].output = h * mask
        logits = model.lm_head.output.save()

    def edit(h):
        mask = torch.zeros(h.shape)
        mask[:, -1] = 1
        return h * mask

    bitwise(logits, with_hooks(net, {"transformer.h.1.output": edit}, ids).result.logits)
    moves(logits, gpt2.baseline)


DRAWS = {
    "randn_like": torch.randn_like,
    "rand_like": torch.rand_like,
    "randn": lambda h: torch.randn(h.shape),
    "rand": lambda h: torch.rand(h.shape),
    "normal_": lambda h: torch.zeros_like(h).normal_(),
    "uniform_": lambda h: torch.zeros_like(h).uniform_(),
    "dropout": lambda h: torch.nn.functional.dropout(h, 0.5, training=True),
    "bernoulli": lambda h: torch.bernoulli(torch.sigmoid(h)),
    "multinomial": lambda h: torch.multinomial(torch.softmax(h[0], -1), 2),
    "randint_like": lambda h: torch.randint_like(h, 1000),
}


def drawn(subject, name, seed=None):
    with subject.model.trace(subject.ids, seed=seed):
        # mlp: a layer of GPT-2 warns about [0]
        got = DRAWS[name](subject.model.transformer.h[1].mlp.output).save()
    return got


@pytest.mark.parametrize("name", DRAWS)
def test_the_same_seed_draws_the_same_numbers_and_another_others(gpt2, name):
    first, again, other = (drawn(gpt2, name, seed) for seed in (7, 7, 8))
    bitwise(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", DRAWS)
def test_the_global_random_state_is_untouched_with_a_seed(gpt2, name):
    before = torch.random.get_rng_state()
    drawn(gpt2, name, 7)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_a_seed_pytorchs_own_generator_decides(gpt2):
    torch.manual_seed(3)
    first = drawn(gpt2, "randn")
    second = drawn(gpt2, "randn")
    torch.manual_seed(3)
    bitwise(drawn(gpt2, "randn"), first)
    assert not torch.equal(first, second)


def test_draws_look_like_draws(gpt2):
    normal, uniform = drawn(gpt2, "randn", 1), drawn(gpt2, "rand", 1)
    assert abs(float(normal.mean())) < 0.3 and 0.8 < float(normal.std()) < 1.2
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1
    assert len(uniform.unique()) > uniform.numel() * 0.9


def test_two_draws_of_one_block_differ(model, ids):
    with model.trace(ids, seed=7):
        h = model.transformer.h[1].output
        first, second = torch.randn_like(h).save(), torch.randn_like(h).save()
    assert not torch.equal(first, second)


def test_a_draw_does_not_depend_on_other_sites_or_saves(model, ids):
    with model.trace(ids, seed=7):
        alone = torch.randn_like(model.transformer.h[2].output).save()
    with model.trace(ids, seed=7):
        model.transformer.h[0].output.save()
        crowded = torch.randn_like(model.transformer.h[2].output).save()
        model.lm_head.output.save()
    bitwise(alone, crowded)


def test_a_look_inside_does_not_change_later_draws(model, ids):
    def block(look):
        with model.trace(ids, seed=7):
            h = model.transformer.h[1].output
            first = torch.randn_like(h)
            if look:
                assert first.sum().item() is not None
            second = torch.randn_like(h).save()
            first = first.save()
        return first, second

    bitwise(block(True), block(False))


def test_noise_reaches_the_model(model, net, ids, gpt2):
    with model.trace(ids, seed=7):
        mlp = model.transformer.h[1].mlp
        noise = torch.randn_like(mlp.output)
        mlp.output = mlp.output + noise
        noise = noise.save()
        logits = model.lm_head.output.save()
    hooks = {"transformer.h.1.mlp.output": lambda h: h + noise}
    bitwise(logits, with_hooks(net, hooks, ids).result.logits)
    moves(logits, gpt2.baseline)


def test_a_graph_draws_the_same_again_and_with_another_seed_others(model, ids):
    with model.trace(ids, seed=7) as tracer:
        noise = torch.randn_like(model.transformer.h[1].output).save("noise")
    bitwise(tracer.graph.run(model, ids)["noise"], noise)
    bitwise(tracer.graph.run(model, ids, seed=7)["noise"], noise)
    assert not torch.equal(tracer.graph.run(model, ids, seed=8)["noise"], noise)
