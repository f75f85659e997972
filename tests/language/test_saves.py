"""What a save brings back: plain tensors, frozen, by name; and what every other handle says."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import weft
from tests.language.hooks import with_hooks
from weft.errors import FailedRunError, NotSavedError, OutsideTraceError, RecordingError
from weft.testing.same import bitwise

KEY = "transformer.h.1.output"


@pytest.fixture
def h(net, ids):
    """What layer 1 gives."""
    return with_hooks(net, {KEY: None}, ids)[KEY]


# Handles


def test_a_handle_becomes_a_plain_tensor(model, ids, h):
    with model.trace(ids):
        got = model.transformer.h[1].output.save()
    assert type(got) is torch.Tensor
    assert got.device.type == "cpu" and not got.requires_grad and not got._is_view()
    bitwise(got, h)


def test_the_receiver_and_the_fresh_handle_both_end_as_tensors(model, ids, h):
    with model.trace(ids):
        receiver = model.transformer.h[1].output
        fresh = receiver.save()
    assert type(receiver) is type(fresh) is torch.Tensor
    bitwise([receiver, fresh], [h, h])


def test_the_receiver_ends_as_the_version_it_saved_last(model, ids, h):
    with model.trace(ids):
        value = model.transformer.h[1].output * 1
        first = value.save()
        value[:] = 5
        second = value.save()
    bitwise(first, h)
    assert (second == 5).all() and (value == 5).all()


def test_other_names_of_a_saved_handle_are_the_same_object(model, ids):
    kept = {}
    with model.trace(ids):
        kept["a"] = value = model.transformer.h[1].output.save()
    assert kept["a"] is value and type(value) is torch.Tensor


def test_a_handle_with_a_weak_reference_is_filled_all_the_same(model, ids, h):
    with model.trace(ids):
        got = model.transformer.h[1].output.save()
        reference = weakref.ref(got)
    assert reference() is got
    bitwise(got + 0, h)
    assert got.shape == h.shape and float(got[0, 0, 0]) == float(h[0, 0, 0])
    assert torch.equal(torch.as_tensor(got.tolist()), torch.as_tensor(h.tolist()))


def test_a_handle_with_a_live_view_is_filled_all_the_same(model, ids, h):
    with model.trace(ids):
        got = model.transformer.h[1].output.save()
        view = got[:, -1]
        other = view.save()
    bitwise([got + 0, other + 0], [h, h[:, -1]])


def test_a_forwarding_handle_works_in_the_next_block(model, ids, h):
    with model.trace(ids):
        got = model.transformer.h[1].output.save()
        reference = weakref.ref(got)
    with model.trace(ids):
        zero = (model.transformer.h[1].output - got).save()
    assert reference() is not None and not zero.any()


def test_a_saved_tensor_is_used_in_the_next_block(model, ids, h):
    with model.trace(ids):
        got = model.transformer.h[1].output.save()
    with model.trace(ids):
        zero = (model.transformer.h[1].output - got).save()
    assert not zero.any()


def test_a_saved_tensor_can_be_changed_and_differentiated_afterwards(model, ids):
    with model.trace(ids):
        got = model.transformer.h[1].output.save()
    got += 1
    leaf = got.clone().requires_grad_()
    leaf.sum().backward()
    assert (leaf.grad == 1).all()


# Names


def test_results_are_there_by_name(model, ids, h):
    with model.trace(ids) as tracer:
        mine = model.transformer.h[1].output.save("mine")
        model.transformer.h[1].output.save(name="other")
    assert list(tracer.results) == ["mine", "other"]
    assert tracer.results["mine"] is mine
    bitwise(tracer.results["other"], h)


def test_a_save_without_a_name_has_its_line_and_an_ordinal(model, ids):
    with model.trace(ids) as tracer:
        kept = [layer.output.save() for layer in model.transformer.h]
    line = next(iter(tracer.results)).removeprefix("line ")
    assert int(line) > 0
    assert list(tracer.results) == [f"line {line}", f"line {line}.2", f"line {line}.3"]
    bitwise(list(tracer.results.values()), kept)


@pytest.mark.parametrize("name", ["twice", "", 3, "<0", "ends+"])
def test_a_name_is_a_plain_text_used_once(model, ids, name):
    with pytest.raises(RecordingError), model.trace(ids):
        model.transformer.h[0].output.save("twice")
        model.transformer.h[1].output.save(name)


# Containers


def test_lists_tuples_and_dicts_are_saved(model, net, ids):
    keys = [f"transformer.h.{i}.output" for i in range(3)]
    with model.trace(ids) as tracer:
        values = [layer.output for layer in model.transformer.h]
        as_list = weft.save(list(values))
        as_tuple = weft.save((values[0] * 1, 7))
        as_dict = weft.save({"a": values[1] * 1, "deep": [values[2] * 1], "n": None}, name="d")
    seen = with_hooks(net, dict.fromkeys(keys), ids)
    h = [seen[key] for key in keys]
    bitwise(as_list, h)
    assert as_tuple[1] == 7 and as_dict["n"] is None
    bitwise([as_tuple[0], as_dict["a"], as_dict["deep"]], [h[0], h[1], [h[2]]])
    assert tracer.results["d"] is as_dict
    assert all(type(tensor) is torch.Tensor for tensor in as_list)


def test_a_list_may_grow_after_it_was_saved(model, net, ids):
    with model.trace(ids):
        kept = weft.save([])
        for layer in model.transformer.h:
            kept.append(layer.output)
    keys = [f"transformer.h.{i}.output" for i in range(3)]
    seen = with_hooks(net, dict.fromkeys(keys), ids)
    bitwise(kept, [seen[key] for key in keys])


def test_a_dict_may_grow_after_it_was_saved(model, ids, h):
    with model.trace(ids):
        kept = weft.save({})
        kept["h"] = model.transformer.h[1].output
    bitwise(kept, {"h": h})


def test_one_value_in_two_places_of_a_list(model, ids, h):
    with model.trace(ids):
        value = model.transformer.h[1].output
        kept = weft.save([value, value])
    bitwise(kept, [h, h])


def test_weft_save_of_one_value(model, ids, h):
    with model.trace(ids):
        got = weft.save(model.transformer.h[1].output, name="h")
    bitwise(got, h)


def test_weft_save_outside_a_block_raises():
    with pytest.raises(OutsideTraceError) as caught:
        weft.save([])
    assert "weft.save([])" in str(caught.value.line)


# Frozen


def test_a_save_before_an_edit_in_place_keeps_the_old_value(subject):
    with subject.model.trace(subject.ids) as tracer:
        value = subject.layer_list[1].output
        saved = value.save()
        value[:, -1] = 0
        tracer.result.logits.save()
    key = f"{subject.paths.layer(1)}.output"
    bitwise(saved, with_hooks(subject.net, {key: None}, subject.ids)[key])


def test_a_list_of_saves_before_an_edit_keeps_the_old_values(model, ids, h):
    with model.trace(ids):
        value = model.transformer.h[1].output
        kept = weft.save([value])
        value[:] = 0
        model.lm_head.output.save()
    bitwise(kept, [h])


class Overwrites(nn.Module):
    """Changes in place what its first part gave."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Identity()

    def forward(self, x):
        h = self.first(x)
        h *= 0
        return self.last(h)


