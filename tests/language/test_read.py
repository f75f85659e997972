"""Reading a site gives what a hook sees there."""

from __future__ import annotations

import pytest
import torch

from tests.language.hooks import with_hooks
from weft.testing.same import bitwise


def test_every_layer_is_what_a_hook_sees(subject):
    paths = [f"{subject.paths.layer(i)}.output" for i in range(3)]
    with subject.model.trace(subject.ids):
        read = [layer.output.save() for layer in subject.layer_list[:3]]
    seen = with_hooks(subject.net, dict.fromkeys(paths), subject.ids)
    bitwise(read, [seen[path] for path in paths])


def test_the_logits_are_the_models(subject):
    with subject.model.trace(subject.ids) as tracer:
        head = subject.model.lm_head.output.save()
        result = tracer.result.logits.save()
    plain = with_hooks(subject.net, {"lm_head.output": None}, subject.ids)
    bitwise(head, plain["lm_head.output"])
    bitwise(result, plain.result.logits)


def test_inputs_and_outputs_of_attention_and_mlp(subject):
    attention, mlp = subject.paths.attention(1), subject.paths.mlp(1)
    with subject.model.trace(subject.ids):
        into = subject.model.get(attention).input.save()
        out = subject.model.get(attention).output[0].save()
        between = subject.model.get(mlp).input.save()
        after = subject.model.get(mlp).output.save()
    keys = [f"{attention}.input", f"{attention}.output", f"{mlp}.input", f"{mlp}.output"]
    seen = with_hooks(subject.net, dict.fromkeys(keys), subject.ids)
    bitwise(into, seen[keys[0]])
    bitwise(out, seen[keys[1]][0])
    bitwise([between, after], [seen[keys[2]], seen[keys[3]]])


def test_the_embedding_and_the_final_norm(subject):
    with subject.model.trace(subject.ids):
        embedded = subject.model.get(subject.paths.embedding).output.save()
        normed = subject.model.get(subject.paths.norm).output.save()
    keys = [f"{subject.paths.embedding}.output", f"{subject.paths.norm}.output"]
    seen = with_hooks(subject.net, dict.fromkeys(keys), subject.ids)
    bitwise([embedded, normed], [seen[key] for key in keys])


def test_integer_inputs_are_read_as_integers(model, net, ids):
    with model.trace(ids):
        got = model.transformer.wte.input.save()
    bitwise(got, with_hooks(net, {"transformer.wte.input": None}, ids)["transformer.wte.input"])


def test_an_operation_on_a_value_is_the_operation_on_the_tensor(subject):
    with subject.model.trace(subject.ids):
        h = subject.layer_list[1].output
        got = (torch.softmax(h * 2 - h.mean(-1, keepdim=True), -1) @ h.mT).save()
    key = f"{subject.paths.layer(1)}.output"
    h = with_hooks(subject.net, {key: None}, subject.ids)[key]
    bitwise(got, torch.softmax(h * 2 - h.mean(-1, keepdim=True), -1) @ h.mT)


def test_values_of_several_sites_meet(model, net, ids):
    with model.trace(ids):
        difference = (model.transformer.h[2].output - model.transformer.h[0].output).save()
    keys = ["transformer.h.2.output", "transformer.h.0.output"]
    seen = with_hooks(net, dict.fromkeys(keys), ids)
    bitwise(difference, seen[keys[0]] - seen[keys[1]])


def test_shape_and_dtype_are_known_before_the_run(subject):
    with subject.model.trace(subject.ids):
        h = subject.layer_list[0].output
        known = tuple(h.shape), h.dtype, h.ndim, h.device
        saved = h.save()
    assert known == (tuple(saved.shape), saved.dtype, saved.ndim, saved.device)


def test_a_value_says_what_it_is_and_where_from_without_a_look(model, ids):
    with model.trace(ids) as tracer:
        text = repr(model.transformer.h[0].output)
        f"{model.transformer.h[0].output}"
    assert text.startswith("float32[1, 9, 32] from transformer.h.0.output")
    assert "guard" not in str(tracer.graph)


def test_a_wrong_shape_is_an_error_at_the_users_line_before_the_model_runs(model, net, ids):
    ran = []
    handle = net.register_forward_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(RuntimeError, match="31"), model.trace(ids):
            model.transformer.h[0].output + torch.ones(31)
    finally:
        handle.remove()
    assert not ran


def test_logged_values_are_printed_with_their_numbers(model, net, ids, capsys):
    with model.trace(ids) as tracer:
        tracer.log("mean", model.transformer.h[1].output.mean(), 3)
    key = "transformer.h.1.output"
    mean = with_hooks(net, {key: None}, ids)[key].mean().item()
    assert capsys.readouterr().out == f"mean {mean} 3\n"
