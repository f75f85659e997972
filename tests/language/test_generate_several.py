"""Generations of several prompts, and those in which tokens are drawn.

The oracle is `transformers`' own `generate` on the same batch, or each prompt alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import weft
from tests.families import zoo
from tests.language.generated import generated
from weft.errors import RecordingError
from weft.testing.same import bitwise, bounded

NEW = 3
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def layer(subject, number):
    return subject.model.get(subject.paths.layer(number))


def prompt(length):
    return torch.tensor(zoo.tokens(length, seed=length))


def padded(subject):
    """Two prompts, the second padded on the left, as (ids, mask)."""
    long, short = prompt(7), prompt(4)
    pads = torch.zeros(1, 3, dtype=torch.int64)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, :3] = 0
    return torch.cat([long, torch.cat([pads, short], 1)]), mask


def test_a_batch_is_generated_as_transformers_does(gpt2, v):
    ids, mask = padded(gpt2)
    key = f"{gpt2.paths.layer(1)}.output"

    def add(step, h):
        h = h[0] if isinstance(h, tuple) else h
        h[:, -1] += v

    expected = generated(gpt2.net, ids, {key: add}, attention_mask=mask, max_new_tokens=NEW)
    plain = generated(gpt2.net, ids, {}, attention_mask=mask, max_new_tokens=NEW)
    with gpt2.model.generate(ids, attention_mask=mask, **GREEDY, pad_token_id=0) as tracer:
        layer(gpt2, 1).output[:, -1] += v
        seen = weft.save([])
        for _ in tracer.iter[:]:
            seen.append(layer(gpt2, 1).output[:, -1])
        result = tracer.result.save()
    bitwise(result, expected.result)
    bitwise(list(seen), [expected[key, step][:, -1] for step in range(NEW)])
    assert not torch.equal(expected.result, plain.result)


def test_rows_that_have_ended_go_on_with_pads(gpt2):
    ids, mask = padded(gpt2)
    plain = generated(gpt2.net, ids, {}, attention_mask=mask, max_new_tokens=NEW).result
    end = int(plain[0, 7])
    options = {"eos_token_id": end, "pad_token_id": 3, "max_new_tokens": NEW}
    expected = generated(gpt2.net, ids, {}, attention_mask=mask, **options)
    with gpt2.model.generate(ids, attention_mask=mask, **options, do_sample=False) as tracer:
        result = tracer.result.save()
    bitwise(result, expected.result)
    assert result[0, 8:].eq(3).all() and expected.steps > 1


def test_each_invoke_has_a_generation_of_its_own(gpt2, v):
    long, short = prompt(7), prompt(4)

    def add(step, h):
        if step == 1:
            h[:, -1] += v

    key = f"{gpt2.paths.layer(1)}.output"
    one = generated(gpt2.net, long, {key: None}, max_new_tokens=NEW)
    two = generated(gpt2.net, short, {key: add}, max_new_tokens=NEW)
    with gpt2.model.generate(**GREEDY) as tracer:
        with tracer.invoke(long):
            h = layer(gpt2, 1).output.save()
            first = tracer.result.save()
        with tracer.invoke(short):
            for _ in tracer.iter[1]:
                layer(gpt2, 1).output[:, -1] += v
            seen = weft.save([])
            for _ in tracer.all():
                seen.append(layer(gpt2, 1).output)
            second = tracer.result.save()
    bitwise([h, first], [one[key, 0], one.result])
    bitwise(second, two.result)
    bounded(list(seen), [two[key, step] for step in range(NEW)])


@pytest.mark.parametrize("turned", [False, True])
def test_values_flow_between_the_generations_of_invokes(gpt2, turned):
    """From step 0 of one into step 1 of the other, whichever stands first."""
    long, short = prompt(7), prompt(4)
    key = f"{gpt2.paths.layer(1)}.output"
    source = generated(gpt2.net, long, {key: None}, max_new_tokens=1)[key, 0][:, -1]

    def put(step, h):
        if step == 1:
            h[:, -1] = source

    expected = generated(gpt2.net, short, {key: put}, max_new_tokens=NEW)
    kept = {}

    def give(tracer):
        with tracer.invoke(long):
            kept["h"] = layer(gpt2, 1).output[:, -1]

    def take(tracer):
        with tracer.invoke(short):
            with tracer.iter[1]:
                layer(gpt2, 1).output[:, -1] = kept["h"]
                kept["there"] = layer(gpt2, 1).output.save()
            kept["ids"] = tracer.result.save()

    with gpt2.model.generate(**GREEDY) as tracer:
        give(tracer)
        if turned:
            with tracer.invoke(prompt(5)):
                layer(gpt2, 0).output.save()
        take(tracer)
    bitwise(kept["ids"], expected.result)
    bitwise(kept["there"], expected[key, 1])


def test_an_empty_invoke_is_the_batch_of_all(gpt2, v):
    ids, mask = padded(gpt2)
    expected = generated(gpt2.net, ids, {}, attention_mask=mask, max_new_tokens=NEW)
    with gpt2.model.generate(**GREEDY, pad_token_id=0) as tracer:
        with tracer.invoke(prompt(7)):
            pass
        with tracer.invoke(prompt(4)):
            pass
        with tracer.invoke():
            result = tracer.result.save()
    bitwise(result[:, 7:], expected.result[:, 7:])
    with (
        pytest.raises(RecordingError, match="as they are"),
        gpt2.model.generate(**GREEDY) as tracer,
    ):
        with tracer.invoke(prompt(7)), tracer.iter[1]:
            layer(gpt2, 1).output[:] += v
        with tracer.invoke():
            tracer.result.save()


def test_loops_outside_of_invokes_are_refused(gpt2):
    with (
        pytest.raises(RecordingError, match="outside of an invoke"),
        gpt2.model.generate(**GREEDY) as tracer,
    ):
        for _ in tracer.iter[:]:
            pass


def test_what_the_user_leaves_out_is_what_the_model_says(place):
    """Its generation config, also where the model is on a server."""
    net: Any = zoo.build("gpt2")
    ids = prompt(7)
    plain = generated(net, ids, {}, max_new_tokens=8).result
    net.generation_config.update(repetition_penalty=2.5, pad_token_id=0)
    expected = generated(net, ids, {}, max_new_tokens=8).result
    assert not torch.equal(plain, expected)
    end = int(expected[0, 9])
    net.generation_config.eos_token_id = end
    expected = generated(net, ids, {}, max_new_tokens=8)
    assert expected.steps < 8
    with place.language(net).generate(ids, max_new_tokens=8) as tracer:
        result = tracer.result.save()
    bitwise(result, expected.result)


# -- sampling --------------------------------------------------------------------------------------


def drawn(subject, **options):
    chosen = {"max_new_tokens": 8, "do_sample": True, "temperature": 3.0, **options}
    with subject.model.generate(subject.ids, **chosen) as tracer:
        ids = tracer.result.save()
    return ids


def test_a_seed_decides_what_is_drawn(gpt2):
    one = drawn(gpt2, seed=1)
    bitwise(one, drawn(gpt2, seed=1))
    assert not torch.equal(one, drawn(gpt2, seed=2))
    assert torch.equal(one[:, :9], gpt2.ids)


def test_the_best_of_one_is_greedy(gpt2):
    greedy = generated(gpt2.net, gpt2.ids, {}, max_new_tokens=8).result
    bitwise(drawn(gpt2, seed=1, top_k=1), greedy)


def test_edits_decide_what_is_drawn_from(gpt2):
    """Where only one token has a chance it is drawn, whatever the seed."""
    with gpt2.model.generate(gpt2.ids, max_new_tokens=3, do_sample=True, seed=5) as tracer:
        for step in tracer.iter[:]:
            logits = gpt2.model.lm_head.output
            logits[:] = -1e9
            logits[..., 40 + step] = 0.0
        ids = tracer.result.save()
    assert ids[0, 9:].tolist() == [40, 41, 42]


def test_a_string_ends_a_generation(subjects):
    """`generate` of `transformers` cannot do it with this tokenizer: ended by hand."""
    tiny = subjects("tiny")

    def turn(step, h):
        h *= -0.5

    hooks = {f"{tiny.paths.layer(1)}.output": turn}
    plain = generated(tiny.net, tiny.ids, hooks, max_new_tokens=NEW).result
    string = tiny.tokenizer.decode(plain[0, -2])
    texts = [tiny.tokenizer.decode(plain[0, 9 : 9 + steps]) for steps in range(1, NEW + 1)]
    steps = 1 + next(number for number, text in enumerate(texts) if string in text)
    assert steps < NEW
    with tiny.model.generate(tiny.ids, **GREEDY, stop_strings=[string]) as tracer:
        layer(tiny, 1).output[:] *= -0.5
        ids = tracer.result.save()
    bitwise(ids, plain[:, : 9 + steps])
