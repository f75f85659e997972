"""`model.scan`: the same blocks, recorded without weights and without a run. Oracle: the run."""

from __future__ import annotations

import pytest
import torch

import weft
from tests.families import zoo
from weft.errors import FailedRunError, LateEditError, UnknownOptionError
from weft.testing import tiny_path

A, B = ([zoo.tokens(n, seed=n)[0]] for n in (9, 5))


def reads(model, tracer):
    h = model.transformer.h
    h[0].output[:, -1] += 1
    h[2].mlp.output = h[1].mlp.output * 2
    return [h[1].output, h[1].attn.output[0], h[2].input, tracer.result.logits]


def applied(model, tracer):
    return [model.lm_head(model.transformer.ln_f(h.output)) for h in model.transformer.h]


def gradients(model, tracer):
    h = model.transformer.h[1].output
    loss = model.lm_head.output.float().logsumexp(-1).sum()
    with loss.backward():
        inner = model.transformer.h[0].output.grad
        model.transformer.h[2].output.grad *= 2
    return [h.grad, inner, torch.autograd.grad(loss, [h])[0]]


def skipped(model, tracer):
    model.transformer.h[1].skip(model.transformer.h[0].output * 2)
    return [model.transformer.h[1].output, model.transformer.h[2].output]


def stopped(model, tracer):
    kept = model.transformer.h[1].output
    tracer.stop_if(kept.sum() > 0)
    tracer.log("norm", kept.norm())
    tracer.stop()
    return [kept]


BLOCKS = [reads, applied, gradients, skipped, stopped]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_shapes_and_dtypes_are_those_of_the_run(subjects, block):
    subject = subjects("gpt2", torch.bfloat16)
    with subject.model.scan(subject.ids) as tracer:
        scanned = [(tuple(one.shape), one.dtype) for one in block(subject.model, tracer)]
    with subject.model.trace(subject.ids) as tracer:
        kept = weft.save(block(subject.model, tracer))
    assert scanned == [(tuple(one.shape), one.dtype) for one in kept]


def test_invokes_have_shapes_of_their_own(model):
    with model.scan() as tracer:
        with tracer.invoke(A):
            first = model.transformer.h[0].output
        with tracer.invoke(B):
            model.transformer.h[1].output[:, -1] = first[:, -1]
            second = model.transformer.h[2].output
        with tracer.invoke():
            whole = model.lm_head.output
    assert (first.shape, second.shape, whole.shape) == ((1, 9, 32), (1, 5, 32), (2, 9, 128))
    visits = tracer.plan().visits  # nothing is saved, and one site is edited with another
    assert [visit.does for visit in visits if visit.site.invoke < 2] == [
        ("read",),
        ("edited in place",),
    ]


def test_a_cache_is_planned(model, ids):
    with model.scan(ids) as tracer:
        tracer.cache([model.transformer.h[0], model.transformer.h[1]], dtype=torch.float16)
    plan = tracer.plan()
    assert plan.saved_bytes == 2 * 9 * 32 * 2
    assert [str(visit.site) for visit in plan.visits] == [
        "transformer.h.0.output",
        "transformer.h.1.output",
    ]


def test_a_late_edit_is_refused_as_in_a_trace(model, ids):
    with pytest.raises(LateEditError, match=r"transformer\.h\.0\.output"), model.scan(ids):
        model.transformer.h[0].output = model.transformer.h[1].output


def test_values_say_what_to_do_after_the_block(model, ids):
    with model.scan(ids) as tracer:
        h = model.transformer.h[0].output.save()
        cache = tracer.cache([model.transformer.h[0]])
    assert h.shape == (1, 9, 32)
    for use in (lambda: h + 1, lambda: cache.transformer.h[0].output):
        with pytest.raises(FailedRunError) as caught:
            use()
        assert "test_scan.py" in str(caught.value.line)
        assert "only scanned" in caught.value.message
        assert caught.value.fix == "use model.trace(...), which runs the block"
    assert tracer.results == {}


def test_options_are_those_of_a_trace(model, ids):
    with model.scan(ids, seed=3, remote="local", alone=True, grad=True, device="cpu") as tracer:
        weft.save(torch.randn_like(model.transformer.h[0].output))
    assert tracer.plan().saved_bytes == 9 * 32 * 4
    with pytest.raises(UnknownOptionError, match="blocking=False"):
        model.scan(ids, blocking=False)
    with pytest.raises(UnknownOptionError, match="sead"):
        model.scan(ids, sead=3)
    with pytest.raises(UnknownOptionError, match="means no place"):
        model.scan(ids, remote="nowhere near")


def test_no_weight_is_loaded():
    model = weft.LanguageModel(tiny_path())
    with model.scan("The capital of France is") as tracer:
        layers = model.model.layers
        loss = model.lm_head.output[0, -1].logsumexp(-1)
        loss.backward()
        layers[1].output.grad.save()
        layers[2].skip(layers[1].output)
        model.lm_head(model.model.norm(layers[3].output)).save()
        tracer.cache([layers[0]])
    plan = tracer.plan()
    assert plan.sites == 6 and plan.flops > 0 and "lm_head" in str(plan)
    weights = model._weights
    assert not weights.are_loaded
    assert all(one.is_meta for one in weights.skeleton().parameters())