def test_what_the_model_overwrites_later_keeps_its_value():
    net, x = Overwrites(), torch.ones(2, 4)
    model = weft.Model(net)
    with model.trace(x):
        kept = model.first.output.save()
        row = model.first.output[0].save()
        after = (model.first.output * 2).save()
        last = model.last.output.save()
    first = net.first(x).detach()
    bitwise([kept, row, after, last], [first, first[0], first * 2, first * 0])


def test_a_saved_slice_owns_only_its_slice(subject):
    with subject.model.trace(subject.ids):
        last = subject.layer_list[1].output[:, -1].save()
    assert last.untyped_storage().nbytes() == last.numel() * last.element_size()


def test_a_saved_weight_and_constant_are_copies(model, net, ids, v):
    with model.trace(ids):
        weight = model.transformer.ln_f.weight.save()
        constant = (model.transformer.h[0].output.new_tensor([1.0]) + v).save()
    weight += 1
    assert not torch.equal(weight, net.transformer.ln_f.weight)
    bitwise(constant, v + 1)


def test_saved_inputs_are_copies(model, ids):
    mine = ids.clone()
    with model.trace(mine):
        got = model.transformer.wte.input.save()
    got += 1
    assert torch.equal(mine, ids)


def test_two_saves_of_one_site_do_not_share(model, ids):
    with model.trace(ids):
        first = model.transformer.h[1].output.save()
        second = model.transformer.h[1].output.save()
    first.zero_()
    assert second.any()


