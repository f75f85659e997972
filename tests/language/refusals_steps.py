"""Refusals of generations and of sites inside forwards, as `refusals`."""

from __future__ import annotations

from typing import Any

import torch

import weft
from tests.families import zoo
from tests.language.refusals import A, refused
from weft import errors as e

GREEDY: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}


@refused(e.RecordingError, "this block is a single forward", fix="model.generate(...)")
def next_step_of_a_forward(on):
    with on.trace():
        on.h[0].next()  # here


@refused(e.RecordingError, "next(0) goes nowhere", fix="from 1")
def next_step_that_is_none(on):
    with on.model.generate(on.ids, **GREEDY) as tracer:
        tracer.next(0)  # here


@refused(
    e.RecordingError,
    "transformer.h.0 has gone on to step 1",
    "all modules with it",
    fix="with tracer.iter[1]:",
)
def next_of_a_second_module(on):
    with on.model.generate(on.ids, **GREEDY):
        on.h[0].next().output.save()
        on.h[1].next().output.save()  # here


@refused(e.RecordingError, "there is no step 3: max_new_tokens is 3", "0 to 2", fix="earlier step")
def step_behind_the_last(on):
    with on.model.generate(on.ids, **GREEDY) as tracer, tracer.iter[3]:  # here
        pass


@refused(e.RecordingError, "a step is a whole number, not 'all'", fix="tracer.iter[:]")
def step_that_is_no_number(on):
    with on.model.generate(on.ids, **GREEDY) as tracer, tracer.iter["all"]:  # here
        pass


@refused(e.RecordingError, "step -1 counts from the end", "may end", fix="from the front")
def step_from_the_end(on):
    with on.model.generate(on.ids, **GREEDY) as tracer, tracer.iter[-1]:  # here
        pass


@refused(e.RecordingError, "whose generation is meant", fix="with tracer.invoke(prompt):")
def steps_of_which(on):
    with on.model.generate(**GREEDY) as tracer:
        with tracer.invoke(A):
            pass
        with tracer.iter[1]:  # here
            pass


@refused(e.RecordingError, "the generated ids exist only when", fix="after the block")
def work_on_the_result(on):
    with on.model.generate(on.ids, **GREEDY) as tracer:
        new = tracer.result[:, 9:]  # here
        new.save()


@refused(e.GradientError, "no gradients in a generation", fix="model.trace(ids)")
def gradient_in_a_generation(on):
    with on.model.generate(on.ids, **GREEDY):
        on.model.lm_head.output.sum().backward()  # here


@refused(e.NotReachedError, "the generation ended before its step", "one of 3", fix="weft.save")
def step_that_never_came(on):
    first = int(on.net.generate(on.ids, max_new_tokens=1, do_sample=False, pad_token_id=0)[0, -1])
    late = []
    with on.model.generate(on.ids, **GREEDY, eos_token_id=first, pad_token_id=0) as tracer:
        for _ in tracer.iter[2]:
            late.append(on.h[0].output.save())  # here
    late[0] + 1


@refused(e.RecordingError, "an edit of single steps", fix="use_cache=False")
def edit_of_a_step_without_a_cache(on):
    with on.model.generate(on.ids, **GREEDY, use_cache=False) as tracer:
        for _ in tracer.iter[1]:
            on.h[0].output[:] += 1  # here
        tracer.result.save()


@refused(e.RecordingError, "gave the number 0", "it is 9 at step 1", fix="make it of sizes")
def number_of_an_operation_at_every_step(on):
    model = weft.LanguageModel(zoo.build("opt"))
    decoder = model.model.decoder
    with model.generate(on.ids, **GREEDY) as tracer:
        length = decoder.source.past_key_values_get_seq_length_0.output  # here
        decoder.layers[0].output[:] += length
        tracer.result.save()


@refused(e.RecordingError, "transformer.h.0.mlp are not counted by its calls", fix=".calls[k]")
def source_of_one_call(on):
    with on.trace():
        on.h[0].mlp.calls[0].source  # here


@refused(e.RecordingError, "nothing is streamed", fix="tracer.stream(x)")
def stream_of_nothing(on):
    with on.trace() as tracer:
        tracer.stream()  # here


@refused(e.RecordingError, "tensors, numbers and text", fix="the tensors themselves")
def stream_of_a_dtype(on):
    with on.trace() as tracer:
        tracer.stream(on.h[0].output, torch.float32)  # here


@refused(e.RecordingError, "dicts with text keys", fix="the tensors themselves")
def stream_of_a_dict_with_odd_keys(on):
    with on.trace() as tracer:
        tracer.stream({1: on.h[0].output})  # here


@refused(e.RecordingError, "to is something to be called", "not list", fix="to=print")
def stream_to_a_list(on):
    with on.trace() as tracer:
        tracer.stream(on.h[0].output, to=[])  # here


@refused(e.RecordingError, "functions are streamed to", fix="before the loop")
def stream_to_too_many(on):
    with on.trace() as tracer:
        h = on.h[0].output
        for _ in range(2000):
            tracer.stream(h, to=lambda value: None)  # here


@refused(e.RecordingError, "after its block", fix="for value in tracer.stream")
def stream_after_its_block(on):
    with on.trace() as tracer:
        h = on.h[0].output.save()
    tracer.stream(h)  # here


@refused(e.RecordingError, "gone through inside its block", fix="to=print")
def stream_gone_through_inside(on):
    with on.trace() as tracer:
        tracer.stream(on.h[0].output)
        for _ in tracer.stream:  # here
            pass


@refused(e.RecordingError, "a value of another invoke, which has no such step", fix="iter[:1]")
def edit_by_one_that_has_fewer_steps(on):
    with on.model.generate(**GREEDY) as tracer:
        with tracer.invoke(A, max_new_tokens=1):
            h = on.h[0].output[:, -1]
        with tracer.invoke(A):
            on.h[1].output[:, -1] = h  # here
            tracer.result.save()
