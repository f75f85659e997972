"""Modules in a block: the model's own applied to values, and the user's own of any kind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.language.hooks import with_hooks
from weft.errors import ReadOnlyError, RecordingError
from weft.testing.same import bitwise, bounded, moves


def test_a_logit_lens_over_all_layers(subject):
    norm, head = subject.model.get(subject.paths.norm), subject.model.lm_head
    with subject.model.trace(subject.ids) as tracer:
        lens = [head(norm(layer.output)).save() for layer in subject.layer_list]
        tracer.result.logits.save()
    keys = [f"{subject.paths.layer_list}.{i}.output" for i in range(len(subject.layer_list))]
    seen = with_hooks(subject.net, dict.fromkeys(keys), subject.ids)
    real_norm = subject.net.get_submodule(subject.paths.norm)
    with torch.no_grad():
        expected = [subject.net.lm_head(real_norm(seen[key])) for key in keys]
    bitwise(lens, expected)


def test_applying_a_module_fires_no_site(model, net, ids):
    """An edit of the head's output acts on the model's own call of it, not on the lens."""
    with model.trace(ids):
        lens = model.lm_head(model.transformer.ln_f(model.transformer.h[0].output)).save()
        model.lm_head.output[:] = 0
        logits = model.lm_head.output.save()
    key = "transformer.h.0.output"
    h = with_hooks(net, {key: None}, ids)[key]
    with torch.no_grad():
        bitwise(lens, net.lm_head(net.transformer.ln_f(h)))
    assert not logits.any()


@pytest.mark.parametrize("path", ["transformer.h.0.mlp", "transformer.ln_f", "transformer.wte"])
def test_modules_of_several_kinds(model, net, ids, path):
    with model.trace(ids):
        given = (
            model.transformer.wte.input if path.endswith("wte") else model.transformer.h[1].output
        )
        got = model.get(path)(given).save()
    key = "transformer.h.1.output"
    given = ids if path.endswith("wte") else with_hooks(net, {key: None}, ids)[key]
    with torch.no_grad():
        bitwise(got, net.get_submodule(path)(given))


def test_a_module_applied_to_a_later_layer_edits_nothing_before_it(model, net, ids, gpt2):
    with model.trace(ids):
        model.transformer.h[2].output = model.transformer.h[0].mlp(model.transformer.h[2].output)
        logits = model.lm_head.output.save()
    with torch.no_grad():
        hooks = {"transformer.h.2.output": lambda h: net.transformer.h[0].mlp(h)}
        bitwise(logits, with_hooks(net, hooks, ids).result.logits)
    moves(logits, gpt2.baseline)


def test_a_module_that_cannot_take_the_argument_is_refused_by_its_path(model, ids):
    with pytest.raises(RecordingError, match=r"lm_head"), model.trace(ids):
        model.lm_head(model.transformer.h[0].output[..., :31])


def test_outside_a_block_a_module_is_the_real_one(model, net):
    h = torch.ones(1, 2, 32)
    bitwise(model.lm_head(h), net.lm_head(h))


# Weights


def test_a_weight_is_read_in_a_block(subject):
    with subject.model.trace(subject.ids):
        h = subject.layer_list[-1].output
        got = (h @ subject.model.lm_head.weight.T).save()
        kept = subject.model.lm_head.weight[:3].save()
    key = f"{subject.paths.layer_list}.{len(subject.layer_list) - 1}.output"
    h = with_hooks(subject.net, {key: None}, subject.ids)[key]
    weight = subject.net.lm_head.weight.detach()
    bitwise([got, kept], [h @ weight.T, weight[:3]])


WRITES = {
    "in place": lambda w: w.mul_(2),
    "through a view": lambda w: w[0].zero_(),
    "item": lambda w: w.__setitem__(0, 0.0),
    "transposed": lambda w: w.T.add_(1),
}


@pytest.mark.parametrize("name", WRITES)
def test_weights_are_read_only(model, ids, name):
    with model.trace(ids), pytest.raises(ReadOnlyError) as caught:  # in the block, not in the run
        WRITES[name](model.lm_head.weight)
    assert "lm_head.weight" in caught.value.message
    assert __file__ in str(caught.value.line)


def test_a_weight_is_not_changed_through_a_site(model, ids):
    """`wte(x)` may be a view of no weight, but a saved weight written into a site is."""
    with model.trace(ids):
        model.transformer.h[1].output[:, 0] = model.lm_head.weight[5]
        model.transformer.h[1].output[:, 0] *= 2
        model.lm_head.output.save()


def test_weights_are_real_outside_a_block(model, net):
    assert model.lm_head.weight is net.lm_head.weight
    assert model.transformer.h[0].ln_1.bias is net.transformer.h[0].ln_1.bias


# The user's own


class SparseAutoencoder(nn.Module):
    def __init__(self, width, features):
        super().__init__()
        self.encoder = nn.Linear(width, features)
        self.decoder = nn.Linear(features, width, bias=False)
        self.threshold = nn.Parameter(torch.tensor(0.1))
        self.register_buffer("mean", torch.linspace(-1, 1, width))

    def encode(self, x):
        features = self.encoder(x - self.mean)
        return features * (features > self.threshold)

    def forward(self, x):
        return self.decoder(self.encode(x)) + self.mean


@pytest.fixture
def sae():
    torch.manual_seed(0)
    return SparseAutoencoder(32, 64)


@torch.no_grad()
def test_a_foreign_module_is_recorded_as_operations(model, net, ids, gpt2, sae):
    with model.trace(ids):
        mlp = model.transformer.h[1].mlp
        features = sae.encode(mlp.output).save()
        mlp.output = sae(mlp.output)
        logits = model.lm_head.output.save()
    kept = []

    def edit(h):
        kept.append(sae.encode(h))
        return sae(h)

    hooks = {"transformer.h.1.mlp.output": edit}
    bitwise(logits, with_hooks(net, hooks, ids).result.logits)
    bitwise(features, kept[0])
    moves(logits, gpt2.baseline)


LAYERS = {
    "linear": lambda: nn.Linear(32, 8),
    "mlp": lambda: nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 2)),
    "layer norm": lambda: nn.LayerNorm(32),
    "rms norm": lambda: nn.RMSNorm(32),
    "conv": lambda: nn.Conv1d(9, 4, 3),
    "attention": lambda: _SelfAttention(),
    "dropout in eval": lambda: nn.Dropout(0.5),
    "softmax": lambda: nn.Softmax(-1),
    "bilinear": lambda: _Twice(nn.Bilinear(32, 32, 4)),
    "batch norm in eval": lambda: nn.BatchNorm1d(9),
    "unfold": lambda: nn.Flatten(),
}


class _SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x)[0]


class _Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x, x)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_layers_of_every_kind(model, net, ids, name):
    torch.manual_seed(0)
    layer = LAYERS[name]().eval()
    key = "transformer.h.1.output"
    with model.trace(ids):
        got = layer(model.transformer.h[1].output)
        got = (got[0] if isinstance(got, tuple) else got).save()
    expected = layer(with_hooks(net, {key: None}, ids)[key])
    bitwise(got, expected[0] if isinstance(expected, tuple) else expected)


@torch.no_grad()
def test_a_module_that_has_a_faster_way_for_plain_tensors(model, net, ids):
    """Recorded it takes the way of plain operations: the same up to rounding."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 16, batch_first=True).eval()
    key = "transformer.h.1.output"
    with model.trace(ids):
        got = layer(model.transformer.h[1].output).save()
    bounded(got, layer(with_hooks(net, {key: None}, ids)[key]))


