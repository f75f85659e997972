"""Replacing what a site holds, and editing it in place: the model goes on as with a hook."""

from __future__ import annotations

import pytest
import torch

from tests.language.hooks import with_hooks
from weft.errors import LateEditError, WriteMismatchError
from weft.testing.same import bitwise, moves


def double_last(h):
    h[:, -1] *= 2


def direction(tensor):
    return torch.linspace(-2, 2, tensor.shape[-1], dtype=tensor.dtype)


# Replacing


def test_a_layer_is_replaced(subject):
    with subject.model.trace(subject.ids) as tracer:
        layer = subject.layer_list[1]
        layer.output = layer.output * 2 + direction(layer.output)
        logits = tracer.result.logits.save()
    hooks = {f"{subject.paths.layer(1)}.output": lambda h: h * 2 + direction(h)}
    bitwise(logits, with_hooks(subject.net, hooks, subject.ids).result.logits)
    moves(logits, subject.baseline)


def test_one_tensor_of_a_tuple_is_replaced(subject):
    with subject.model.trace(subject.ids) as tracer:
        attention = subject.model.get(subject.paths.attention(1))
        attention.output[0] = attention.output[0] + direction(attention.output[0])
        logits = tracer.result.logits.save()

    def edit(output):
        return output[0] + direction(output[0]), *output[1:]

    hooks = {f"{subject.paths.attention(1)}.output": edit}
    bitwise(logits, with_hooks(subject.net, hooks, subject.ids).result.logits)
    moves(logits, subject.baseline)


def test_a_whole_structure_is_replaced(model, net, ids, gpt2):
    with model.trace(ids):
        out, weights = model.transformer.h[1].attn.output
        model.transformer.h[1].attn.output = (out * 3, weights)
        logits = model.lm_head.output.save()
    hooks = {"transformer.h.1.attn.output": lambda out: (out[0] * 3, out[1])}
    bitwise(logits, with_hooks(net, hooks, ids).result.logits)
    moves(logits, gpt2.baseline)


def test_an_input_is_replaced(subject):
    path = subject.paths.mlp(1)
    with subject.model.trace(subject.ids) as tracer:
        mlp = subject.model.get(path)
        mlp.input = mlp.input * 3
        logits = tracer.result.logits.save()
    hooks = {f"{path}.input": lambda h: h * 3}
    bitwise(logits, with_hooks(subject.net, hooks, subject.ids).result.logits)
    moves(logits, subject.baseline)


def test_an_input_that_comes_by_keyword_is_replaced(llama):
    with llama.model.trace(llama.ids):
        attention = llama.model.model.layers[1].self_attn
        attention.inputs[1]["hidden_states"] = attention.inputs[1]["hidden_states"] * 3
        logits = llama.model.lm_head.output.save()
    hooks = {"model.layers.1.self_attn.input": lambda h: h * 3}
    bitwise(logits, with_hooks(llama.net, hooks, llama.ids).result.logits)
    moves(logits, llama.baseline)


def test_the_token_ids_are_replaced(model, net, ids, gpt2):
    other = torch.flip(ids, [1])
    with model.trace(ids):
        model.transformer.wte.input = other
        logits = model.lm_head.output.save()
    bitwise(logits, with_hooks(net, {"transformer.wte.input": lambda _: other}, ids).result.logits)
    moves(logits, gpt2.baseline)


def test_the_models_own_result_is_replaced(model, ids):
    with model.trace(ids) as tracer:
        tracer.result.logits = tracer.result.logits * 0
        logits = tracer.result.logits.save()
    assert not logits.any()


def test_replacing_one_value_by_another_sites(subject):
    first, second = subject.paths.mlp(0), subject.paths.mlp(2)
    with subject.model.trace(subject.ids) as tracer:
        subject.model.get(second).output = subject.model.get(first).output
        logits = tracer.result.logits.save()
    kept = []
    hooks = {
        f"{first}.output": lambda h: kept.append(h.clone()),
        f"{second}.output": lambda _: kept[0],
    }
    bitwise(logits, with_hooks(subject.net, hooks, subject.ids).result.logits)
    moves(logits, subject.baseline)


def test_replacing_a_site_by_its_own_value_changes_no_bit(subject):
    with subject.model.trace(subject.ids) as tracer:
        for layer in subject.layer_list:
            layer.output = layer.output.clone()
        logits = tracer.result.logits.save()
    bitwise(logits, subject.baseline)


def test_a_replacement_is_seen_by_later_reads_and_keeps_the_earlier(model, ids):
    with model.trace(ids):
        before = model.transformer.h[1].output.save()
        model.transformer.h[1].output = before * 2
        after = model.transformer.h[1].output.save()
    bitwise(after, before * 2)


