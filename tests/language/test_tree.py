"""The module tree: the model's own names, before and after its weights are there."""

from __future__ import annotations

import pytest
import torch

import weft
from tests.language.hooks import with_hooks
from weft.testing import tiny_path
from weft.testing.same import bitwise


def test_print_shows_the_models_own_tree(model, net):
    assert repr(model) == repr(net)
    assert repr(model.transformer.h[1].mlp) == repr(net.transformer.h[1].mlp)


def test_every_module_of_the_model_is_in_the_tree(subject):
    assert [module.path for module in subject.model.modules()] == [
        path for path, _ in subject.net.named_modules(remove_duplicate=False)
    ]


def test_dir_completes_children_weights_and_sites(model):
    names = dir(model.transformer.h[0].ln_1)
    assert {"weight", "bias", "output", "input", "inputs", "calls"} <= set(names)
    assert {"transformer", "lm_head", "trace", "scan"} <= set(dir(model))
    assert {"attn", "mlp", "ln_1"} <= set(dir(model.transformer.h[0]))


def test_a_list_of_layers_is_a_list(model, ids):
    layers = model.transformer.h
    assert len(layers) == 3
    assert [layer.path for layer in layers] == [f"transformer.h.{i}" for i in range(3)]
    assert layers[-1] is layers[2]
    assert layers[1:] == [layers[1], layers[2]]
    assert next(reversed(layers)).path == "transformer.h.2"


def test_get_walks_a_dotted_path(model):
    assert model.get("transformer.h.1.mlp") is model.transformer.h[1].mlp
    assert model.get("") is model
    assert model.get("transformer.h.1").get("mlp.c_fc") is model.transformer.h[1].mlp.c_fc


def test_get_walks_a_dotted_path_to_a_weight(model, net):
    assert model.get("lm_head.weight") is net.lm_head.weight


def test_plain_attributes_of_a_module_are_the_models(model, net):
    assert model.transformer.h[0].attn.num_heads == net.transformer.h[0].attn.num_heads
    assert model.lm_head.in_features == 32
    assert model.config.n_layer == model.config.num_hidden_layers == net.config.n_layer


def test_the_configuration_is_the_models_own_object(model, net):
    assert model.config is net.config


def test_a_child_called_like_a_site_is_reached_by_get(subjects):
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.output = torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.output(x) + 1

    net = Named()
    model = weft.Model(net)
    with model.trace(torch.ones(1, 2)):
        whole = model.output.save()
        inner = model.get("output").output.save()
    bitwise(whole, inner + 1)


# Weights come when they are needed


@pytest.fixture
def lazy():
    return weft.LanguageModel(tiny_path())


def on_meta(model):
    return all(p.is_meta for p in model._weights.skeleton().parameters())


def test_the_tree_is_there_before_the_weights(lazy, tiny):
    assert on_meta(lazy)
    assert [m.path for m in lazy.modules()] == [m.path for m in tiny.model.modules()]
    assert repr(lazy) == repr(tiny.net)
    assert len(lazy.model.layers) == 4
    assert on_meta(lazy)


def test_a_scan_needs_no_weights(lazy):
    with lazy.scan("The capital of France is") as tracer:
        h = lazy.model.layers[1].output
        shape = tuple(h.shape)
        lazy.lm_head(h * lazy.model.norm.weight).save()
        plan = tracer.plan()
    assert shape == (1, 6, 128)  # with its beginning
    assert plan.saved_bytes > 0
    assert on_meta(lazy)


def test_the_first_run_loads_them(lazy, tiny):
    with lazy.trace(tiny.ids):
        logits = lazy.lm_head.output.save()
    assert not on_meta(lazy)
    bitwise(logits, tiny.baseline)


def test_a_weight_read_outside_a_block_loads_them(lazy, tiny):
    bitwise(lazy.lm_head.weight.detach(), tiny.net.lm_head.weight.detach())


def test_dispatch_loads_them_at_once(tiny):
    model = weft.LanguageModel(tiny_path(), dispatch=True)
    assert not on_meta(model)
    assert type(model.dispatch()) is type(tiny.net)


def test_handles_taken_before_the_weights_stay_good(lazy, tiny):
    layer = lazy.model.layers[1]
    lazy.dispatch()
    with lazy.trace(tiny.ids):
        h = layer.output.save()
    key = "model.layers.1.output"
    bitwise(h, with_hooks(tiny.net, {key: None}, tiny.ids)[key])


def test_shapes_of_a_scan_are_those_of_the_run(subject):
    def shapes(open_block):
        with open_block(subject.ids):
            return [
                (tuple(layer.output.shape), layer.output.dtype, tuple(layer.input.shape))
                for layer in subject.layer_list
            ]

    assert shapes(subject.model.scan) == shapes(subject.model.trace)
