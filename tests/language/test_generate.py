"""`model.generate`: a block whose model runs once for each new token.

The oracle is `transformers`' own `generate` with plain hooks that count the steps. The forwards are
the same calls, so tokens and tensors are equal to the bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import weft
from tests.language.generated import generated
from weft.errors import (
    GradientError,
    LateEditError,
    NotReachedError,
    RecordingError,
    UnknownOptionError,
)
from weft.testing.same import bitwise, bounded, moves

NEW = 4
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def layer(subject, number):
    return subject.model.get(subject.paths.layer(number))


def key(subject, number, port="output"):
    return f"{subject.paths.layer(number)}.{port}"


def hidden(value):
    """A layer's hidden states: some layers return a tuple."""
    return value[0] if isinstance(value, tuple) else value


def in_place(change):
    """A hook that changes hidden states in place, as `change(step, h)` says."""

    def hook(step, value):
        change(step, hidden(value))

    return hook


# -- the ids ---------------------------------------------------------------------------------------


def test_ids_are_those_of_transformers(subject):
    expected = generated(subject.net, subject.ids, {}, max_new_tokens=NEW)
    with subject.model.generate(subject.ids, **GREEDY) as tracer:
        ids = tracer.result.save()
    bitwise(ids, expected.result)
    assert type(ids) is torch.Tensor


def test_ids_can_be_saved_in_containers(gpt2):
    expected = generated(gpt2.net, gpt2.ids, {}, max_new_tokens=NEW).result
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        both = weft.save({"ids": tracer.result, "h": layer(gpt2, 0).output})
    bitwise(both["ids"], expected)
    assert both["h"].shape[1] == 9


def test_ids_cannot_be_computed_with(gpt2):
    with (
        pytest.raises(RecordingError, match="only when the generation is over") as caught,
        gpt2.model.generate(gpt2.ids, **GREEDY) as tracer,
    ):
        new = tracer.result[:, 9:]  # this line
        new.save()
    assert "this line" in str(caught.value.line)


def test_how_many_ids_there_will_be_is_not_known(gpt2):
    with (
        pytest.raises(RecordingError, match="how many"),
        gpt2.model.generate(gpt2.ids, **GREEDY) as tracer,
    ):
        ids = tracer.result.save()
        assert ids.shape[1] > 0


# -- reading ---------------------------------------------------------------------------------------


def test_each_step_is_read(subject):
    name = key(subject, 1)
    expected = generated(subject.net, subject.ids, {name: None}, max_new_tokens=NEW)
    with subject.model.generate(subject.ids, **GREEDY) as tracer:
        seen = weft.save([])
        for step in tracer.iter[:]:
            assert type(step) is int
            seen.append(hidden(layer(subject, 1).output))
            assert tuple(seen[-1].shape[:2]) == (1, 1 if step else 9)
    assert len(seen) == NEW
    for step in range(NEW):
        bitwise(seen[step], hidden(expected[name, step]))


def test_outside_of_loops_the_prompts_step_is_read(gpt2):
    name = key(gpt2, 2)
    expected = generated(gpt2.net, gpt2.ids, {name: None}, max_new_tokens=NEW)
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        before = layer(gpt2, 2).output.save()
        for _ in tracer.iter[2]:
            pass
        after = layer(gpt2, 2).output.save()
    bitwise([before, after], [expected[name, 0]] * 2)


STEPS = [
    (2, [2]),
    (slice(1, 3), [1, 2]),
    (slice(None, None, 2), [0, 2]),
    (slice(1, None), [1, 2, 3]),
    (slice(2, 99), [2, 3]),
    ([0, 3], [0, 3]),
    ((3, 1), [3, 1]),
]


@pytest.mark.parametrize(("chosen", "steps"), STEPS)
def test_steps_are_chosen(gpt2, chosen, steps):
    name = key(gpt2, 1)
    expected = generated(gpt2.net, gpt2.ids, {name: None}, max_new_tokens=NEW)
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        met, seen = [], weft.save([])
        for step in tracer.iter[chosen]:
            met.append(step)
            seen.append(layer(gpt2, 1).output)
    assert met == steps
    bitwise(list(seen), [expected[name, step] for step in steps])


def test_all_steps_are_gone_through(gpt2):
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        assert list(tracer.all()) == list(tracer.iter) == list(range(NEW))
        layer(gpt2, 0).output.save()


