"""`tracer.stop()` and `tracer.stop_if(...)`: the pass ends here; what was reached is delivered.

The oracles are plain hooks on the whole pass, and the count of the layers that ran.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weft
from tests.language.hooks import with_hooks
from tests.language.test_early_exit import counting
from weft.errors import NotReachedError, RecordingError
from weft.testing.same import bitwise


def seen_at(subject, *numbers):
    keys = {f"{subject.paths.layer(number)}.output": None for number in numbers}
    return list(with_hooks(subject.net, keys, subject.ids).values())


def test_what_stands_before_is_delivered_and_nothing_after_runs(subject):
    with counting(subject) as ran, subject.model.trace(subject.ids) as tracer:
        h = subject.layer_list[1].output.save("h")
        tracer.stop()
        logits = subject.model.lm_head if hasattr(subject.model, "lm_head") else subject.model
        logits.output.save("logits") if logits is not subject.model else None
    assert ran == [0, 1]
    assert list(tracer.results) == ["h"]
    assert str(tracer.ended) == f"{subject.paths.layer(1)}.output"
    bitwise(h, seen_at(subject, 1)[0])


def test_what_was_not_reached_says_so(gpt2):
    with gpt2.model.trace(gpt2.ids) as tracer:
        gpt2.model.transformer.h[0].output.save("h")
        tracer.stop()
        late = gpt2.model.transformer.h[2].output.save("late")
    with pytest.raises(NotReachedError) as caught:
        late.sum()
    assert "not reached" in caught.value.message and "tracer.stop()" in caught.value.message
    assert 'save("late")' in caught.value.line
    assert "late" not in tracer.results
    with pytest.raises(NotReachedError):
        late.tolist()


def test_what_is_there_can_still_be_used_below_the_stop(gpt2):
    with counting(gpt2) as ran, gpt2.model.trace(gpt2.ids) as tracer:
        h = gpt2.model.transformer.h[0].output
        tracer.stop()
        twice = (h * 2).save()
    assert ran == [0]
    bitwise(twice, seen_at(gpt2, 0)[0] * 2)


def test_an_edit_named_before_still_happens(gpt2):
    with counting(gpt2) as ran, gpt2.model.trace(gpt2.ids) as tracer:
        gpt2.model.transformer.h[0].output.save()
        gpt2.model.transformer.h[1].output[:] = 0
        edited = gpt2.model.transformer.h[1].output.save()
        tracer.stop()
        gpt2.model.transformer.h[2].output[:] = 0
        gpt2.model.transformer.h[2].output.save()
    assert ran == [0, 1]
    assert not edited.any()


def test_a_stop_in_the_first_line_runs_nothing(gpt2):
    with counting(gpt2) as ran, gpt2.model.trace(gpt2.ids) as tracer:
        tracer.stop()
        late = gpt2.model.transformer.h[0].output.save()
    assert ran == []
    with pytest.raises(NotReachedError):
        late + 1


def test_a_block_of_nothing_but_a_stop(gpt2):
    with counting(gpt2) as ran, gpt2.model.trace(gpt2.ids) as tracer:
        tracer.stop()
    assert ran == [] and tracer.results == {}


def test_the_stop_is_where_its_line_is_in_any_order_of_sites(gpt2):
    """The latest of the sites named above it is the point."""
    with counting(gpt2) as ran, gpt2.model.trace(gpt2.ids) as tracer:
        one = gpt2.model.transformer.h[1].output.save()
        zero = gpt2.model.transformer.h[0].output.save()
        tracer.stop()
        gpt2.model.transformer.h[2].output.save()
    assert ran == [0, 1]
    bitwise([zero, one], seen_at(gpt2, 0, 1))


# -- stop_if ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [-1.0, 1e9])
def test_a_condition_decides_when_the_model_runs(subject, limit):
    with counting(subject) as ran, subject.model.trace(subject.ids) as tracer:
        h = subject.layer_list[0].output.save("h")
        tracer.stop_if(h.abs().max() > limit)
        late = subject.layer_list[2].output.save("late")
    assert tracer.traffic.up == 0 or str(tracer.graph).count("guard") == 0  # no look
    stopped = limit < 0
    assert ran == ([0] if stopped else [0, 1, 2])
    first, last = seen_at(subject, 0, 2)
    bitwise(h, first)
    if stopped:
        assert list(tracer.results) == ["h"]
        with pytest.raises(NotReachedError, match="stop_if"):
            late.sum()
    else:
        bitwise(late, last)


def test_the_first_true_condition_ends_it(gpt2):
    norms = [float(h.norm()) for h in seen_at(gpt2, 0, 1, 2)]
    limit = sorted(norms)[1]
    first = next(number for number, norm in enumerate(norms) if norm >= limit)
    with counting(gpt2) as ran, gpt2.model.trace(gpt2.ids) as tracer:
        kept = weft.save([])
        for layer in gpt2.model.transformer.h:
            kept.append(layer.output)
            tracer.stop_if(layer.output.norm() >= limit)
    assert ran == list(range(first + 1))
    bitwise(kept, seen_at(gpt2, 0, 1, 2)[: first + 1])


def test_a_plain_truth_value_decides_while_recording(gpt2):
    with counting(gpt2) as ran, gpt2.model.trace(gpt2.ids) as tracer:
        gpt2.model.transformer.h[0].output.save()
        tracer.stop_if(False)
        gpt2.model.transformer.h[1].output.save()
        tracer.stop_if(True)
        gpt2.model.transformer.h[2].output.save()
    assert ran == [0, 1]


def test_a_client_tensor_decides(gpt2):
    with counting(gpt2) as ran, gpt2.model.trace(gpt2.ids) as tracer:
        gpt2.model.transformer.h[0].output.save()
        tracer.stop_if(torch.tensor(True))
        gpt2.model.transformer.h[1].output.save()
    assert ran == [0]


def test_more_than_one_number_is_refused(gpt2):
    with pytest.raises(RecordingError) as caught, gpt2.model.trace(gpt2.ids) as tracer:
        tracer.stop_if(gpt2.model.transformer.h[0].output > 0)
    assert "not one number" in caught.value.message
    assert "tracer.stop_if" in caught.value.line and ".any()" in caught.value.fix


# -- containers ------------------------------------------------------------------------------------


def test_lists_keep_what_was_reached(gpt2):
    with gpt2.model.trace(gpt2.ids) as tracer:
        rows = weft.save([], name="rows")
        for number, layer in enumerate(gpt2.model.transformer.h):
            rows.append(layer.output)
            if number == 1:
                tracer.stop()
    assert len(rows) == 2 and all(type(row) is torch.Tensor for row in rows)
    bitwise(rows, seen_at(gpt2, 0, 1))
    assert tracer.results["rows"] is rows


def test_other_containers_mark_what_was_not(gpt2):
    h = gpt2.model.transformer.h
    with gpt2.model.trace(gpt2.ids) as tracer:
        one = h[0].output
        tracer.stop()
        both = weft.save({"one": one, "two": [h[2].output, one], "three": (one, h[2].output)})
    first = seen_at(gpt2, 0)[0]
    bitwise(both["one"], first)
    bitwise(both["two"], [first])
    bitwise(both["three"][0], first)
    with pytest.raises(NotReachedError):
        both["three"][1].sum()


def test_a_list_of_nothing_reached_is_empty(gpt2):
    with gpt2.model.trace(gpt2.ids) as tracer:
        tracer.stop()
        rows = weft.save([layer.output for layer in gpt2.model.transformer.h])
    assert rows == []


def test_a_client_tensor_keeps_the_rows_that_were_written(gpt2):
    acts = torch.full((3, 9, 32), -1.0)
    with gpt2.model.trace(gpt2.ids) as tracer:
        for number, layer in enumerate(gpt2.model.transformer.h):
            acts[number] = layer.output.squeeze(0)
            if number == 1:
                tracer.stop()
    bitwise(acts[:2], torch.cat(seen_at(gpt2, 0, 1)))
    assert (acts[2] == -1).all()


# -- with other things -----------------------------------------------------------------------------


def test_a_look_behind_a_stop_is_refused_at_its_line(gpt2):
    with pytest.raises(NotReachedError) as caught, gpt2.model.trace(gpt2.ids) as tracer:
        tracer.stop()
        if gpt2.model.transformer.h[0].output.sum() > 0:
            pass
    assert "never there" in caught.value.message
    assert "h[0].output.sum()" in caught.value.line


def test_a_look_before_a_stop(gpt2):
    with gpt2.model.trace(gpt2.ids) as tracer:
        h = gpt2.model.transformer.h[0].output.save()
        if h.abs().max() > 0:
            tracer.stop()
        gpt2.model.transformer.h[1].output.save("late")
    assert "late" not in tracer.results


def test_a_stop_in_an_invoke_ends_this_invoke_only(gpt2):
    other = gpt2.ids.flip(1)
    with gpt2.model.trace() as tracer:
        with tracer.invoke(gpt2.ids):
            h = gpt2.model.transformer.h[0].output.save()
            tracer.stop()
            missing = gpt2.model.transformer.h[2].output.save()
        with tracer.invoke(other):
            logits = tracer.result.logits.save()
    bitwise(h, seen_at(gpt2, 0)[0])
    bitwise(logits, with_hooks(gpt2.net, {}, other).result.logits)
    with pytest.raises(NotReachedError):
        missing.sum()


def test_an_edit_that_needs_what_a_stop_cut_off(gpt2):
    with pytest.raises(NotReachedError) as caught, gpt2.model.trace() as tracer:
        with tracer.invoke(gpt2.ids):
            tracer.stop()
            h = gpt2.model.transformer.h[2].output
        with tracer.invoke(gpt2.ids):
            gpt2.model.transformer.h[2].output = h
            gpt2.model.lm_head.output.save()
    assert "before which a stop ends the pass" in caught.value.message
    assert "output = h" in caught.value.line


def test_it_counts_as_a_use(gpt2, recwarn):
    """An edit that only a condition sees is not without effect."""
    with gpt2.model.trace(gpt2.ids) as tracer:
        gpt2.model.transformer.h[0].output.save()
        gpt2.model.transformer.h[1].output[:] = 0
        tracer.stop_if(gpt2.model.transformer.h[1].output.any())
    assert not [w for w in recwarn if issubclass(w.category, weft.UnusedEditWarning)]


def test_an_experiment_stops_again(gpt2, tmp_path):
    with gpt2.model.trace(gpt2.ids) as tracer:
        h = gpt2.model.transformer.h[0].output.save("h")
        tracer.stop_if(h.abs().max() > 0)
        gpt2.model.transformer.h[2].output.save("late")
    tracer.graph.save(tmp_path / "stop.weft")
    assert "stop invoke 0 if %" in str(tracer.graph)
    again = weft.Experiment.load(tmp_path / "stop.weft")
    other = torch.tensor([[5, 6, 7]])
    found = again.run(gpt2.model, other)
    assert list(found) == ["h"] and found["h"].shape == (1, 3, 32)


def test_of_any_module(place):
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    model = weft.Model(net)
    x = torch.ones(1, 2)
    with model.trace(x) as tracer:
        hidden = model[0].output.save()
        tracer.stop()
        model.output.save("out")
    bitwise(hidden, net[0](x).detach())
    assert "out" not in tracer.results
