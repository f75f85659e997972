"""`tracer.log(...)`: lines come in the order of the block, in a generation step by step.

The oracle is the block itself, read from top to bottom.
"""

from __future__ import annotations

import pytest
import torch

from tests.families import zoo
from tests.language.generated import generated
from weft.errors import NotReachedError

NEW = 3
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
A, B = zoo.tokens(9, 4, seed=1)


def zero(layer):
    """A number that is there when the layer has run, and whose text is known."""
    return (layer.output * 0).abs().sum()


@pytest.fixture
def said(capfd):
    """The lines that were printed."""
    return lambda: [line for line in capfd.readouterr().out.splitlines() if line]


def test_text_and_values_come_in_the_order_of_the_block(gpt2, said):
    h = gpt2.model.transformer.h
    with gpt2.model.trace(gpt2.ids) as tracer:
        tracer.log("begun")
        tracer.log("late", zero(h[2]))
        tracer.log("between")
        tracer.log("early", zero(h[0]))
        tracer.log("done")
    assert said() == ["begun", "late 0.0", "between", "early 0.0", "done"]


def test_a_look_prints_nothing_twice(gpt2, said):
    h = gpt2.model.transformer.h
    with gpt2.model.trace(gpt2.ids) as tracer:
        tracer.log("value", zero(h[0]))
        tracer.log("text")
        if h[1].output.norm() > 0:
            tracer.log("looked")
    assert said() == ["value 0.0", "text", "looked"]


def test_lines_of_invokes_come_in_the_order_of_the_block(gpt2, said):
    h = gpt2.model.transformer.h
    for alone in (False, True):
        with gpt2.model.trace(alone=alone) as tracer:
            with tracer.invoke(A):
                tracer.log("a", zero(h[2]))
                last = h[2].output
            tracer.log("between")
            with tracer.invoke(B):
                tracer.log("b", zero(h[0]))
            tracer.log("of a", (last * 0).abs().sum())
        assert said() == ["a 0.0", "between", "b 0.0", "of a 0.0"]


def test_lines_before_a_second_pass_wait_for_the_first(gpt2, said):
    """Patchscopes: the second invoke runs first."""
    h = gpt2.model.transformer.h
    with gpt2.model.trace() as tracer:
        with tracer.invoke(A):
            tracer.log("target", zero(h[0]))
            target = h[0].output
        with tracer.invoke(A):
            tracer.log("source", zero(h[2]))
            target[:] = h[2].output
    assert said() == ["target 0.0", "source 0.0"]


def test_gradients_are_logged_in_order(gpt2, said):
    h = gpt2.model.transformer.h
    with gpt2.model.trace(gpt2.ids) as tracer:
        tracer.log("begun")
        loss = gpt2.model.lm_head.output.sum()
        loss.backward()
        tracer.log("gradient", (h[0].output.grad * 0).abs().sum())
        tracer.log("then", zero(h[0]))
    assert said() == ["begun", "gradient 0.0", "then 0.0"]


def test_what_was_logged_before_an_error_is_printed(gpt2, said):
    h = gpt2.model.transformer.h
    with (
        pytest.raises(IndexError),
        gpt2.model.trace(gpt2.ids) as tracer,
    ):
        h[1].output[:, torch.tensor([99])].save()
        tracer.log("never", zero(h[2]))
        tracer.log("waits for it")
        tracer.log("early", zero(h[0]))
    assert said() == ["waits for it", "early 0.0"]


def test_lines_that_a_stop_keeps_from_coming_are_not_waited_for(gpt2, said):
    h = gpt2.model.transformer.h
    with gpt2.model.trace(gpt2.ids) as tracer:
        tracer.log("there", zero(h[0]))
        tracer.stop()
        tracer.log("never", zero(h[2]))
        tracer.log("text")
    assert said() == ["there 0.0", "text"]


# -- generations -----------------------------------------------------------------------------------


def test_lines_of_a_generation_come_step_by_step(gpt2, said):
    h = gpt2.model.transformer.h
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        tracer.log("once")
        tracer.log("each", zero(h[2]))
        for step in tracer.iter[:]:
            tracer.log("step", step)
            tracer.log("of it", step, zero(h[0]))
        for step in tracer.iter[1:]:
            tracer.log("again", step)
    assert said() == [
        *["once", "each 0.0", "step 0", "of it 0 0.0"],
        *["each 0.0", "step 1", "of it 1 0.0", "again 1"],
        *["each 0.0", "step 2", "of it 2 0.0", "again 2"],
    ]


def test_generations_of_one_block_speak_one_after_another(gpt2, said):
    h = gpt2.model.transformer.h
    with gpt2.model.generate(**GREEDY) as tracer:
        for name, ids in (("a", A), ("b", B)):
            with tracer.invoke(ids):
                tracer.log(name, "begins")
                tracer.log(name, zero(h[1]))
                for step in tracer.iter[:]:
                    tracer.log(name, step)
    lines = [
        [f"{name} begins", *[f"{name} {part}" for n in range(NEW) for part in ("0.0", n)]]
        for name in "ab"
    ]
    assert said() == lines[0] + lines[1]


def test_steps_that_do_not_happen_say_nothing(gpt2, said):
    seen = generated(gpt2.net, gpt2.ids, {}, max_new_tokens=NEW)
    end = int(seen.result[0, gpt2.ids.shape[1]])  # the first new token
    with gpt2.model.generate(gpt2.ids, **GREEDY, eos_token_id=end, pad_token_id=0) as tracer:
        h = gpt2.model.transformer.h[0].output.save()
        for step in tracer.iter[:]:
            tracer.log("step", step)
        tracer.log("all")
        late = tracer.result.save()
    assert said() == ["step 0", "all"]
    assert h.shape[1] == 9 and late.shape[1] == 10


def test_a_step_of_text_alone_runs(gpt2, said):
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        for step in tracer.iter[1]:
            tracer.log("step", step)
        with tracer.iter[2]:
            never = gpt2.model.transformer.h[0].output
    assert said() == ["step 1"]
    with pytest.raises(Exception, match="save") as caught:
        never.sum()
    assert not isinstance(caught.value, NotReachedError)


def test_text_after_next_belongs_to_that_step(gpt2, said):
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        tracer.log("prompt")
        tracer.log("each", zero(gpt2.model.transformer.h[0]))
        tracer.next()
        tracer.log("next")
    assert said() == ["prompt", "each 0.0", "each 0.0", "next", "each 0.0"]
