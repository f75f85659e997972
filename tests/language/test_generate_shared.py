"""Invokes of a generation share forwards, and each is what it is alone.

The oracle is `transformers`' own `generate` with hooks, prompt by prompt. How many forwards there
are is counted at the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import weft
from tests.families import zoo
from tests.language.generated import generated
from weft.errors import NotReachedError, SamplingError
from weft.testing.same import bitwise, bounded, moves

NEW = 5
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
SHARED = ("gpt2", "gpt_neox", "opt", "llama", "qwen3", "gemma2", "mixtral")


def prompt(*lengths):
    return torch.tensor(zoo.tokens(*lengths, seed=sum(lengths)))


PROMPTS = (prompt(6), prompt(9), prompt(6, 6), prompt(3))


def layer(subject, number):
    return subject.model.get(subject.paths.layer(number))


def key(subject, number):
    return f"{subject.paths.layer(number)}.output"


def hidden(value):
    return value[0] if isinstance(value, tuple) else value


@contextmanager
def counted(net) -> Iterator[list[int]]:
    """The rows of each forward of the model."""
    rows: list[int] = []

    def note(module, args, kwargs):
        rows.append(len(kwargs["input_ids"]))

    hook = net.register_forward_pre_hook(note, with_kwargs=True)
    yield rows
    hook.remove()


def adding(v, at):
    """The hook that adds at one step, or at all (None)."""

    def add(step, value):
        if at in (None, step):
            hidden(value)[:, -1] += v

    return add


def alone(subject, v, steps=(1, None, 2, 4), **options):
    """Each prompt by itself: layer 1 edited at a step of its own, layer 2 read."""
    found = []
    for ids, at in zip(PROMPTS, steps, strict=True):
        hooks = {key(subject, 1): adding(v, at), key(subject, 2): None}
        found.append(generated(subject.net, ids, hooks, **{**GREEDY, **options}))
    return found


def together(subject, v, steps=(1, None, 2, 4), **options):
    """The same in one block: (ids, the reads of layer 2) of each."""
    found = []
    with subject.model.generate(**{**GREEDY, **options}) as tracer:
        for ids, at in zip(PROMPTS, steps, strict=True):
            with tracer.invoke(ids):
                seen = weft.save([])
                for step in tracer.iter[:]:
                    if at in (None, step):
                        hidden(layer(subject, 1).output)[:, -1] += v
                    seen.append(hidden(layer(subject, 2).output))
                found.append((tracer.result.save(), seen))
    return found


def steps_of(subject, seen):
    return [hidden(seen[key(subject, 2), step]) for step in range(seen.steps)]


@pytest.mark.parametrize("name", SHARED)
def test_each_is_what_it_is_alone(subjects, name, v):
    subject = subjects(name)
    expected = alone(subject, v)
    together(subject, v)  # the trial of the model
    with counted(subject.net) as rows:
        got = together(subject, v)
    # a cache that keeps a window only takes no padding: there prompts of one length share
    assert rows == ([3, 1, 1] if name == "gemma2" else [5]) + [5] * (NEW - 1)
    for (ids, seen), one in zip(got, expected, strict=True):
        bitwise(ids, one.result)
        bounded(list(seen), steps_of(subject, one))
    plain = generated(subject.net, PROMPTS[1], {key(subject, 2): None}, **GREEDY)
    moves(got[1][1][-1], hidden(plain[key(subject, 2), NEW - 1]))


def test_half_precision(subjects, v):
    subject, exact = subjects("llama", torch.bfloat16), subjects("llama")
    steps = (1, None, 2, 4)
    for (ids, seen), one, true in zip(
        together(subject, v.bfloat16(), steps),
        alone(subject, v.bfloat16(), steps),
        alone(exact, v, steps),
        strict=True,
    ):
        same = int((ids == one.result).long().cumprod(-1).sum(-1).min()) - ids.shape[1] + NEW
        assert same > 0
        count = min(same, int((ids == true.result).long().cumprod(-1).sum(-1).min()))
        count = max(1, min(count, 1))  # step 0: the same inputs in all three
        bounded(list(seen)[:count], steps_of(subject, one)[:count], steps_of(exact, true)[:count])


def test_alone_means_alone(gpt2, v):
    expected = alone(gpt2, v)
    with counted(gpt2.net) as rows:
        got = together(gpt2, v, alone=True)
    assert rows == [1] * NEW + [1] * NEW + [2] * NEW + [1] * NEW
    for (ids, seen), one in zip(got, expected, strict=True):
        bitwise(ids, one.result)
        bitwise(list(seen), steps_of(gpt2, one))


def test_drawn_tokens_are_those_that_each_draws_alone(gpt2, v):
    options = {"do_sample": True, "temperature": 1.5, "top_k": 20, "seed": 3}
    got = together(gpt2, v, **options)
    for number, ids in enumerate(PROMPTS):
        with gpt2.model.generate(ids, **{**GREEDY, **options}) as tracer:
            for step in tracer.iter[:]:
                if (1, None, 2, 4)[number] in (None, step):
                    hidden(layer(gpt2, 1).output)[:, -1] += v
            own = tracer.result.save()
        bitwise(got[number][0], own)


def test_those_that_end_leave_and_the_others_go_on(gpt2, v):
    plain = alone(gpt2, v)
    answers = [list(one.result[0, -NEW:]) for one in plain]
    end = next(t for answer in answers for n, t in enumerate(answer) if n and t != answer[0])
    options = {"eos_token_id": int(end), "pad_token_id": 0}
    expected = alone(gpt2, v, **options)
    together(gpt2, v)
    with counted(gpt2.net) as rows:
        got = together(gpt2, v, **options)
    ends = [one.steps for one in expected]
    assert len(set(ends)) > 1
    sizes = [len(ids) for ids in PROMPTS]
    there = [[n for n, last in zip(sizes, ends, strict=True) if last > k] for k in range(1, NEW)]
    assert rows == [5] + [sum(ones) for ones in there if ones]
    for (ids, seen), one in zip(got, expected, strict=True):
        bitwise(ids, one.result)
        bounded(list(seen), steps_of(gpt2, one))


def test_one_that_needs_no_further_step_leaves(gpt2):
    """Nobody wants the ids of the first: it ends with step 1, and its forward stops for nobody."""
    one = generated(gpt2.net, PROMPTS[0], {key(gpt2, 2): None}, **GREEDY)
    two = generated(gpt2.net, PROMPTS[1], {}, **GREEDY)

    def run():
        with gpt2.model.generate(**GREEDY) as tracer:
            with tracer.invoke(PROMPTS[0]), tracer.iter[1]:
                h = layer(gpt2, 2).output.save()
            with tracer.invoke(PROMPTS[1]):
                ids = tracer.result.save()
        return h, ids

    run()
    with counted(gpt2.net) as rows:
        h, ids = run()
    assert rows == [2, 2] + [1] * (NEW - 2)
    bounded(h, one[key(gpt2, 2), 1])
    bitwise(ids, two.result)


def test_forwards_stop_where_nobody_needs_more(gpt2):
    calls = []

    def run():
        found = []
        with gpt2.model.generate(**GREEDY) as tracer:
            for ids in PROMPTS[:2]:
                with tracer.invoke(ids), tracer.iter[1]:
                    found.append(layer(gpt2, 1).output.save())
        return found

    run()
    hook = gpt2.net.get_submodule(gpt2.paths.layer(2)).register_forward_hook(
        lambda *_: calls.append(1)
    )
    got = run()
    hook.remove()
    assert len(calls) == 1  # of the prompts; step 1 was left after layer 1
    for ids, h in zip(PROMPTS, got, strict=False):
        one = generated(gpt2.net, ids, {key(gpt2, 1): None}, **GREEDY)
        bounded(h, one[key(gpt2, 1), 1])


def test_a_stop_ends_one_and_not_the_others(gpt2, v):
    expected = alone(gpt2, v, steps=(None, None, None, None))

    def run():
        found = []
        with gpt2.model.generate(**GREEDY) as tracer:
            for number, ids in enumerate(PROMPTS):
                with tracer.invoke(ids):
                    seen = weft.save([])
                    for step in tracer.iter[:]:
                        hidden(layer(gpt2, 1).output)[:, -1] += v
                        if number == 1 and step == 2:
                            tracer.stop_if(hidden(layer(gpt2, 1).output).norm() > 0)
                            late = hidden(layer(gpt2, 2).output).save()
                        seen.append(hidden(layer(gpt2, 2).output))
                    found.append((tracer.result.save(), seen))
        return found, late

    run()
    with counted(gpt2.net) as rows:
        got, late = run()
    assert rows == [5, 5, 5, 4, 4]
    for number, ((ids, seen), one) in enumerate(zip(got, expected, strict=True)):
        want, length = steps_of(gpt2, one), ids.shape[1]
        bitwise(ids, one.result[:, :length])
        assert length == one.result.shape[1] - (3 if number == 1 else 0)
        bounded(list(seen), want[: 2 if number == 1 else NEW])
    with pytest.raises(NotReachedError):
        late.sum()


def test_a_neighbour_of_bad_numbers_is_not_seen(gpt2, v):
    expected = alone(gpt2, v, steps=(None, None, None, None))
    got = []
    with gpt2.model.generate(**GREEDY) as tracer:
        for number, ids in enumerate(PROMPTS):
            with tracer.invoke(ids):
                bad = number % 2 == 0
                layer(gpt2, 0).output[:] *= (float("nan"), 1.0, float("inf"), 1.0)[number]
                hidden(layer(gpt2, 1).output)[:, -1] += v
                seen = weft.save([])
                for _ in tracer.all():
                    seen.append(hidden(layer(gpt2, 2).output))
                got.append((bad, tracer.result.save(), seen))
    for (bad, ids, seen), one in zip(got, expected, strict=True):
        if not bad:
            bitwise(ids, one.result)
            bounded(list(seen), steps_of(gpt2, one))
        else:
            assert not torch.stack([h[:, -1] for h in seen]).isfinite().any()


def test_what_cannot_be_drawn_from_raises_as_alone(gpt2):
    options = {**GREEDY, "do_sample": True, "seed": 1}
    for several in (False, True):
        with (
            pytest.raises(SamplingError, match="the logits at step 2"),
            gpt2.model.generate(**options) as tracer,
        ):
            with tracer.invoke(PROMPTS[0]):
                for _ in tracer.iter[2]:
                    layer(gpt2, 2).output[:] = float("nan")
                tracer.result.save()
            if several:
                with tracer.invoke(PROMPTS[1]):
                    tracer.result.save()
    with gpt2.model.generate(**options) as tracer:  # the model is as it was
        with tracer.invoke(PROMPTS[0]):
            for _ in tracer.iter[NEW - 1]:  # nobody asks for the token after it
                layer(gpt2, 2).output[:] = float("nan")
                h = layer(gpt2, 2).output.save()
        with tracer.invoke(PROMPTS[1]):
            ids = tracer.result.save()
    assert h.isnan().all() and ids.shape == (1, 9 + NEW)


def test_who_uses_what_has_no_rows_runs_alone(subjects, v):
    """Attention weights have the length of the cache, which differs between neighbours."""
    subject = subjects("gemma2")  # eager
    path = f"{subject.paths.layer(1)}.self_attn"
    one = generated(subject.net, PROMPTS[0], {f"{path}.output": None}, **GREEDY)

    def run():
        with subject.model.generate(**GREEDY) as tracer:
            with tracer.invoke(PROMPTS[0]):
                for _ in tracer.iter[2]:
                    weights = subject.model.get(path).output[1].save()
                ids = tracer.result.save()
            for more in PROMPTS[1:]:
                with tracer.invoke(more):
                    tracer.result.save()
            plan = tracer.plan()
        return weights, ids, plan

    run()
    with counted(subject.net) as rows:
        weights, ids, plan = run()
    assert rows == [1] * NEW + [1, 2, 1] + [4] * (NEW - 1)
    assert "0 alone" in str(plan) and "1, 2 and 3 share steps" in str(plan)
    bitwise([weights, ids], [one[f"{path}.output", 2][1], one.result])


def test_a_skip_runs_alone(gpt2):
    one = generated(gpt2.net, PROMPTS[1], {}, **GREEDY)

    def run():
        with gpt2.model.generate(**GREEDY) as tracer:
            with tracer.invoke(PROMPTS[0]):
                layer(gpt2, 1).skip(layer(gpt2, 1).input)
                first = tracer.result.save()
            for more in PROMPTS[1:3]:
                with tracer.invoke(more):
                    second = tracer.result.save()
                    break
        return first, second

    first, second = run()
    bitwise(second, one.result)
    with gpt2.model.generate(PROMPTS[0], **GREEDY) as tracer:
        layer(gpt2, 1).skip(layer(gpt2, 1).input)
        expected = tracer.result.save()
    bitwise(first, expected)


def test_those_that_need_anothers_values_come_after_it(gpt2):
    """The second and third take what the first has at step 2, so they share what comes after."""
    source = generated(gpt2.net, PROMPTS[0], {key(gpt2, 1): None}, **GREEDY)[key(gpt2, 1), 2]

    def put(step, h):
        if step == 1:
            h[:, -1] = source[:, -1]

    def run():
        with gpt2.model.generate(**GREEDY) as tracer:
            found = []
            with tracer.invoke(PROMPTS[0]):
                for _ in tracer.iter[2]:
                    given = layer(gpt2, 1).output[:, -1]
            for ids in (PROMPTS[1], PROMPTS[3]):
                with tracer.invoke(ids):
                    for _ in tracer.iter[1]:
                        layer(gpt2, 1).output[:, -1] = given
                    found.append(tracer.result.save())
        return found

    run()
    with counted(gpt2.net) as rows:
        got = run()
    assert rows == [1, 1, 1] + [2] * NEW
    for ids, found in zip((PROMPTS[1], PROMPTS[3]), got, strict=True):
        bitwise(found, generated(gpt2.net, ids, {key(gpt2, 1): put}, **GREEDY).result)


def test_padded_prompts_run_alone(gpt2):
    ids = torch.cat([prompt(7), torch.cat([torch.zeros(1, 3, dtype=torch.int64), prompt(4)], 1)])
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, :3] = 0
    expected = generated(gpt2.net, ids, {}, attention_mask=mask, **GREEDY).result
    with gpt2.model.generate(**GREEDY) as tracer:
        with tracer.invoke(ids, attention_mask=mask):
            first = tracer.result.save()
        for more in PROMPTS[:2]:
            with tracer.invoke(more):
                h = layer(gpt2, 1).output.save()
                second = tracer.result.save()
    bitwise([first, second], [expected, generated(gpt2.net, PROMPTS[1], {}, **GREEDY).result])
    assert h.shape[1] == 9


def test_the_plan_says_who_shares(gpt2):
    with gpt2.model.generate(**GREEDY) as tracer:
        for ids in PROMPTS:
            with tracer.invoke(ids):
                tracer.result.save()
        plan = tracer.plan()
    assert "0, 1, 2 and 3 share steps" in str(plan)
    with gpt2.model.generate(**GREEDY, alone=True) as tracer:
        for ids in PROMPTS[:2]:
            with tracer.invoke(ids):
                tracer.result.save()
        plan = tracer.plan()
    assert "0 alone; 1 alone" in str(plan)
