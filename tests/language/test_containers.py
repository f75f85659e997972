"""Tuples, lists, dicts and ModelOutputs at a site: real ones, whose assignments are writes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import weft
from tests.language.hooks import with_hooks
from weft.errors import RecordingError
from weft.testing.same import bitwise, moves


def test_structures_are_the_models_own_kinds(model, net, ids):
    with model.trace(ids) as tracer:
        attention = model.transformer.h[1].attn.output
        result = tracer.result
        args, kwargs = model.transformer.h[1].inputs
        assert isinstance(attention, tuple) and len(attention) == 2 and attention[1] is None
        assert isinstance(args, tuple) and isinstance(kwargs, dict)
        kind = type(net(ids))
        assert isinstance(result, kind) and result.logits is result["logits"]
        assert next(iter(result)) == "logits" and result.to_tuple()[0] is result.logits
        result.logits.save()


def test_a_tuple_unpacks(subject):
    path = subject.paths.attention(1)
    with subject.model.trace(subject.ids):
        out, *rest = subject.model.get(path).output
        out = out.save()
    key = f"{path}.output"
    seen = with_hooks(subject.net, {key: None}, subject.ids)[key]
    bitwise(out, seen[0])
    assert len(rest) == len(seen) - 1


@pytest.mark.parametrize("index", [0, -2], ids=["from the front", "from the back"])
def test_an_item_of_a_tuple_is_assigned(model, net, ids, gpt2, index):
    with model.trace(ids):
        model.transformer.h[1].attn.output[index] = model.transformer.h[0].mlp.output
        logits = model.lm_head.output.save()
    kept = []
    hooks = {
        "transformer.h.0.mlp.output": lambda h: kept.append(h.clone()),
        "transformer.h.1.attn.output": lambda out: (kept[0], out[1]),
    }
    bitwise(logits, with_hooks(net, hooks, ids).result.logits)
    moves(logits, gpt2.baseline)


def test_a_whole_structure_is_saved(model, net, ids):
    with model.trace(ids) as tracer:
        result = model.output.save("result")
        attention = model.transformer.h[1].attn.output.save()
        args, kwargs = model.transformer.h[1].mlp.inputs.save()
        model.transformer.h[1].attn.output[0][:] = 0  # what was saved stays
        model.lm_head.output[:] = 1
    names = ["attn.output", "mlp.inputs"]
    keys = [f"transformer.h.1.{name}" for name in names]
    seen = with_hooks(net, dict.fromkeys(keys), ids)
    bitwise(attention[0], seen[keys[0]][0])
    assert type(attention[0]) is torch.Tensor and attention[1] is None
    assert isinstance(result, type(net(ids))) and tracer.results["result"] is result
    assert bool((result.logits == 1).all()) and type(result["logits"]) is torch.Tensor
    assert args[0].shape == seen[keys[1]][0][0].shape and kwargs == {}


def test_an_item_of_a_tuple_is_edited_in_place(model, net, ids, gpt2):
    with model.trace(ids):
        model.transformer.h[1].attn.output[0][:, -1] = 0
        logits = model.lm_head.output.save()

    def edit(out):
        out[0][:, -1] = 0

    bitwise(logits, with_hooks(net, {"transformer.h.1.attn.output": edit}, ids).result.logits)
    moves(logits[:, -1], gpt2.baseline[:, -1])


def test_augmented_assignment_to_an_item(model, net, ids, gpt2):
    with model.trace(ids):
        model.transformer.h[1].attn.output[0] *= 1.5
        logits = model.lm_head.output.save()

    def edit(out):
        out[0].mul_(1.5)

    bitwise(logits, with_hooks(net, {"transformer.h.1.attn.output": edit}, ids).result.logits)
    moves(logits, gpt2.baseline)


@pytest.mark.parametrize("how", ["attribute", "key", "whole"])
def test_a_model_output_is_assigned(model, net, ids, how):
    with model.trace(ids) as tracer:
        result = tracer.result
        if how == "attribute":
            result.logits = result.logits * 2
        elif how == "key":
            result["logits"] = result["logits"] * 2
        else:
            result.logits[:] = result.logits * 2
        logits = tracer.result.logits.save()
        mine = result.logits.save()
    with torch.no_grad():
        expected = net(ids).logits * 2
    bitwise([logits, mine], [expected, expected])


def test_keyword_arguments_are_assigned(llama):
    with llama.model.trace(llama.ids):
        inputs = llama.model.model.layers[1].self_attn.inputs
        cos, sin = inputs[1]["position_embeddings"]
        inputs[1]["position_embeddings"] = (cos * 0 + 1, sin * 0)
        logits = llama.model.lm_head.output.save()

    def edit(inputs):
        args, kwargs = inputs
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), sin * 0)}

    hooks = {"model.layers.1.self_attn.inputs": edit}
    bitwise(logits, with_hooks(llama.net, hooks, llama.ids).result.logits)
    moves(logits, llama.baseline)


REFUSED = {
    "a new key": lambda inputs, out: inputs[1].__setitem__("fresh", out[0]),
    "del": lambda inputs, out: inputs[1].__delitem__("attention_mask"),
    "pop": lambda inputs, out: inputs[1].pop("attention_mask"),
    "update": lambda inputs, out: inputs[1].update(attention_mask=None),
    "clear": lambda inputs, out: inputs[1].clear(),
    "a tensor where None is": lambda inputs, out: out.__setitem__(1, out[0]),
    "beyond the end": lambda inputs, out: out.__setitem__(7, out[0]),
    "None where a tensor is": lambda inputs, out: out.__setitem__(0, None),
    "a slice": lambda inputs, out: out.__setitem__(slice(0, 1), (out[0],)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_raises(model, ids, gpt2, name):
    with pytest.raises(RecordingError) as caught, model.trace(ids):
        REFUSED[name](model.transformer.h[1].inputs, model.transformer.h[1].attn.output)
    assert caught.value.line and __file__ in str(caught.value.line)


def test_a_new_attribute_of_a_model_output_raises(model, ids):
    with pytest.raises(RecordingError), model.trace(ids) as tracer:
        tracer.result.fresh = 1


def test_assigning_what_is_there_already_is_no_edit(model, ids):
    with model.trace(ids) as tracer:
        out = model.transformer.h[1].attn.output
        out[0] = out[0]
        out[1] = None
        model.lm_head.output.save()
    assert "write" not in str(tracer.graph)


def test_a_cache_is_shown_and_refuses_reads(model, ids):
    with pytest.raises(RecordingError, match="Cache"), model.trace(ids, use_cache=True) as tracer:
        tracer.result.past_key_values.layers


# Other containers


@dataclasses.dataclass
class Both:
    hidden: torch.Tensor
    scale: float


class Gives(nn.Module):
    """Returns `make(x)`."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