def test_a_with_block_is_one_step(gpt2):
    name = key(gpt2, 1)
    expected = generated(gpt2.net, gpt2.ids, {name: None}, max_new_tokens=NEW)
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        with tracer.iter[2] as step:
            assert step == 2
            h = layer(gpt2, 1).output.save()
        with (
            pytest.raises(RecordingError, match="runs once, and these are 4 steps"),
            tracer.iter[:],
        ):
            pass
    bitwise(h, expected[name, 2])


def test_next_goes_on_to_the_next_step(gpt2):
    name = key(gpt2, 1)
    expected = generated(gpt2.net, gpt2.ids, {name: None}, max_new_tokens=NEW)
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        one = layer(gpt2, 1).output.save()
        two = layer(gpt2, 1).next().output.save()
        tracer.next(2)
        three = layer(gpt2, 1).output.save()
    bitwise([one, two, three], [expected[name, step] for step in (0, 1, 3)])


def test_step_0_can_be_named_after_next(gpt2):
    name = key(gpt2, 1)
    expected = generated(gpt2.net, gpt2.ids, {name: None}, max_new_tokens=NEW)
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        tracer.next(2)
        two = layer(gpt2, 1).output.save()
        with tracer.iter[0]:
            none = layer(gpt2, 1).output.save()
    bitwise([two, none], [expected[name, step] for step in (2, 0)])


@pytest.mark.parametrize("chosen", [4, [0, 4], -1, slice(-2, None), 1.5, "1"])
def test_steps_that_there_are_not(gpt2, chosen):
    with (
        pytest.raises(RecordingError) as caught,
        gpt2.model.generate(gpt2.ids, **GREEDY) as tracer,
    ):
        for _ in tracer.iter[chosen]:  # here
            pass
    assert "# here" in str(caught.value.line)
    assert caught.value.fix


def test_one_token_has_one_step(gpt2):
    with (
        pytest.raises(RecordingError, match="the steps are 0 alone"),
        gpt2.model.generate(gpt2.ids, max_new_tokens=1) as tracer,
    ):
        tracer.next()


# -- editing ---------------------------------------------------------------------------------------


def test_an_edit_outside_of_loops_acts_at_every_step(subject):
    def half(step, h):
        h[:, -1] *= -0.5

    name, last = key(subject, 1), key(subject, 2)
    hooks = {name: in_place(half), last: None}
    expected = generated(subject.net, subject.ids, hooks, max_new_tokens=NEW)
    plain = generated(subject.net, subject.ids, {last: None}, max_new_tokens=NEW)
    with subject.model.generate(subject.ids, **GREEDY) as tracer:
        hidden(layer(subject, 1).output)[:, -1] *= -0.5
        seen = weft.save([])
        for _ in tracer.all():
            seen.append(hidden(layer(subject, 2).output))
        ids = tracer.result.save()
    bitwise(ids, expected.result)
    for step in range(NEW):
        bitwise(seen[step], hidden(expected[last, step]))
        moves(seen[step], hidden(plain[last, step]))


def test_an_edit_of_one_step_acts_at_this_step(subject):
    def change(step, h):
        if step == 2:
            h[:] = h.flip(-1)

    name, last = key(subject, 0), key(subject, 2)
    hooks = {name: in_place(change), last: None}
    expected = generated(subject.net, subject.ids, hooks, max_new_tokens=NEW)
    plain = generated(subject.net, subject.ids, {last: None}, max_new_tokens=NEW)
    with subject.model.generate(subject.ids, **GREEDY) as tracer:
        for _ in tracer.iter[2]:
            h = hidden(layer(subject, 0).output)
            h[:] = h.flip(-1)
        seen = weft.save([])
        for _ in tracer.iter[:]:
            seen.append(hidden(layer(subject, 2).output))
        ids = tracer.result.save()
    bitwise(ids, expected.result)
    bitwise(list(seen), [hidden(expected[last, step]) for step in range(NEW)])
    bitwise(seen[1], hidden(plain[last, 1]))
    moves(seen[2], hidden(plain[last, 2]))


def test_an_edit_that_fits_the_prompt_only_is_refused(gpt2, v):
    with (
        pytest.raises(RecordingError, match="not valid at step 1") as caught,
        gpt2.model.generate(gpt2.ids, **GREEDY) as tracer,
    ):
        layer(gpt2, 1).output[:, 2] += v  # the line
        tracer.result.save()
    assert "# the line" in str(caught.value.line)
    assert "tracer.iter[0]" in str(caught.value.fix)