def test_floats_are_cast_to_the_sites_dtype(subjects):
    half = subjects("llama", torch.bfloat16)
    new = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    with half.model.trace(half.ids) as tracer:
        half.model.model.layers[1].output = new
        read = half.model.model.layers[1].output.save()
        logits = tracer.result.logits.save()
    hooks = {"model.layers.1.output": lambda h: new.to(h.dtype)}
    bitwise(logits, with_hooks(half.net, hooks, half.ids).result.logits)
    bitwise(read, new.to(torch.bfloat16))


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1, 9, 31),
        torch.zeros(9, 32),
        torch.zeros(32),
        torch.zeros(1, 9, 32, dtype=torch.int64),
        torch.zeros(1, 9, 32, dtype=torch.bool),
        (torch.zeros(1, 9, 32),),
        0.0,
        None,
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)
def test_another_shape_dtype_or_structure_is_refused(model, ids, value):
    with pytest.raises(WriteMismatchError) as caught, model.trace(ids):
        model.transformer.h[1].output = value
    assert "transformer.h.1.output" in str(caught.value)
    assert "model.transformer.h[1].output = value" in str(caught.value.line)


def test_a_tuple_written_over_a_bigger_tuple_is_refused(model, ids):
    with pytest.raises(WriteMismatchError), model.trace(ids):
        model.transformer.h[1].attn.output = (torch.zeros(1, 9, 32),)


# Editing in place


def test_the_last_position_is_edited_in_place(subject):
    with subject.model.trace(subject.ids) as tracer:
        subject.layer_list[1].output[:, -1] *= 2
        logits = tracer.result.logits.save()
    hooks = {f"{subject.paths.layer(1)}.output": double_last}
    bitwise(logits, with_hooks(subject.net, hooks, subject.ids).result.logits)
    moves(logits[:, -1], subject.baseline[:, -1])


EDITS = {
    "h[:] = 0": lambda h, v: h.__setitem__(slice(None), 0),
    "h[:, 2] = v": lambda h, v: h.__setitem__((slice(None), 2), v),
    "h[:, -1] += v": lambda h, v: h.__setitem__((slice(None), -1), h[:, -1] + v),
    "h.mul_(2)": lambda h, v: h.mul_(2),
    "h.add_(v, alpha=3)": lambda h, v: h.add_(v, alpha=3),
    "h.copy_(v)": lambda h, v: h.copy_(v.expand_as(h)),
    "h.zero_()": lambda h, v: h.zero_(),
    "h.fill_(0.5)": lambda h, v: h.fill_(0.5),
    "h.clamp_(-1, 1)": lambda h, v: h.clamp_(-0.1, 0.1),
    "h.masked_fill_": lambda h, v: h.masked_fill_(h > 0, 0.0),
    "h[h > 0] = 0": lambda h, v: h.__setitem__(h > 0, 0.0),
    "h[..., mask]": lambda h, v: h.__setitem__((..., v > 0), 0.0),
    "h.index_copy_": lambda h, v: h.index_copy_(1, torch.tensor([1, 3]), v.expand(1, 2, 32)),
    "h.index_add_": lambda h, v: h.index_add_(1, torch.tensor([1, 3]), v.expand(1, 2, 32)),
    "h.scatter_": lambda h, v: h.scatter_(2, torch.zeros(1, 9, 4, dtype=torch.int64), 7.0),
    "h.relu_": lambda h, v: torch.relu_(h),
    "h.T": lambda h, v: h.view(9, 32).T.mul_(2),
}


@pytest.mark.parametrize("name", EDITS)
def test_in_place_edits_of_every_kind(model, net, ids, v, gpt2, name):
    with model.trace(ids):
        EDITS[name](model.transformer.h[1].output, v)
        logits = model.lm_head.output.save()
    hooks = _returning_none({"transformer.h.1.output": lambda h: EDITS[name](h, v)})
    expected = with_hooks(net, hooks, ids).result.logits
    bitwise(logits, expected)
    moves(logits, gpt2.baseline)


def _returning_none(hooks):
    def quiet(edit):
        return lambda h: [edit(h), None][1]

    return {key: quiet(edit) for key, edit in hooks.items()}


V = torch.linspace(0.5, 3, 32)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "truediv", "pow"])
def test_augmented_assignment_to_a_site_is_an_edit_in_place(model, net, ids, gpt2, op):
    def edit(holder):
        if op == "add":
            holder.output += V
        elif op == "sub":
            holder.output -= V
        elif op == "mul":
            holder.output *= V
        elif op == "truediv":
            holder.output /= V
        else:
            holder.output **= 2

    class Holder:
        def __init__(self, output):
            self.output = output

    with model.trace(ids) as tracer:
        edit(model.transformer.h[1].mlp)
        logits = model.lm_head.output.save()
    hooks = _returning_none({"transformer.h.1.mlp.output": lambda h: edit(Holder(h))})
    bitwise(logits, with_hooks(net, hooks, ids).result.logits)
    moves(logits, gpt2.baseline)
    assert "fill" in str(tracer.graph)


