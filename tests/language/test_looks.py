"""Numbers that a block needs while it is recorded; the guards they leave."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.language.hooks import with_hooks
from weft.errors import GuardError, LookError, RecordingError
from weft.testing.same import bitwise, moves

KEY = "transformer.h.1.output"


@pytest.fixture
def h(net, ids):
    return with_hooks(net, {KEY: None}, ids)[KEY]


LOOKS = {
    "item": lambda h: h.sum().item(),
    "tolist": lambda h: h[0, 0].tolist(),
    "float": lambda h: float(h[0, 0, 0]),
    "int": lambda h: int(h.argmax()),
    "bool": lambda h: bool(h[0, 0, 0] > 0),
    "not": lambda h: not h[0, 0, 0] > 0,
    "numpy": lambda h: h.numpy().sum(),
    "np.asarray": lambda h: np.asarray(h)[0, 1, 2],
    "range": lambda h: list(range(h.argmax() % 5)),
    "a list's index": lambda h: [1, 2, 3][h.argmax() % 3],
    "torch.equal": lambda h: torch.equal(h, h * 1),
    "allclose": lambda h: torch.allclose(h, h + 1),
    "format": lambda h: f"{h[0, 0, 0].item():.3f}",
    "compare": lambda h: "big" if h.norm() > 1 else "small",
    "max of two": lambda h: max(h[0, 0, 0], h[0, 0, 1]).item(),
    "nonzero": lambda h: len(h[0, 0].gt(0).nonzero()),
    "mask": lambda h: h[h > 0].sum().item(),
    "is_nonzero": lambda h: h[0, 0, 0].is_nonzero(),
    "slice bound": lambda h: h[0, : h.argmax() % 5 + 1].sum().item(),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_look_gives_the_number(model, ids, h, name):
    with model.trace(ids) as tracer:
        seen = LOOKS[name](model.transformer.h[1].output)
    expected = LOOKS[name](h)
    assert type(seen) is type(expected) and seen == expected
    assert "guard" in str(tracer.graph)


def test_a_branch_is_taken_by_the_number(subject):
    for sign in (1, -1):
        with subject.model.trace(subject.ids) as tracer:
            layer = subject.layer_list[1]
            if (layer.output * sign).sum() > 0:
                layer.output[:, -1] *= 2
            else:
                layer.output[:, -1] *= -1
            logits = tracer.result.logits.save()

        def edit(h, sign=sign):
            h[:, -1] *= 2 if (h * sign).sum() > 0 else -1

        hooks = {f"{subject.paths.layer(1)}.output": edit}
        bitwise(logits, with_hooks(subject.net, hooks, subject.ids).result.logits)
        moves(logits[:, -1], subject.baseline[:, -1])


def test_a_look_sees_the_edits_above_it(model, ids):
    with model.trace(ids):
        model.transformer.h[0].output[:] = 0
        model.transformer.h[1].output[:] = 3
        assert model.transformer.h[1].output.sum().item() == 3 * 9 * 32
        assert not model.transformer.h[0].output.any()


def test_a_masked_selection_has_its_true_shape(model, ids, h):
    with model.trace(ids):
        value = model.transformer.h[1].output
        picked = value[value > 1]
        size = picked.shape[0]
        picked = picked.save()
    assert size == int((h > 1).sum())
    bitwise(picked, h[h > 1])


def test_a_masked_assignment_needs_no_look(model, ids):
    with model.trace(ids) as tracer:
        value = model.transformer.h[1].output
        value[value > 1] = 0
        model.lm_head.output.save()
    assert "guard" not in str(tracer.graph)


def test_where_needs_no_look_and_does_the_same(model, net, ids, gpt2):
    with model.trace(ids) as tracer:
        mlp = model.transformer.h[1].mlp
        mlp.output = torch.where(mlp.output.norm() > 1, mlp.output * 2, mlp.output)
        logits = model.lm_head.output.save()
    hooks = {"transformer.h.1.mlp.output": lambda h: h * 2 if h.norm() > 1 else h}
    bitwise(logits, with_hooks(net, hooks, ids).result.logits)
    moves(logits, gpt2.baseline)
    assert "guard" not in str(tracer.graph)


def test_printing_does_not_look(model, ids, capsys):
    with model.trace(ids) as tracer:
        print(model.transformer.h[1].output)
        model.lm_head.output.save()
    assert "float32[1, 9, 32]" in capsys.readouterr().out
    assert "guard" not in str(tracer.graph)


def test_a_look_costs_only_the_layers_above_it(model, net, ids):
    ran = []
    hooks = [b.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, b in _layers(net)]
    try:
        with model.trace(ids):
            if model.transformer.h[0].output.norm() > 0:
                assert ran == [0]
    finally:
        for hook in hooks:
            hook.remove()


def _layers(net):
    return enumerate(net.transformer.h)


def test_an_edit_before_a_looked_at_site_is_refused_with_both_lines(model, ids):
    with pytest.raises(RecordingError) as caught, model.trace(ids):
        float(model.transformer.h[2].output.mean())  # the look
        model.transformer.h[0].output[:] = 0  # the edit
    assert "# the edit" in str(caught.value.line)
    assert "# the look" in caught.value.message


def test_an_edit_at_or_after_the_looked_at_site_is_allowed(model, net, ids):
    with model.trace(ids):
        if model.transformer.h[1].output.mean().item() < 100:
            model.transformer.h[1].output[:, 0] = 0
            model.transformer.h[2].output[:, 0] = 0
        logits = model.lm_head.output.save()

    def edit(h):
        h[:, 0] = 0

    hooks = {"transformer.h.1.output": edit, "transformer.h.2.output": edit}
    bitwise(logits, with_hooks(net, hooks, ids).result.logits)


def test_looks_do_not_change_what_is_saved(model, net, ids):
    with model.trace(ids):
        h = model.transformer.h[1].output
        before = h.save()
        h.sum().item()
        h[:] = 1
        h.sum().item()
        after = h.save()
    bitwise(before, with_hooks(net, {KEY: None}, ids)[KEY])
    assert (after == 1).all()


# Guards, when the graph runs again


def recorded(model, ids, look):
    with model.trace(ids) as tracer:
        h = model.transformer.h[1].output
        look(h)  # the look
        h.save("h")
    return tracer.graph


@pytest.mark.parametrize("name", ["item", "tolist", "int", "bool", "numpy", "mask", "compare"])
def test_a_guard_holds_on_the_same_input(model, ids, h, name):
    bitwise(recorded(model, ids, LOOKS[name]).run(model, ids)["h"], h)


@pytest.mark.parametrize("name", ["item", "tolist", "int", "numpy", "mask"])
def test_a_guard_fails_on_another_input(model, ids, name):
    graph = recorded(model, ids, LOOKS[name])
    with pytest.raises(GuardError) as caught:
        graph.run(model, torch.flip(ids, [1]))
    assert "line" in str(caught.value) or __file__ in str(caught.value.line)


def test_a_guard_on_a_branch_fails_only_where_the_branch_differs(model, net, ids):
    with model.trace(ids) as tracer:
        h = model.transformer.h[1].output
        if h.mean() > -1e9:
            h.save("h")
    other = torch.flip(ids, [1])
    expected = with_hooks(net, {KEY: None}, other)[KEY]
    bitwise(tracer.graph.run(model, other)["h"], expected)


def test_a_failed_guard_leaves_the_model_as_it_was(model, ids):
    graph = recorded(model, ids, LOOKS["item"])
    with pytest.raises(GuardError):
        graph.run(model, torch.flip(ids, [1]))


# Where no number can be had


def test_a_look_in_a_scan_raises(model, ids):
    with pytest.raises(LookError) as caught, model.scan(ids):
        if model.transformer.h[1].output.norm() > 1:
            pass
    assert "torch.where" in str(caught.value.fix)
    assert __file__ in str(caught.value.line)
