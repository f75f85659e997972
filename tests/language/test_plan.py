"""`tracer.plan()` tells before the run what the run then costs."""

from __future__ import annotations

import torch

import weft
from weft.testing.same import bitwise


def test_a_read_of_one_layer(subject):
    with subject.model.trace(subject.ids) as tracer:
        h = subject.layer_list[0].output.save()
        plan = tracer.plan()
    assert (plan.sites, plan.operations, plan.constant_bytes) == (1, 0, 0)
    assert plan.saved_bytes == h.nbytes
    assert plan.ends == tracer.ended
    assert str(plan.ends) == f"{subject.paths.layer(0)}.output"


def test_the_bytes_saved_are_those_that_come_back(model, ids, v):
    with model.trace(ids) as tracer:
        h = model.transformer.h[1].output
        h[:, -1].save()
        (h @ h.mT).argmax(-1).save()
        weft.save({"mean": [h.mean()], "mask": h > 0})
        model.transformer.h[0].output[:, 0] = v
        model.lm_head.weight[3].save()
        plan = tracer.plan()
    tensors = []

    def collect(item):
        if isinstance(item, torch.Tensor):
            tensors.append(item)
        elif isinstance(item, dict):
            [collect(value) for value in item.values()]
        elif isinstance(item, list):
            [collect(value) for value in item]

    collect(tracer.results)
    assert plan.saved_bytes == sum(tensor.nbytes for tensor in tensors)
    assert plan.constant_bytes == v.nbytes


def test_sites_and_operations_are_those_of_the_graph(model, ids, v):
    with model.trace(ids) as tracer:
        model.transformer.h[0].output * 2  # not needed
        model.transformer.h[1].output[:, -1] += v
        model.transformer.h[2].attn.output[0].relu().sum().save()
        plan = tracer.plan()
    text = str(tracer.graph)
    assert plan.sites == 2
    assert plan.operations == 4 == text.count("Tensor.") + text.count("relu(") + text.count(" sum(")


def test_the_pass_ends_where_the_plan_says(subject):
    for layer in (0, 1):
        with subject.model.trace(subject.ids) as tracer:
            subject.layer_list[layer].output.save()
            subject.layer_list[0].input.save()
            plan = tracer.plan()
        assert plan.ends == tracer.ended is not None
    with subject.model.trace(subject.ids) as tracer:
        tracer.result.logits.save()
        plan = tracer.plan()
    assert str(plan.ends) == "<root>.output"
    assert tracer.ended is None


def test_peak_memory_holds_what_lives_at_the_same_time(model, ids):
    with model.trace(ids) as tracer:
        h = model.transformer.h[1].output
        for _ in range(10):
            h = h * 2
        h.sum().save()
        chain = tracer.plan().peak_bytes
    with model.trace(ids) as tracer:
        h = model.transformer.h[1].output
        for _ in range(10):
            (h * 2).save()
        kept = tracer.plan().peak_bytes
    size = 9 * 32 * 4
    assert chain <= 3 * size + 64
    assert 10 * size <= kept <= 12 * size


def test_a_scan_plans_as_the_trace_does(subject):
    def plan(open_block):
        with open_block(subject.ids) as tracer:
            layer = subject.layer_list[1]
            layer.output[:, -1] *= 2
            subject.model.lm_head(layer.output).save()
            subject.layer_list[-1].output.save()
            return tracer.plan()

    assert plan(subject.model.scan) == plan(subject.model.trace)


def test_after_the_block_the_plan_is_of_the_whole(model, ids):
    with model.trace(ids) as tracer:
        early = tracer.plan()
        h = model.transformer.h[1].output.save()
    assert (early.sites, early.saved_bytes, early.ends) == (0, 0, None)
    assert tracer.plan().saved_bytes == h.nbytes


def test_a_plan_reads_well_and_looks_at_nothing(model, ids, gpt2):
    with model.trace(ids) as tracer:
        logits = model.lm_head.output.save()
        text = str(tracer.plan())
    assert "4.5 KB" in text
    assert "lm_head.output" in text
    bitwise(logits, gpt2.baseline)