def test_an_assignment_that_fits_the_prompt_only_is_refused(gpt2):
    with (
        pytest.raises(RecordingError, match=r"holds float32\[1, 1, 32\]"),
        gpt2.model.generate(gpt2.ids, **GREEDY) as tracer,
    ):
        layer(gpt2, 1).output = torch.zeros(1, 9, 32)
        tracer.result.save()


def test_a_length_that_was_read_as_a_number_is_refused(gpt2, v):
    with (
        pytest.raises(RecordingError, match="reads the size 9 as a number; there it is 1"),
        gpt2.model.generate(gpt2.ids, **GREEDY) as tracer,
    ):
        h = layer(gpt2, 1).output
        h[:, -1] += v / h.shape[1]
        tracer.result.save()


def test_pinned_to_the_prompt_it_is_valid(gpt2, v):
    def change(step, h):
        if step == 0:
            h[:, 2] += v

    expected = generated(gpt2.net, gpt2.ids, {key(gpt2, 1): in_place(change)}, max_new_tokens=NEW)
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        for _ in tracer.iter[0]:
            layer(gpt2, 1).output[:, 2] += v
        ids = tracer.result.save()
    bitwise(ids, expected.result)


def test_what_an_edit_is_made_of_is_evaluated_anew(gpt2):
    """The cone of a template, also across a loop that stands in between."""
    seen_input = {}

    def note(step, h):
        seen_input[step] = h.clone()

    def double(step, h):
        if step == 1:
            h *= 2

    def add(step, h):
        h += seen_input[step].mean(1, keepdim=True)

    hooks = {
        key(gpt2, 0): in_place(note),
        key(gpt2, 1): in_place(double),
        key(gpt2, 2): in_place(add),
        "lm_head.output": None,
    }
    expected = generated(gpt2.net, gpt2.ids, hooks, max_new_tokens=NEW)
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        mean = layer(gpt2, 0).output.mean(1, keepdim=True)
        for _ in tracer.iter[1]:
            layer(gpt2, 1).output[:] *= 2
        layer(gpt2, 2).output[:] += mean
        seen = weft.save([])
        for _ in tracer.iter[:]:
            seen.append(gpt2.model.lm_head.output)
        ids = tracer.result.save()
    bitwise(list(seen), [expected["lm_head.output", step] for step in range(NEW)])
    bitwise(ids, expected.result)


def test_edits_of_one_site_keep_the_order_of_their_lines(gpt2):
    def change(step, h):
        h += 1
        if step == 2:
            h *= 3
        h -= 2

    hooks = {key(gpt2, 1): in_place(change)}
    expected = generated(gpt2.net, gpt2.ids, hooks, max_new_tokens=NEW)
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        layer(gpt2, 1).output[:] += 1
        for _ in tracer.iter[2]:
            layer(gpt2, 1).output[:] *= 3
        layer(gpt2, 1).output[:] -= 2
        seen = weft.save([])
        for _ in tracer.iter[:]:
            seen.append(layer(gpt2, 1).output)
    bitwise(list(seen), [expected[key(gpt2, 1), step] for step in range(NEW)])


def test_a_skip_outside_of_loops_acts_at_every_step(gpt2):
    def skipped(step, value):
        return value_in[step]

    value_in = {}

    def note(step, value):
        value_in[step] = value.clone()

    hooks = {key(gpt2, 1, "input"): note, key(gpt2, 1): skipped}
    expected = generated(gpt2.net, gpt2.ids, hooks, max_new_tokens=NEW)
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        layer(gpt2, 1).skip(layer(gpt2, 1).input)
        seen = weft.save([])
        for _ in tracer.iter[:]:
            seen.append(layer(gpt2, 1).output)
        ids = tracer.result.save()
    bitwise(ids, expected.result)
    bitwise(list(seen), [expected[key(gpt2, 1), step] for step in range(NEW)])


# -- values between steps --------------------------------------------------------------------------


def test_values_of_one_step_are_used_at_a_later_one(gpt2):
    kept = {}

    def note(step, h):
        kept[step] = h.clone()

    def change(step, h):
        if step == 3:
            h[:] = kept[1] - kept[0][:, 4:5]

    hooks = {key(gpt2, 2): in_place(note), key(gpt2, 1): in_place(change), "lm_head.output": None}
    expected = generated(gpt2.net, gpt2.ids, hooks, max_new_tokens=NEW)
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        zero = layer(gpt2, 2).output
        for _ in tracer.iter[1]:
            one = layer(gpt2, 2).output
        for _ in tracer.iter[3]:
            layer(gpt2, 1).output[:] = one - zero[:, 4:5]
            logits = gpt2.model.lm_head.output.save()
        difference = (one - zero).save()  # code after the loops
    bitwise(logits, expected["lm_head.output", 3])
    bitwise(difference, kept[1] - kept[0])