def test_helper_functions_just_work(model, net, ids):
    def attention_entropy(scores):
        probabilities = F.softmax(scores, -1)
        return -(probabilities * probabilities.clamp(min=1e-9).log()).sum(-1)

    def normalised(x, eps=1e-5):
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + eps)

    key = "transformer.h.1.output"
    with model.trace(ids):
        h = model.transformer.h[1].output
        got = attention_entropy(normalised(h) @ h.transpose(-1, -2)).save()
        loss = F.cross_entropy(model.lm_head.output[0, :-1], ids[0, 1:]).save()
    seen = with_hooks(net, {key: None}, ids)
    h = seen[key]
    bitwise(got, attention_entropy(normalised(h) @ h.transpose(-1, -2)))
    bitwise(loss, F.cross_entropy(seen.result.logits[0, :-1], ids[0, 1:]))


def test_functions_with_several_results(model, net, ids):
    key = "transformer.h.1.output"
    with model.trace(ids):
        h = model.transformer.h[1].output
        values, indices = h.topk(3, -1)
        best = h.max(-1)
        low, high = torch.aminmax(h)
        got = [one.save() for one in (values, indices, best.values, best.indices, low, high)]
    h = with_hooks(net, {key: None}, ids)[key]
    best = h.max(-1)
    bitwise(got, [*h.topk(3, -1), best.values, best.indices, *torch.aminmax(h)])