def test_an_input_is_edited_in_place(subject):
    path = subject.paths.mlp(1)
    with subject.model.trace(subject.ids) as tracer:
        subject.model.get(path).input[:, -1] *= -3
        logits = tracer.result.logits.save()

    def edit(h):
        h[:, -1] *= -3

    hooks = {f"{path}.input": edit}
    bitwise(logits, with_hooks(subject.net, hooks, subject.ids).result.logits)
    moves(logits[:, -1], subject.baseline[:, -1])


def test_reads_before_and_after_an_edit_differ(subject):
    with subject.model.trace(subject.ids):
        before = subject.layer_list[1].output.save()
        subject.layer_list[1].output[:, -1] = 0
        after = subject.layer_list[1].output.save()
    key = f"{subject.paths.layer(1)}.output"
    bitwise(before, with_hooks(subject.net, {key: None}, subject.ids)[key])
    assert not after[:, -1].any()
    bitwise(after[:, :-1], before[:, :-1])


def test_an_edit_of_a_result_is_no_edit_of_the_site(model, ids, gpt2):
    with model.trace(ids):
        h = model.transformer.h[1].output * 1.0
        h[:] = 0
        h.save()
        logits = model.lm_head.output.save()
    bitwise(logits, gpt2.baseline)


def test_a_handle_sees_its_own_edits_and_older_handles_do_not(model, ids):
    with model.trace(ids):
        old, new = model.transformer.h[1].output, model.transformer.h[1].output
        new[:, 0] = 5
        old, new = old.save(), new.save()
    assert (new[:, 0] == 5).all()
    assert (old[:, 0] != 5).any()


def test_edits_of_one_site_add_up_in_program_order(model, net, ids, v):
    with model.trace(ids):
        mlp = model.transformer.h[1].mlp
        mlp.output[:, 1] += v
        mlp.output = mlp.output * 2
        mlp.output[:, 1] -= v
        mlp.output[:, 2] = mlp.output[:, 1]
        logits = model.lm_head.output.save()

    def edit(h):
        h[:, 1] += v
        h = h * 2
        h[:, 1] -= v
        h[:, 2] = h[:, 1]
        return h

    hooks = {"transformer.h.1.mlp.output": edit}
    bitwise(logits, with_hooks(net, hooks, ids).result.logits)


def test_one_site_read_and_edited_through_many_handles(subject):
    path = subject.paths.layer(1)
    with subject.model.trace(subject.ids) as tracer:
        layer = subject.model.get(path)
        before = layer.output.save()
        layer.output[:, 1] *= 3
        between = layer.output.save()
        layer.output[:, 2] = layer.output[:, 1]
        layer.output.mul_(1.5)
        after = layer.output.save()
        logits = tracer.result.logits.save()
    kept = []

    def edit(h):
        kept.append(h.clone())
        h[:, 1] *= 3
        kept.append(h.clone())
        h[:, 2] = h[:, 1]
        h.mul_(1.5)

    seen = with_hooks(subject.net, {f"{path}.output": edit}, subject.ids)
    bitwise([before, between, after], [*kept, seen[f"{path}.output"]])
    bitwise(logits, seen.result.logits)
    moves(logits, subject.baseline)


def test_edits_of_many_layers(subject):
    with subject.model.trace(subject.ids) as tracer:
        for layer in subject.layer_list:
            layer.output[:, 0] *= 1.5
        logits = tracer.result.logits.save()

    def edit(h):
        h[:, 0] *= 1.5

    count = len(subject.layer_list)
    hooks = {f"{subject.paths.layer_list}.{i}.output": edit for i in range(count)}
    bitwise(logits, with_hooks(subject.net, hooks, subject.ids).result.logits)
    moves(logits, subject.baseline)


def test_the_input_of_the_user_is_never_changed(model, ids):
    mine = ids.clone()
    with model.trace(mine):
        model.transformer.wte.input[:] = 5
        logits = model.lm_head.output.save()
    assert torch.equal(mine, ids)
    with model.trace(torch.full_like(ids, 5)):
        fives = model.lm_head.output.save()
    bitwise(logits, fives)


def test_a_late_write_and_a_late_fill_are_refused(model, ids):
    with pytest.raises(LateEditError), model.trace(ids):
        model.transformer.h[0].output = model.transformer.h[2].output
    with pytest.raises(LateEditError), model.trace(ids):
        model.transformer.h[0].output[:] = model.transformer.h[2].output


def test_an_edit_without_effect_on_what_is_saved_is_warned_about(model, ids):
    from weft import UnusedEditWarning

    with pytest.warns(UnusedEditWarning, match="no effect") as caught, model.trace(ids):
        model.transformer.h[0].output.save()
        model.transformer.h[2].output[:] = 0
    assert "model.transformer.h[2].output[:] = 0" in str(caught[0].message)
