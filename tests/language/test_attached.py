"""Modules of the user's own in the tree, and their inside. The oracle calls them in plain hooks."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import weft
from tests.language.autograd import gradients
from tests.language.hooks import hook_count, with_hooks
from weft.errors import (
    LateEditError,
    NotReachedError,
    OutsideTraceError,
    RecordingError,
    StaleHandleError,
    WriteMismatchError,
)
from weft.testing.same import bitwise


class Autoencoder(nn.Module):
    """Sparse features of `[..., d]`."""

    def __init__(self, width: int = 32, features: int = 48) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.encoder = nn.Linear(width, features)
        self.act = nn.ReLU()
        self.decoder = nn.Linear(features, width)

    def encode(self, x):
        return self.act(self.encoder(x))

    def forward(self, x, scale=1.0):
        return self.decoder(self.encode(x)) * scale


@pytest.fixture
def sae():
    made = Autoencoder()
    yield made
    assert hook_count(made) == 0


@pytest.fixture
def layer(model, sae):
    """The first layer, with the autoencoder in the tree."""
    block = model.transformer.h[0]
    block.sae = sae
    yield block
    if "sae" in block._attached:
        del block.sae


LAYER = "transformer.h.0.output"
LOGITS = "lm_head.output"


def hooked(net, ids, change):
    """What plain hooks see where `change` stands at the layer's output."""
    with torch.no_grad():
        return with_hooks(net, {LAYER: change, LOGITS: None}, ids)


# -- calls ---------------------------------------------------------------------------------------


def test_a_call_is_recorded_where_it_stands(model, net, ids, layer, sae):
    expected = hooked(net, ids, lambda h: sae(h, scale=0.5))
    with model.trace(ids):
        layer.output = layer.sae(layer.output, scale=0.5)
        logits = model.lm_head.output.save()
    bitwise(logits, expected[LOGITS])


def test_its_inside_is_read_by_path(model, net, ids, layer, sae):
    h = with_hooks(net, {LAYER: None}, ids)[LAYER]
    inner = {"encoder.output": None, "act.inputs": None, "decoder.input": None}
    expected = with_hooks(sae, inner, h)
    with model.trace(ids):
        result = layer.sae(layer.output).save()
        features = layer.sae.encoder.output.save()
        (given,), nothing = layer.sae.act.inputs
        given = given.save()
        sparse = layer.sae.decoder.input.save()
        whole, taken = layer.sae.output.save(), layer.sae.input.save()
    bitwise(result, expected.result)
    bitwise(features, expected["encoder.output"])
    bitwise(given, expected["act.inputs"][0][0])
    bitwise(sparse, expected["decoder.input"])
    bitwise(whole, expected.result)
    bitwise(taken, h)
    assert nothing == {}


def test_a_part_or_a_method_can_be_called_by_itself(model, net, ids, layer, sae):
    h = with_hooks(net, {LAYER: None}, ids)[LAYER]
    with model.trace(ids):
        part = layer.sae.encoder(layer.output).save()
        again = layer.sae.encoder.output.save()
        method = layer.sae.encode(layer.output).save()
    with torch.no_grad():
        bitwise(part, sae.encoder(h))
        bitwise(again, sae.encoder(h))
        bitwise(method, sae.encode(h))


def test_everything_else_is_the_modules_own(model, layer, sae):
    assert layer.sae.encoder.weight is sae.encoder.weight
    assert list(layer.sae.parameters()) == list(sae.parameters())
    assert layer.sae.path == "transformer.h.0.sae"
    assert repr(layer.sae) == repr(sae)
    assert model.get("transformer.h.0.sae.encoder").path == "transformer.h.0.sae.encoder"
    assert "sae" in dir(layer) and "encoder" in dir(layer.sae)


def test_outside_a_block_it_is_the_module(layer, sae):
    x = torch.ones(2, 32)
    bitwise(layer.sae(x).detach(), sae(x).detach())


def test_lists_of_parts_have_indices(model, net, ids):
    chain = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.ModuleDict({"a": nn.Linear(32, 4)})["a"])
    block = model.transformer.h[1]
    block.probe = chain
    try:
        h = with_hooks(net, {"transformer.h.1.output": None}, ids)["transformer.h.1.output"]
        with model.trace(ids):
            block.probe(block.output)
            first, last = block.probe[0].output.save(), block.probe[-1].output.save()
        with torch.no_grad():
            bitwise(first, chain[0](h))
            bitwise(last, chain(h))
        assert len(block.probe) == 3 and len(list(block.probe)) == 3
        assert [part.path for part in block.probe[1:]] == [
            "transformer.h.1.probe.1",
            "transformer.h.1.probe.2",
        ]
    finally:
        del block.probe