def test_a_later_step_cannot_be_used_at_an_earlier_one(gpt2):
    with (
        pytest.raises(LateEditError) as caught,
        gpt2.model.generate(gpt2.ids, **GREEDY) as tracer,
    ):
        for _ in tracer.iter[2]:
            late = layer(gpt2, 0).output
        for _ in tracer.iter[1]:
            layer(gpt2, 2).output[:] = late  # too early
    assert "# too early" in str(caught.value.line)


def test_a_template_that_needs_a_later_step_is_refused(gpt2):
    with (
        pytest.raises(LateEditError),
        gpt2.model.generate(gpt2.ids, **GREEDY) as tracer,
    ):
        for _ in tracer.iter[2]:
            late = layer(gpt2, 0).output
        layer(gpt2, 2).output[:] = late.mean(1, keepdim=True)


def test_loops_may_stand_in_loops(gpt2):
    names = [key(gpt2, 0), key(gpt2, 2)]
    expected = generated(gpt2.net, gpt2.ids, dict.fromkeys(names), max_new_tokens=NEW)
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        sums = weft.save({})
        for step in tracer.iter[:2]:
            first = layer(gpt2, 0).output[:, -1]
            for other in tracer.iter[2:]:
                sums[step, other] = first + layer(gpt2, 2).output[:, -1]
            sums[step] = layer(gpt2, 2).output[:, -1]
    for step in (0, 1):
        bitwise(sums[step], expected[names[1], step][:, -1])
        for other in (2, 3):
            there = expected[names[0], step][:, -1] + expected[names[1], other][:, -1]
            bitwise(sums[step, other], there)


def test_a_loop_can_be_left(gpt2):
    name = key(gpt2, 1)
    expected = generated(gpt2.net, gpt2.ids, {name: None}, max_new_tokens=NEW)
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        for step in tracer.iter[:]:
            if step == 1:
                break
        for step in tracer.iter[:]:
            if step == 2:
                h = layer(gpt2, 1).output.save()
                continue
        zero = layer(gpt2, 1).output.save()
    bitwise([zero, h], [expected[name, 0], expected[name, 2]])


def test_a_client_tensor_collects_steps(gpt2):
    name = key(gpt2, 1)
    expected = generated(gpt2.net, gpt2.ids, {name: None}, max_new_tokens=NEW)
    norms = torch.zeros(NEW)
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        total: Any = 0
        for step in tracer.iter[:]:
            h = layer(gpt2, 1).output[:, -1]
            norms[step] = h.norm()
            total = total + h
        total = total.save()
    bitwise(norms, torch.stack([expected[name, step][:, -1].norm() for step in range(NEW)]))
    want = expected[name, 0][:, -1]
    for step in range(1, NEW):
        want = want + expected[name, step][:, -1]
    bitwise(total, want)


# -- ends ------------------------------------------------------------------------------------------


def ending(subject, step):
    """Options under which the generation ends with the token of a step, and its ids."""
    plain = generated(subject.net, subject.ids, {}, max_new_tokens=NEW).result[0, 9:]
    assert plain[step] not in plain[:step]
    return {**GREEDY, "eos_token_id": int(plain[step]), "pad_token_id": 0}


def test_steps_that_did_not_happen_are_not_reached(gpt2):
    options = ending(gpt2, 1)
    names = dict.fromkeys([key(gpt2, 1)])
    expected = generated(gpt2.net, gpt2.ids, names, **options)
    assert expected.steps == 2
    with gpt2.model.generate(gpt2.ids, **options) as tracer:
        seen, alone = weft.save([]), {}
        for step in tracer.iter[:]:
            seen.append(layer(gpt2, 1).output)
            alone[step] = layer(gpt2, 1).output.save(f"h{step}")
        after = (alone[1] * 2).save("after")
        ids = tracer.result.save("ids")
    bitwise(ids, expected.result)
    bitwise(list(seen), [expected[key(gpt2, 1), step] for step in range(2)])
    bitwise([alone[1], after], [seen[1], seen[1] * 2])
    assert {"h0", "h1", "after", "ids"} <= set(tracer.results)
    assert not {"h2", "h3"} & set(tracer.results)
    with pytest.raises(NotReachedError, match="the generation ended before its step") as caught:
        alone[2].sum()
    assert "alone[step]" in str(caught.value.line)


