"""What is inside of models on a GPU: every module, half precision, and the device's own kernels."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import weft
from tests.families import zoo
from tests.gpu import place
from tests.gpu.place import DEVICE
from tests.language.hooks import with_hooks
from weft.testing.same import bitwise

pytestmark = pytest.mark.gpu

IDS = place.tokens(9)
ON = IDS.to(DEVICE)
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_every_module_of_every_family(name):
    """Shapes were foreseen without running: as the real kernels of the device give them."""
    if name == "opt" and VERSION < (5, 23):
        pytest.skip("before transformers 5.23, OPT's layers take a mask only where it is needed")
    net = place.net(name)
    model = weft.LanguageModel(net)
    paths = [path for path, _ in net.named_modules() if path]
    with model.trace(IDS) as tracer:
        cache = tracer.cache(inputs=True)
        logits = model.output.logits.save()
    seen = with_hooks(net, {f"{path}.output": None for path in paths}, ON)
    found = 0
    for path in cache:
        if f"{path}.output" in seen and not path.endswith("rotary_emb"):  # twice, in some
            bitwise(tensors(cache[path].output), tensors(seen[f"{path}.output"]))
            found += 1
    assert found > 20
    bitwise(logits, seen.result.logits)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [one for one in items if isinstance(one, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_half_precision(name, dtype):
    net = place.larger(name, dtype)
    model, paths = weft.LanguageModel(net), zoo.paths(name)
    v = torch.linspace(-1, 1, 256, dtype=dtype)
    with model.trace(IDS):
        model.get(paths.layer_list)[1].output[:, -1] += v
        h = model.get(paths.layer_list)[2].output.save()
        logits = model.lm_head.output.save()
    on, keys = v.to(DEVICE), [f"{paths.layer_list}.{n}.output" for n in (1, 2)]

    def add(h):
        h[:, -1] += on

    seen = with_hooks(net, {keys[0]: add, keys[1]: None}, ON)
    bitwise(h, seen[keys[1]])
    bitwise(logits, seen.result.logits)


def test_learning_by_running_leaves_the_devices_stream_alone():
    """A forward that cannot be faked is run once to be known; what it draws is drawn anew."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            steps = 1 + int(self.lin.weight.abs().sum() > 0)  # only real weights say
            for _ in range(steps):
                x = nn.functional.dropout(self.lin(x), 0.5, training=True)
            return x

    net = Odd().to(DEVICE)
    model = weft.Model(net)
    x = torch.ones(2, 4, device=DEVICE)
    torch.manual_seed(5)
    with torch.no_grad():
        expected = net(x)
    torch.manual_seed(5)
    with model.trace(x):
        got = model.output.save()
    bitwise(got, expected)


def test_any_module_with_libraries_of_the_device():
    """Convolutions and recurrent layers have kernels of their own."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    net = net.eval().to(DEVICE)
    model, x = weft.Model(net), torch.randn(2, 3, 8, 8)
    with model.trace(x):
        model[0].output[:, 0] = 0
        got = model.output.save()

    def zero(h):
        h[:, 0] = 0

    bitwise(got, with_hooks(net, {"0.output": zero}, x.to(DEVICE)).result)
    gru = nn.GRU(4, 8).to(DEVICE)
    recurrent, x = weft.Model(gru), torch.randn(5, 2, 4)
    with recurrent.trace(x):
        states = recurrent.output[0].save()
    with torch.no_grad():
        bitwise(states, gru(x.to(DEVICE))[0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_inside_forwards(attention, dtype):
    net = place.larger("llama", dtype, attn_implementation=attention)
    model = weft.LanguageModel(net)
    call = model.model.layers[1].self_attn.source.attention_interface_0
    with model.trace(IDS):
        given = call.output[0].save()
        call.output[0][:, -1] *= 2
        logits = model.lm_head.output.save()
    key = "model.layers.1.self_attn.o_proj.input"

    def double(h):
        h = h.clone()
        h[:, -1] *= 2
        return h

    bitwise(given.flatten(2), with_hooks(net, {key: None}, ON)[key])
    bitwise(logits, with_hooks(net, {key: double}, ON).result.logits)
    if attention == "eager":
        with model.trace(IDS):
            pattern = call.source.softmax_0.output.save()
        with torch.no_grad():
            weights = net(ON, output_attentions=True).attentions[1]
        bitwise(pattern.to(dtype), weights)


@pytest.mark.parametrize("batch", [1, 3])
def test_attention_kernels_of_the_device(batch):
    """Outputs of its kernels have strides that other devices do not know."""
    net = place.larger("gpt2", torch.bfloat16, attn_implementation="sdpa")
    model, ids = weft.LanguageModel(net), place.tokens(*[33] * batch)
    inner = model.transformer.h[1].attn.source.attention_interface_0
    inner = inner.source.scaled_dot_product_attention_0
    with model.trace(ids):
        mixed = inner.output
        swapped = mixed.transpose(1, 2).reshape(batch, 33, -1).save()
        mixed[:, 0] = 0
        logits = model.lm_head.output.save()
    key = "transformer.h.1.attn.c_proj.input"

    def zero(h):
        h = h.clone()
        h[..., :64] = 0
        return h

    bitwise(swapped, with_hooks(net, {key: None}, ids.to(DEVICE))[key])
    bitwise(logits, with_hooks(net, {key: zero}, ids.to(DEVICE)).result.logits)
