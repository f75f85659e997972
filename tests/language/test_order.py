"""Sites in any order of the source; the order within one site; what comes too late."""

from __future__ import annotations

import itertools

import pytest

import weft
from tests.language.hooks import with_hooks
from weft.errors import LateEditError, StaleHandleError
from weft.testing.same import bitwise, moves


def test_lines_may_stand_in_any_order(model, net, ids, v):
    """An edit at layer 0, one at layer 2, a read of each layer: every order gives the same."""

    def steps(model):
        return [
            lambda kept: model.transformer.h[0].output.__setitem__((slice(None), 1), v),
            lambda kept: kept.append(model.lm_head.output.save("logits")),
            lambda kept: model.transformer.h[2].mlp.output.mul_(-1),
            lambda kept: kept.append(model.transformer.h[1].output.save("h1")),
        ]

    def first(h):
        h[:, 1] = v

    def second(h):
        h.mul_(-1)

    hooks = {
        "transformer.h.0.output": first,
        "transformer.h.1.output": None,
        "transformer.h.2.mlp.output": second,
    }
    seen = with_hooks(net, hooks, ids)
    for order in itertools.permutations(range(4)):
        with model.trace(ids) as tracer:
            kept = []
            for index in order:
                steps(model)[index](kept)
        bitwise(tracer.results["logits"], seen.result.logits)
        bitwise(tracer.results["h1"], seen["transformer.h.1.output"])


def test_layers_from_last_to_first(subject):
    with subject.model.trace(subject.ids):
        kept = weft.save([])
        for layer in reversed(subject.layer_list):
            kept.append(layer.output)
    keys = [f"{subject.paths.layer_list}.{i}.output" for i in range(len(subject.layer_list))]
    seen = with_hooks(subject.net, dict.fromkeys(keys), subject.ids)
    bitwise(kept, [seen[key] for key in reversed(keys)])


def test_an_edit_of_an_earlier_site_below_a_read_of_a_later_one_is_seen(model, ids, gpt2):
    with model.trace(ids):
        logits = model.lm_head.output.save()
        model.transformer.h[0].output[:, 2] = 0
    moves(logits, gpt2.baseline)


def test_a_value_of_a_later_site_waits_for_it(model, net, ids):
    with model.trace(ids):
        late = model.transformer.h[2].output
        early = model.transformer.h[0].output
        both = (late * early).save()
    keys = ["transformer.h.2.output", "transformer.h.0.output"]
    seen = with_hooks(net, dict.fromkeys(keys), ids)
    bitwise(both, seen[keys[0]] * seen[keys[1]])


def test_a_use_above_an_edit_means_the_old_value_even_if_it_runs_later(model, net, ids):
    """The product waits for layer 2; by then layer 0 has been edited."""
    with model.trace(ids):
        early = model.transformer.h[0].output
        both = (early * model.transformer.h[2].output).save()
        part = (early[:, 0] + model.transformer.h[1].output[:, 0]).save()
        early[:] = early * 2
        logits = model.lm_head.output.save()
    kept = []
    hooks = {
        "transformer.h.0.output": lambda h: kept.append(h.clone()) or h * 2,
        "transformer.h.1.output": None,
        "transformer.h.2.output": None,
    }
    seen = with_hooks(net, hooks, ids)
    bitwise(both, kept[0] * seen["transformer.h.2.output"])
    bitwise(part, kept[0][:, 0] + seen["transformer.h.1.output"][:, 0])
    bitwise(logits, seen.result.logits)


def test_within_one_site_the_order_of_the_program_counts(model, net, ids, v):
    def add_then_double(site):
        site.output[:, 0] += v
        site.output = site.output * 2

    def double_then_add(site):
        site.output = site.output * 2
        site.output[:, 0] += v

    results = []
    for edit in (add_then_double, double_then_add):
        with model.trace(ids):
            edit(model.transformer.h[1].mlp)
            results.append(model.transformer.h[1].mlp.output.save())
    plain = with_hooks(net, {"transformer.h.1.mlp.output": None}, ids)["transformer.h.1.mlp.output"]
    plain[:, 0] += v
    bitwise(results[0], plain * 2)
    plain[:, 0] -= v
    bitwise(results[1][:, 1:], plain[:, 1:] * 2)
    moves(results[1], results[0])


def test_a_late_edit_is_refused_with_both_lines_before_the_model_runs(model, net, ids):
    ran = []
    handle = net.register_forward_hook(lambda *_: ran.append(1))
    try:
        with pytest.raises(LateEditError) as caught, model.trace(ids):
            late = model.transformer.h[2].output * 2  # the later value
            model.transformer.h[0].output[:] = late  # the edit
    finally:
        handle.remove()
    assert "# the edit" in str(caught.value.line)
    assert "# the later value" in caught.value.message
    assert "transformer.h.0.output" in caught.value.message
    assert not ran


LATE = {
    "write": lambda m: setattr(m.transformer.h[0], "output", m.transformer.h[1].output),
    "fill": lambda m: m.transformer.h[0].output.add_(m.transformer.h[1].output),
    "index": lambda m: m.transformer.h[0].output.__setitem__(m.transformer.h[1].output > 0, 0.0),
    "view": lambda m: m.transformer.h[0].output[:, 0].copy_(m.transformer.h[1].output[:, 0]),
    "input of the same module": lambda m: setattr(
        m.transformer.h[0].mlp, "input", m.transformer.h[0].mlp.output
    ),
    "through a result": lambda m: m.transformer.h[0].output.mul_(m.lm_head.output.mean()),
    "through a written result": lambda m: _through_buffer(m),
}


def _through_buffer(m):
    buffer = m.transformer.h[0].output * 0
    buffer += m.transformer.h[1].output
    m.transformer.h[0].output = buffer


@pytest.mark.parametrize("name", LATE)
def test_every_kind_of_late_edit_is_refused(model, ids, name):
    with pytest.raises(LateEditError), model.trace(ids):
        LATE[name](model)


def test_an_edit_is_not_late_from_an_earlier_or_the_same_site(model, ids, gpt2):
    with model.trace(ids):
        model.transformer.h[1].output = model.transformer.h[0].output
        model.transformer.h[2].output[:, 0] = model.transformer.h[2].output[:, 1]
        model.transformer.h[2].mlp.output = model.transformer.h[2].mlp.input
        logits = model.lm_head.output.save()
    moves(logits, gpt2.baseline)


def test_a_stale_handle_is_refused_with_both_lines(model, ids):
    with pytest.raises(StaleHandleError) as caught, model.trace(ids):
        old = model.transformer.h[1].output  # the old handle
        model.transformer.h[1].output[:, 0] = 1  # the newer edit
        old[:, 1] = 2  # the stale edit
    assert "# the stale edit" in str(caught.value.line)
    assert "# the old handle" in caught.value.message
    assert "# the newer edit" in caught.value.message


def test_a_stale_handle_after_an_assignment_and_through_a_view(model, ids):
    with pytest.raises(StaleHandleError), model.trace(ids):
        view = model.transformer.h[1].output[:, 0]
        model.transformer.h[1].output = model.transformer.h[1].output * 2
        view.zero_()


def test_a_stale_handle_can_still_be_read(model, net, ids):
    key = "transformer.h.1.output"
    with model.trace(ids):
        old = model.transformer.h[1].output
        model.transformer.h[1].output[:] = 1
        got = (old + 0).save()
    bitwise(got, with_hooks(net, {key: None}, ids)[key])