def test_edits_of_steps_that_did_not_happen_do_nothing(gpt2):
    options = ending(gpt2, 1)
    expected = generated(gpt2.net, gpt2.ids, {}, **options)
    with gpt2.model.generate(gpt2.ids, **options) as tracer:
        for _ in tracer.iter[2:]:
            layer(gpt2, 1).output[:] = 0
        ids = tracer.result.save()
    bitwise(ids, expected.result)


def test_a_stop_ends_the_generation(gpt2):
    expected = generated(gpt2.net, gpt2.ids, {}, max_new_tokens=NEW).result
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        late = weft.save([])
        for step in tracer.iter[:]:
            late.append(gpt2.model.lm_head.output)
            if step == 2:
                tracer.stop()
        ids = tracer.result.save()
    assert len(late) == 3
    bitwise(ids, expected[:, : 9 + 2])  # the forward that would have made the third is cut


def test_a_stop_on_a_condition_is_asked_at_every_step(gpt2):
    name = key(gpt2, 1)
    seen = generated(gpt2.net, gpt2.ids, {name: None}, max_new_tokens=NEW)
    norms = [float(seen[name, step][:, -1].norm()) for step in range(NEW)]
    limit = min(norms)
    stopped = norms.index(limit)
    assert stopped
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        tracer.stop_if(layer(gpt2, 1).output[:, -1].norm() <= limit + 1e-4)
        h = weft.save([])
        for _ in tracer.iter[:]:
            h.append(layer(gpt2, 1).output)
        ids = tracer.result.save()
    assert len(h) == stopped + 1
    bitwise(ids, seen.result[:, : 9 + stopped])


def test_a_stop_that_nothing_but_the_ids_waits_for(gpt2):
    seen = generated(gpt2.net, gpt2.ids, {"lm_head.output": None}, max_new_tokens=NEW)
    best = [float(seen["lm_head.output", step][0, -1].max()) for step in range(NEW)]
    limit = max(best[1:])
    stopped = best.index(limit)
    assert best[0] < limit
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        tracer.stop_if(gpt2.model.lm_head.output[0, -1].max() >= limit)
        ids = tracer.result.save()
    bitwise(ids, seen.result[:, : 9 + stopped])


def test_a_log_outside_of_loops_is_said_at_every_step(gpt2, capsys):
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        tracer.log("once")
        tracer.log("norm", layer(gpt2, 1).output[:, -1].norm())
        tracer.result.save()
    said = capsys.readouterr().out.splitlines()
    assert said.count("once") == 1
    assert len([line for line in said if line.startswith("norm")]) == NEW


# -- refusals and options --------------------------------------------------------------------------


def test_there_are_no_gradients(gpt2):
    with (
        pytest.raises(GradientError, match="no gradients in a generation"),
        gpt2.model.generate(gpt2.ids, **GREEDY),
    ):
        gpt2.model.lm_head.output.sum().backward()
    with pytest.raises(UnknownOptionError, match="no gradients"):
        gpt2.model.generate(gpt2.ids, **GREEDY, grad=True)


def test_unknown_options_are_refused(gpt2):
    with pytest.raises(UnknownOptionError, match="max_new_token"):
        gpt2.model.generate(gpt2.ids, max_new_token=3)
    with pytest.raises(UnknownOptionError, match="beam search"):
        gpt2.model.generate(gpt2.ids, max_new_tokens=3, num_beams=2)


def test_a_number_is_looked_at_in_a_step(gpt2):
    name = key(gpt2, 1)
    seen = generated(gpt2.net, gpt2.ids, {name: None}, max_new_tokens=NEW)
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        norms = [float(layer(gpt2, 1).output[:, -1].norm()) for _ in tracer.iter[1:3]]
        tracer.result.save()
    assert norms == [float(seen[name, step][:, -1].norm()) for step in (1, 2)]


def test_a_cache_of_modules_is_of_the_step_in_which_it_was_asked_for(gpt2):
    name = key(gpt2, 1)
    seen = generated(gpt2.net, gpt2.ids, {name: None}, max_new_tokens=NEW)
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        prompt = tracer.cache(modules=[layer(gpt2, 1)])
        with tracer.iter[2]:
            later = tracer.cache(modules=[layer(gpt2, 1)])
    path = gpt2.paths.layer(1)
    bitwise(prompt[path].output, seen[name, 0])
    bitwise(later[path].output, seen[name, 2])