def test_without_hook_nothing_is_seen(model, ids, layer):
    with model.trace(ids), pytest.raises(NotReachedError, match="has not been called"):
        layer.sae(layer.output, hook=False)
        _ = layer.sae.encoder.output


# -- edits ---------------------------------------------------------------------------------------


def test_edits_inside_reach_the_result(model, net, ids, layer, sae):
    seen = {}

    def change(h):
        e = sae.encoder(h)
        seen["before"] = e.clone()
        e[:, -1, 3] = 7
        e *= 2
        seen["after"] = e.clone()
        return sae.decoder(sae.act(e) + 1)

    expected = hooked(net, ids, change)
    with model.trace(ids):
        result = layer.sae(layer.output)
        before = layer.sae.encoder.output.save()
        layer.sae.encoder.output[:, -1, 3] = 7
        layer.sae.encoder.output *= 2
        after = layer.sae.encoder.output.save()
        layer.sae.act.output = layer.sae.act.output + 1
        layer.output = result
        logits = model.lm_head.output.save()
    bitwise(before, seen["before"])
    bitwise(after, seen["after"])
    bitwise(logits, expected[LOGITS])


def test_one_handle_can_be_edited_twice(model, net, ids, layer, sae):
    def change(h):
        e = sae.encoder(h)
        e[..., 0] = 1
        e[..., 1:3] -= 2
        return sae.decoder(sae.act(e))

    expected = hooked(net, ids, change)
    with model.trace(ids):
        result = layer.sae(layer.output)
        features = layer.sae.encoder.output
        features[..., 0] = 1
        features[..., 1:3] -= 2
        layer.output = result
        logits = model.lm_head.output.save()
    bitwise(logits, expected[LOGITS])


def test_what_it_is_given_can_be_replaced(model, net, ids, layer, sae, v):
    expected = hooked(net, ids, lambda h: sae(h + v))
    with model.trace(ids):
        result = layer.sae(layer.output)
        layer.sae.input = layer.sae.input + v
        layer.output = result
        logits = model.lm_head.output.save()
    bitwise(logits, expected[LOGITS])


def test_a_client_tensor_can_stand_inside(model, net, ids, layer, sae):
    features = torch.linspace(-1, 1, 48).expand(1, 9, 48).clone()
    expected = hooked(net, ids, lambda h: sae.decoder(features))
    with model.trace(ids):
        result = layer.sae(layer.output)
        layer.sae.act.output = features
        layer.output = result
        logits = model.lm_head.output.save()
    bitwise(logits, expected[LOGITS])


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.linear = nn.Linear(32, 32)

    def forward(self, x):
        a = self.linear(x)
        return {"sum": a + self.linear(a), "parts": (a, None)}


def test_structures_and_parts_that_are_called_twice(model, net, ids):
    block, module = model.transformer.h[2], Nested()
    block.extra = module
    h = with_hooks(net, {"transformer.h.2.output": None}, ids)["transformer.h.2.output"]
    with torch.no_grad():
        first = module.linear(h)
        second = module.linear(first) * 3
    try:
        with model.trace(ids):
            result = block.extra(block.output)
            block.extra.linear.calls[1].output *= 3
            total = result["sum"].save()
            part = block.extra.output["parts"][0].save()
            with pytest.raises(RecordingError, match="called 2 times"):
                _ = block.extra.linear.output
            with pytest.raises(WriteMismatchError, match="is not a tensor"):
                block.extra.output = {"sum": total, "parts": (part, part)}
            with pytest.raises(WriteMismatchError, match="another structure"):
                block.extra.output = total
        bitwise(total, first + second)
        bitwise(part, first)
        assert len(list(module.parameters())) == 2
    finally:
        del block.extra


# -- gradients and training ----------------------------------------------------------------------