class Uses(nn.Module):
    """Takes `inner`'s structure apart with `use`."""

    def __init__(self, make, use):
        super().__init__()
        self.inner = Gives(make)
        self.use = use

    def forward(self, x):
        return self.use(self.inner(x))


X = torch.arange(6.0).reshape(2, 3)


def test_a_list_item_is_assigned():
    net = Uses(lambda x: [x, x + 1], lambda both: both[0] + both[1])
    model = weft.Model(net)
    with model.trace(X):
        model.inner.output[1] = model.inner.output[0] * 10
        got = model.output.save()
    bitwise(got, X + X * 10)


@pytest.mark.parametrize("method", ["append", "extend", "pop", "clear", "reverse", "sort"])
def test_a_list_keeps_its_length(method):
    model = weft.Model(Uses(lambda x: [x, x + 1], lambda both: both[0]))
    with pytest.raises(RecordingError), model.trace(X):
        getattr(model.inner.output, method)(*([[]] if method in ("append", "extend") else []))


def test_an_attribute_of_a_dataclass_is_assigned():
    net = Uses(lambda x: Both(x, 2.0), lambda both: both.hidden * both.scale)
    model = weft.Model(net)
    with model.trace(X):
        both = model.inner.output
        assert isinstance(both, Both) and both.scale == 2.0
        both.hidden = both.hidden + 1
        got = model.output.save()
    bitwise(got, (X + 1) * 2.0)


def test_nested_containers_are_assigned_where_they_stand():
    net = Uses(lambda x: {"a": (x, [x + 1]), "n": 3}, lambda d: d["a"][0] + d["a"][1][0] * d["n"])
    model = weft.Model(net)
    with model.trace(X):
        out = model.inner.output
        out["a"][1][0] = out["a"][0] * 5
        got = model.output.save()
    bitwise(got, X + X * 5 * 3)


def test_the_models_own_containers_are_not_changed():
    mine = [X, X + 1]
    net = Uses(lambda x: mine, lambda both: both[0] + both[1])
    model = weft.Model(net)
    with model.trace(X):
        model.inner.output[0] = model.inner.output[0] * 0
        got = model.output.save()
    bitwise(got, X + 1)
    assert mine[0] is X
