"""The zoo is what its page says: the other tests stand on it."""

import time

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from tests.families import zoo


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_zoo_model_is_small_sharp_and_in_eval_mode(name):
    start = time.perf_counter()
    net = zoo.build(name)
    assert time.perf_counter() - start < 5  # milliseconds; the first also imports
    assert not any(module.training for module in net.modules())
    assert sum(p.numel() for p in net.parameters()) < 100_000
    with torch.no_grad():
        logits = net(torch.tensor(zoo.tokens(9))).logits
    assert logits.shape == (1, 9, zoo.VOCAB)
    assert logits.std() > 0.8


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_the_table_of_paths_is_right(name):
    net, paths = zoo.build(name), zoo.paths(name)
    assert isinstance(net.get_submodule(paths.embedding), nn.Embedding)
    assert net.get_submodule(paths.embedding) is net.get_input_embeddings()
    assert net.get_submodule(paths.head) is net.get_output_embeddings()
    assert zoo.layers(name, net) == (paths.layer_list, zoo.LAYERS)
    fired = []
    for path in [paths.layer(0), paths.attention(0), paths.mlp(0), paths.layer(-1), paths.norm]:
        net.get_submodule(path).register_forward_hook(lambda *_, path=path: fired.append(path))
    net(torch.tensor(zoo.tokens(4)))
    inner = {paths.attention(0), paths.mlp(0)}  # some run side by side, in either order
    assert set(fired[:2]) == inner
    assert fired[2:] == [paths.layer(0), paths.layer(-1), paths.norm]


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_state():
    before = torch.random.get_rng_state()
    first, same, other = zoo.build("llama"), zoo.build("llama"), zoo.build("llama", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [net.model.layers[0].mlp.up_proj.weight for net in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_zoo_model_runs_fake(name):
    net, ids = zoo.build(name), torch.tensor(zoo.tokens(9))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        logits = net(mode.from_tensor(ids)).logits
    assert logits.shape == (1, 9, zoo.VOCAB)


def test_the_tokenizer_of_the_zoo():
    tokenizer = zoo.tokenizer()
    assert tokenizer("w5 w9")["input_ids"] == [1, 5, 9]
    assert zoo.tokenizer(bos=False)("w5 w9")["input_ids"] == [5, 9]
    assert len(tokenizer) <= zoo.VOCAB
