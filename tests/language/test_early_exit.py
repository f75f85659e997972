"""The forward pass stops when nothing is left to run: counted in layers that ran."""

from __future__ import annotations

import contextlib

import pytest

from tests.language.hooks import with_hooks
from weft.testing.same import bitwise


@contextlib.contextmanager
def counting(subject):
    """The numbers of the layers that begin."""
    ran, handles = [], []
    for number, layer in enumerate(subject.net.get_submodule(subject.paths.layer_list)):
        hook = lambda *_, number=number: ran.append(number)
        handles.append(layer.register_forward_pre_hook(hook))
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("last", [0, 1, 2])
def test_reading_a_layer_costs_the_layers_up_to_it(subject, last):
    key = f"{subject.paths.layer(last)}.output"
    with counting(subject) as ran, subject.model.trace(subject.ids) as tracer:
        got = subject.layer_list[last].output.save()
    assert ran == list(range(last + 1))
    assert str(tracer.ended) == f"{subject.paths.layer_list}.{last}.output"
    bitwise(got, with_hooks(subject.net, {key: None}, subject.ids)[key])


def test_reading_an_input_costs_the_layers_before_it(subject):
    """The counting hook of layer 1 stands before ours, and so still sees it begin."""
    with counting(subject) as ran, subject.model.trace(subject.ids) as tracer:
        subject.layer_list[1].input.save()
    assert ran == [0, 1]
    assert str(tracer.ended) == f"{subject.paths.layer_list}.1.inputs"


def test_the_last_site_in_firing_order_counts_not_in_source_order(gpt2):
    with counting(gpt2) as ran, gpt2.model.trace(gpt2.ids):
        gpt2.model.transformer.h[1].output.save()
        gpt2.model.transformer.h[0].output.save()
    assert ran == [0, 1]


def test_what_nothing_needs_does_not_run(gpt2):
    with counting(gpt2) as ran, gpt2.model.trace(gpt2.ids):
        gpt2.model.transformer.h[2].output * 2
        gpt2.model.transformer.h[0].output.save()
    assert ran == [0]


def test_a_lens_does_not_run_the_layers_between(gpt2):
    with counting(gpt2) as ran, gpt2.model.trace(gpt2.ids):
        gpt2.model.lm_head(gpt2.model.transformer.h[0].output).save()
    assert ran == [0]


def test_a_size_that_was_read_does_not_make_a_layer_run(gpt2):
    with counting(gpt2) as ran, gpt2.model.trace(gpt2.ids):
        length = gpt2.model.transformer.h[2].output.shape[1]
        gpt2.model.transformer.h[0].output[:, length - 1].save()
    assert ran == [0]


def test_saving_only_constants_and_weights_runs_no_layer(gpt2, v):
    with counting(gpt2) as ran, gpt2.model.trace(gpt2.ids):
        (gpt2.model.lm_head.weight @ v).save()
    assert ran == []


def test_an_empty_block_runs_nothing(gpt2):
    with counting(gpt2) as ran, gpt2.model.trace(gpt2.ids):
        pass
    assert ran == []


def test_reading_the_result_runs_all(gpt2):
    with counting(gpt2) as ran, gpt2.model.trace(gpt2.ids) as tracer:
        tracer.result.logits.save()
    assert ran == [0, 1, 2] and tracer.ended is None


def test_logs_and_edits_below_the_last_save(gpt2):
    from weft import UnusedEditWarning

    with counting(gpt2) as ran, pytest.warns(UnusedEditWarning), gpt2.model.trace(gpt2.ids):
        gpt2.model.transformer.h[1].output[:] = 0
        gpt2.model.transformer.h[0].output.save()
    assert ran == [0, 1]


def test_a_stopped_pass_leaves_the_model_usable(gpt2):
    for _ in range(3):
        with gpt2.model.trace(gpt2.ids):
            gpt2.model.transformer.h[0].output.save()
    bitwise(gpt2.net(gpt2.ids).logits.detach(), gpt2.baseline)