def test_draws_are_of_their_step(gpt2):
    def drawn(seed):
        with gpt2.model.generate(gpt2.ids, **GREEDY, seed=seed) as tracer:
            noise = torch.randn_like(layer(gpt2, 1).output[:, -1:])
            layer(gpt2, 1).output[:, -1:] = noise
            seen = weft.save([])
            for _ in tracer.iter[:]:
                seen.append(layer(gpt2, 1).output[:, -1:])
                seen.append(torch.randn_like(seen[-1]))
            ids = tracer.result.save()
        return [*seen, ids]

    one, again, other = drawn(3), drawn(3), drawn(4)
    bitwise(one, again)
    for a in range(2 * NEW):
        moves(one[a], other[a])
        for b in range(a):
            moves(one[a], one[b])


def test_a_plan_is_of_all_steps(gpt2, v):
    with gpt2.model.generate(gpt2.ids, **GREEDY) as tracer:
        layer(gpt2, 1).output[:, -1] += v
        tracer.result.save()
        plan = tracer.plan()
    path = gpt2.paths.layer(1)
    assert [(one.site.path, one.site.step) for one in plan.visits] == [
        *[(path, step) for step in range(NEW)],
        ("", 0),
    ]
    assert plan.operations == 2 * NEW  # the slice, the sum
    assert tracer.plan() == plan


# -- with and without a cache ----------------------------------------------------------------------

ALIKE = [
    lambda h, v: h.add_(v),
    lambda h, v: h.mul_(0.5),
    lambda h, v: h[:, :, 3].zero_(),
    lambda h, v: h[..., :4].add_(v[:4]),
    lambda h, v: h.copy_(torch.tanh(h) * v + h),
]
UNEQUAL = [
    lambda h, v: h[:, -1].add_(v),
    lambda h, v: h[:, -1:].mul_(2),
    lambda h, v: h.add_(h.mean(1, keepdim=True)),
    lambda h, v: h.copy_(h.flip(1)),
    lambda h, v: h.add_(torch.randn_like(h)),
]


@pytest.mark.parametrize("change", ALIKE)
def test_an_edit_that_treats_positions_alike_is_the_same_without_a_cache(gpt2, v, change):
    hooks = {key(gpt2, 1): in_place(lambda step, h: change(h, v)), "lm_head.output": None}
    expected = generated(gpt2.net, gpt2.ids, hooks, max_new_tokens=NEW)
    for cached in (True, False):
        with gpt2.model.generate(gpt2.ids, **GREEDY, use_cache=cached) as tracer:
            change(layer(gpt2, 1).output, v)
            logits = weft.save([])
            for _ in tracer.iter[:]:
                logits.append(gpt2.model.lm_head.output)
            ids = tracer.result.save()
        bitwise(ids, expected.result)
        bounded(list(logits), [expected["lm_head.output", step] for step in range(NEW)])


@pytest.mark.parametrize("change", UNEQUAL)
def test_an_edit_that_does_not_is_refused_without_a_cache(gpt2, v, change):
    with (
        pytest.raises(RecordingError, match="not do the same to every position"),
        gpt2.model.generate(gpt2.ids, **GREEDY, use_cache=False) as tracer,
    ):
        change(layer(gpt2, 1).output, v)
        tracer.result.save()


def test_an_edit_of_a_step_is_refused_without_a_cache(gpt2, v):
    with (
        pytest.raises(RecordingError, match="an edit of single steps"),
        gpt2.model.generate(gpt2.ids, **GREEDY, use_cache=False) as tracer,
    ):
        for _ in tracer.iter[2]:
            layer(gpt2, 1).output[:] += v
        tracer.result.save()


# -- the experiment --------------------------------------------------------------------------------


def test_the_graph_is_small_however_many_steps(gpt2, v, tmp_path):
    def block(count):
        with gpt2.model.generate(gpt2.ids, max_new_tokens=count, do_sample=False) as tracer:
            layer(gpt2, 1).output[:, -1] += v
            seen = weft.save([], name="seen")
            for _ in tracer.iter[:]:
                seen.append(layer(gpt2, 2).output)
            tracer.result.save("ids")
        return tracer.graph

    few, many = block(4), block(12)
    assert len(few) == len(many) < 20
    many.save(tmp_path / "graph.weft")
    again = weft.Experiment.load(tmp_path / "graph.weft")
    assert again.hash == many.hash != few.hash