# What was not saved


def test_a_value_that_was_not_saved_names_its_line_and_the_fix(model, ids):
    with model.trace(ids):
        h = model.transformer.h[1].output  # the line that made it
        model.lm_head.output.save()
    for use in (lambda: h + 1, lambda: h.sum(), lambda: float(h[0, 0, 0]), lambda: h.tolist()):
        with pytest.raises(NotSavedError) as caught:
            use()
        assert "# the line that made it" in str(caught.value.line)
        assert ".save()" in str(caught.value.fix)


def test_a_value_that_was_not_saved_is_refused_in_the_next_block(model, ids):
    with model.trace(ids):
        h = model.transformer.h[1].output
        model.lm_head.output.save()
    with pytest.raises(NotSavedError), model.trace(ids):
        model.transformer.h[1].output + h


def test_the_repr_of_a_lost_value_says_so(model, ids):
    with model.trace(ids):
        h = model.transformer.h[1].output
        model.lm_head.output.save()
    assert "not saved" in repr(h)


def test_saving_after_the_block_raises(model, ids):
    with model.trace(ids):
        h = model.transformer.h[1].output
        model.lm_head.output.save()
    with pytest.raises(NotSavedError):
        h.save()


def test_after_a_failed_block_each_handle_says_why(model, ids):
    with pytest.raises(ZeroDivisionError), model.trace(ids):
        h = model.transformer.h[1].output.save()
        1 / 0
    with pytest.raises(FailedRunError, match="ZeroDivisionError") as caught:
        h + 1
    assert "h = model.transformer.h[1].output.save()" in str(caught.value.line)


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.fails = False

    def forward(self, x):
        x = self.first(x)
        if self.fails:
            raise FileNotFoundError("the model's own error")
        return x


def test_after_a_failed_run_each_handle_says_why_and_the_error_is_the_models_own():
    net = Fails()
    model = weft.Model(net)
    with model.trace(torch.ones(2, 4)):
        model.output.save()
    net.fails = True
    x, failure = torch.ones(2, 4), pytest.raises(FileNotFoundError, match="the model's own error")
    with failure as raised, model.trace(x):
        first = model.first.output.save()
        last = model.output.save()
    assert any(__file__ in note for note in raised.value.__notes__)
    for handle in (first, last):
        with pytest.raises(FailedRunError, match="the model's own error"):
            handle + 1


def test_handles_of_a_scan_say_that_nothing_ran(model, ids):
    with model.scan(ids):
        h = model.transformer.h[1].output.save()
        assert tuple(h.shape) == (1, 9, 32)
    with pytest.raises(FailedRunError, match="only scanned"):
        h + 1


def test_nothing_of_a_run_stays_alive_when_its_handles_are_gone(model, ids):
    with model.trace(ids) as tracer:
        h = model.transformer.h[1].output.save()
    dead = weakref.ref(h)
    del h, tracer
    gc.collect()
    assert dead() is None