def test_its_parameters_get_gradients(model, net, ids, layer, sae):
    twin = Autoencoder()
    gradients(
        net,
        [LAYER],
        lambda out: out.logits[0, -1].logsumexp(-1),
        ids,
        change={LAYER: lambda h: twin(h)},
    )
    with model.trace(ids):
        layer.output = layer.sae(layer.output)
        model.lm_head.output[0, -1].logsumexp(-1).backward()
    for mine, theirs in zip(sae.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_its_inside_has_gradients(model, net, ids, layer, sae):
    kept = {}

    def change(h):
        kept["e"] = sae.encoder(h)
        kept["e"].retain_grad()
        return sae.decoder(sae.act(kept["e"]))

    gradients(net, [LAYER], lambda out: out.logits.square().sum(), ids, change={LAYER: change})
    expected = kept["e"].grad
    sae.zero_grad()
    with model.trace(ids):
        layer.output = layer.sae(layer.output)
        loss = model.lm_head.output.square().sum()
        loss.backward()
        got = layer.sae.encoder.output.grad.save()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    sae.zero_grad()


def test_it_is_trained_like_any_module(model, net, ids, layer, sae):
    twin = Autoencoder()
    h = with_hooks(net, {LAYER: None}, ids)[LAYER]
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1)
    mine = torch.optim.SGD(sae.parameters(), lr=0.1)
    for _ in range(3):
        theirs.zero_grad()
        (twin(h) - h).square().mean().backward()
        theirs.step()
        mine.zero_grad()
        with model.trace(ids):
            given = layer.output
            (layer.sae(given) - given).square().mean().backward()
        mine.step()
    for one, other in zip(sae.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


# -- several calls -------------------------------------------------------------------------------


def test_several_calls_are_counted(model, net, ids, layer, sae):
    outputs = with_hooks(net, {LAYER: None, "transformer.h.1.output": None}, ids)
    with model.trace(ids):
        layer.sae(layer.output)
        layer.sae(model.transformer.h[1].output)
        calls = layer.sae.encoder.calls
        got = [call.output.save() for call in calls]
        with pytest.raises(RecordingError, match="called 2 times"):
            _ = layer.sae.output
    with torch.no_grad():
        bitwise(got[0], sae.encoder(outputs[LAYER]))
        bitwise(got[1], sae.encoder(outputs["transformer.h.1.output"]))


def test_two_places_of_one_module_are_two(model, net, ids, layer, sae):
    other = model.transformer.h[1]
    other.sae = sae
    outputs = with_hooks(net, {LAYER: None, "transformer.h.1.output": None}, ids)
    try:
        with model.trace(ids):
            layer.sae(layer.output)
            other.sae(other.output)
            first, second = layer.sae.act.output.save(), other.sae.act.output.save()
        with torch.no_grad():
            bitwise(first, sae.encode(outputs[LAYER]))
            bitwise(second, sae.encode(outputs["transformer.h.1.output"]))
    finally:
        del other.sae


def test_each_invoke_sees_its_own_call(model, net, ids, layer, sae):
    longer = torch.cat([ids, ids[:, :2]], 1)
    with model.trace() as tracer:
        with tracer.invoke(ids):
            layer.sae(layer.output)
            first = layer.sae.encoder.output.save()
        with tracer.invoke(longer):
            layer.sae(layer.output)
            second = layer.sae.encoder.output.save()
    for got, given in ((first, ids), (second, longer)):
        with torch.no_grad():
            h = with_hooks(net, {LAYER: None}, given)[LAYER]
            torch.testing.assert_close(got, sae.encoder(h), rtol=0, atol=1e-5)


def test_threads_do_not_see_each_other(model, ids, layer, sae):
    found, barrier = {}, threading.Barrier(4)

    def work(number):
        barrier.wait()
        for _ in range(5):
            with model.trace(ids, alone=True):
                layer.sae(layer.output * number)
                got = layer.sae.encoder.output.save()
        found[number] = got

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with model.trace(ids):
        h = layer.output.save()
    for number in range(4):
        with torch.no_grad():
            bitwise(found[number], sae.encoder(h * number))


# -- the tree ------------------------------------------------------------------------------------


def test_the_model_is_not_touched(model, net, ids, layer):
    names = [name for name, _ in net.named_modules()]
    assert not any("sae" in name for name in names)
    with model.trace(ids):
        layer.output = layer.sae(layer.output)
        model.output.logits.save()
    assert [name for name, _ in net.named_modules()] == names
    assert [path for path, _ in model.named_modules()] == names


def test_it_can_be_replaced_and_taken_out(model, ids, layer):
    other = Autoencoder()
    layer.sae = other
    assert layer.sae.encoder.weight is other.encoder.weight
    del layer.sae
    with pytest.raises(AttributeError, match=r"has no 'transformer\.h\.0\.sae'"):
        _ = layer.sae
    with pytest.raises(AttributeError, match="no module of your own"):
        del layer.sae


@pytest.mark.parametrize("name", ["mlp", "output", "get", "modules", "forward", "_mine", "train"])
def test_a_name_that_is_taken_is_refused(model, sae, name):
    kind = OutsideTraceError if name == "output" else RecordingError
    with pytest.raises(kind):
        setattr(model.transformer.h[0], name, sae)


def test_only_modules_are_added(model):
    with pytest.raises(AttributeError, match="no site 'scale' to assign to"):
        model.transformer.h[0].scale = 3


def test_its_attributes_are_not_assigned_through_the_tree(layer):
    with pytest.raises(AttributeError, match="a module of your own"):
        layer.sae.scale = 3


def test_a_cache_holds_modules_of_the_model_only(model, ids, layer):
    with pytest.raises(weft.errors.UnknownPathError), model.trace(ids) as tracer:
        tracer.cache(modules=[layer.sae])


def test_a_models_own_module_applied_to_a_value_shows_no_inside(model, ids):
    with model.trace(ids), pytest.raises(RecordingError, match="hook=True"):
        model.transformer.ln_f(model.transformer.h[0].output, hook=True)


# -- refusals ------------------------------------------------------------------------------------


def test_nothing_is_left_for_the_next_block(model, ids, layer):
    with model.trace(ids):
        layer.sae(layer.output)
    with model.trace(ids), pytest.raises(NotReachedError, match="has not been called"):
        _ = layer.sae.encoder.output
    with pytest.raises(OutsideTraceError):
        _ = layer.sae.encoder.output


def test_an_edit_after_the_first_use_is_refused(model, ids, layer):
    refused = pytest.raises(RecordingError, match="what its call gave without the edit")
    with refused as caught, model.trace(ids):
        result = layer.sae(layer.output)
        layer.output = result
        layer.sae.encoder.output[:] = 0
    assert "between the call and the first use" in str(caught.value)


class Remembering(Autoencoder):
    """Keeps a value of its own, as modules that are looked at do."""

    def forward(self, x):
        self.last = self.encode(x)
        return self.decoder(self.last)


def test_what_an_edit_has_replaced_cannot_be_used_by_another_way(model, ids, layer):
    layer.sae = module = Remembering()
    refused = pytest.raises(RecordingError, match="what its call gave without the edit")
    with refused, model.trace(ids):
        layer.sae(layer.output)
        old = module.last
        layer.sae.encoder.output[:] = 0
        old.save()


def test_an_edit_made_of_what_comes_later_is_refused(model, ids, layer):
    with pytest.raises(LateEditError, match="makes later"), model.trace(ids):
        layer.sae(layer.output)
        layer.sae.encoder.output = layer.sae.act.output * 2


def test_what_was_given_is_not_edited_in_place(model, ids, layer):
    with pytest.raises(RecordingError, match="is not made inside the call"), model.trace(ids):
        layer.sae(layer.output)
        layer.sae.input[:] = 0


def test_an_edit_after_the_argument_has_changed_is_refused(model, ids, layer):
    refused = pytest.raises(RecordingError, match="what its call was given has changed")
    with refused, model.trace(ids):
        h = layer.output
        layer.sae(h)
        h[:] = 0
        layer.sae.encoder.output[:] = 0


def test_a_stale_handle_is_refused(model, ids, layer):
    with pytest.raises(StaleHandleError, match="before the edit"), model.trace(ids):
        layer.sae(layer.output)
        old = layer.sae.encoder.output
        layer.sae.encoder.output = old * 2
        old[:] = 0


def test_another_shape_is_refused(model, ids, layer):
    with pytest.raises(WriteMismatchError, match=r"holds float32\[1, 9, 48\]"), model.trace(ids):
        layer.sae(layer.output)
        layer.sae.encoder.output = torch.zeros(1, 9, 47)


class InPlace(Autoencoder):
    """Changes its argument."""

    def forward(self, x):
        x -= 1
        return self.decoder(self.encode(x))


def test_a_module_that_changes_its_argument_runs_but_has_no_edits_inside(model, net, ids, layer):
    layer.sae = module = InPlace()
    expected = hooked(net, ids, module)
    with model.trace(ids):
        layer.output = layer.sae(layer.output)
        features = layer.sae.encoder.output.save()
        logits = model.lm_head.output.save()
    bitwise(logits, expected[LOGITS])
    assert features.shape == (1, 9, 48)
    with pytest.raises(RecordingError, match="it would happen twice"), model.trace(ids):
        layer.sae(layer.output)
        layer.sae.encoder.output[:] = 0


class Passing(nn.Module):
    def forward(self, x):
        return x


def test_a_result_that_is_the_argument_itself_is_not_edited(model, ids, layer):
    layer.sae = Passing()
    with pytest.raises(RecordingError, match="gives something else"), model.trace(ids):
        layer.sae(layer.output)
        layer.sae.input = layer.sae.input * 2


class Failing(nn.Module):
    def forward(self, x):
        raise KeyError("mine")


def test_a_modules_own_error_arrives_as_itself(model, ids, layer):
    layer.sae = module = Failing()
    with pytest.raises(KeyError, match="mine"), model.trace(ids):
        layer.sae(layer.output)
    assert hook_count(module) == 0
