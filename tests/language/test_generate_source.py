"""Operations inside forwards at the steps of a generation.

The oracle is `transformers`' own `generate`, with `output_attentions`, and with a function that the
forwards call replaced by hand.
"""

from __future__ import annotations

import pytest
import torch

import weft
from tests.families import zoo
from tests.language import sources
from tests.language.generated import generated
from tests.language.hooks import hook_count
from tests.language.sources import (
    ATTENTION,
    GREEDY,
    IDS,
    NEW,
    attention_of,
    by_hand,
    eager,
    own,
)
from weft.errors import LateEditError, RecordingError
from weft.testing.same import bitwise, bounded, moves


@pytest.fixture
def opened(place):
    """Gives a handle on a model, in the place where this test runs."""
    return lambda net: sources.opened(place, net)


@pytest.fixture(params=["gpt2", "llama"])
def family(request):
    return request.param


@pytest.fixture
def net(family):
    net = eager(family)
    own(net)  # transformers adds hooks of its own, which stay
    hooks = hook_count(net)
    yield net
    assert hook_count(net) == hooks
    assert not any("forward" in vars(module) for module in net.modules())


@pytest.fixture
def gpt2():
    return eager("gpt2")


# -- reading ---------------------------------------------------------------------------------------


def test_patterns_of_every_step(net, family, opened):
    model = opened(net)
    with model.generate(IDS, **GREEDY) as tracer:
        weights, soft = weft.save([]), weft.save([])
        for _ in tracer.iter[:]:
            weights.append(attention_of(model, family).output[1])
            soft.append(attention_of(model, family, 2).source.softmax_0.output)
        ids = tracer.result.save()
    expected = own(net)
    bitwise(ids, expected.sequences)
    bitwise(list(weights), [step[1] for step in expected.attentions])
    bitwise(list(soft), [step[2] for step in expected.attentions])
    assert [w.shape[2:] for w in weights] == [(9, 9), (1, 10), (1, 11), (1, 12)]


def test_outside_of_loops_a_save_is_of_step_0(gpt2, opened):
    model = opened(gpt2)
    with model.generate(IDS, **GREEDY) as tracer:
        pattern = attention_of(model, "gpt2").source.softmax_0.output.save()
        with tracer.iter[2]:
            later = attention_of(model, "gpt2").source.softmax_0.output.save()
    expected = own(gpt2).attentions
    bitwise(pattern, expected[0][1])
    bitwise(later, expected[2][1])


def test_without_a_cache(gpt2, opened):
    model = opened(gpt2)
    with model.generate(IDS, **GREEDY, use_cache=False) as tracer:
        patterns = weft.save([])
        for _ in tracer.iter[1:]:
            patterns.append(attention_of(model, "gpt2").output[1])
        ids = tracer.result.save()
    expected = own(gpt2, use_cache=False)
    bitwise(ids, expected.sequences)
    bitwise(list(patterns), [step[1] for step in expected.attentions[1:]])
    assert patterns[-1].shape[2:] == (12, 12)


def test_a_padded_batch(gpt2, opened):
    """The mask of padding is an argument of the function that is called."""
    model, rows = opened(gpt2), [zoo.tokens(7)[0], zoo.tokens(4, 5)[0]]
    with model.generate(rows, **GREEDY) as tracer:
        with tracer.iter[2]:
            call = attention_of(model, "gpt2")
            pattern, mask = call.source.softmax_0.output.save(), call.inputs[0][4].save()
        ids = tracer.result.save()
    padded = torch.tensor([rows[0], [0] * 3 + rows[1]])
    real = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    expected = own(gpt2, padded, attention_mask=real)
    bitwise(ids, expected.sequences)
    bitwise(pattern, expected.attentions[2][1])
    assert mask.shape == (2, 1, 1, 9)
    assert not pattern[1, :, :, :3].any()


# -- editing ---------------------------------------------------------------------------------------


def test_an_edit_acts_at_every_step(net, family, opened):
    model, path = opened(net), ATTENTION[family].format(1)

    def hand(module, step, pattern):
        return torch.cat([pattern[:, :1] * 0, pattern[:, 1:]], 1) if module == path else None

    with model.generate(IDS, **GREEDY) as tracer:
        attention_of(model, family).source.softmax_0.output[:, 0] = 0
        seen = weft.save([])
        for _ in tracer.iter[:]:
            seen.append(attention_of(model, family, 2).source.softmax_0.output)
        ids = tracer.result.save()
    with by_hand(net, hand) as patched:
        expected = own(net)
    bitwise(ids, expected.sequences)
    last = ATTENTION[family].format(2)
    bitwise(list(seen), [patched.seen[last, step] for step in range(NEW)])
    moves(seen[-1], own(net).attentions[-1][2])


def test_an_edit_of_one_step(gpt2, opened):
    model, path = opened(gpt2), ATTENTION["gpt2"].format(0)

    def hand(module, step, pattern):
        return torch.ones_like(pattern) if (module, step) == (path, 1) else None

    with model.generate(IDS, **GREEDY) as tracer:
        with tracer.iter[1]:
            soft = attention_of(model, "gpt2", 0).source.softmax_0
            soft.output = torch.ones_like(soft.output)
        seen = weft.save([])
        for _ in tracer.iter[:]:
            seen.append(attention_of(model, "gpt2", 2).output[1])
        ids = tracer.result.save()
    with by_hand(gpt2, hand):
        expected = own(gpt2)
    bitwise(ids, expected.sequences)
    bitwise(list(seen), [step[2] for step in expected.attentions])
    moves(seen[1], own(gpt2).attentions[1][2])


def test_a_position_of_the_prompt_is_pinned(gpt2, opened):
    model = opened(gpt2)
    with pytest.raises(RecordingError, match="not valid at step 1") as caught:  # noqa: SIM117
        with model.generate(IDS, **GREEDY) as tracer:
            attention_of(model, "gpt2").source.softmax_0.output[:, :, 3] = 0  # of the prompt
            tracer.result.save()
    assert "# of the prompt" in str(caught.value)
    assert "tracer.iter[0]" in str(caught.value)
    with model.generate(IDS, **GREEDY) as tracer:
        with tracer.iter[0]:
            attention_of(model, "gpt2").source.softmax_0.output[:, :, 3] = 0
        hidden = model.transformer.h[1].output.save()
        ids = tracer.result.save()

    def hand(module, step, pattern):
        if (module, step) != (ATTENTION["gpt2"].format(1), 0):
            return None
        pattern[:, :, 3] = 0
        return pattern

    with by_hand(gpt2, hand):
        seen = generated(gpt2, IDS, {"transformer.h.1.output": None}, **GREEDY)
    bitwise(ids, seen.result)
    bitwise(hidden, seen["transformer.h.1.output", 0])


def test_a_size_that_was_read_as_a_number(gpt2, opened):
    """The last key is 9 positions on in the prompt, and 10 at step 1."""
    model = opened(gpt2)
    with (
        pytest.raises(RecordingError, match="reads the size 9 as a number; there it is 10"),
        model.generate(IDS, **GREEDY) as tracer,
    ):
        pattern = attention_of(model, "gpt2").source.softmax_0.output
        pattern[..., int(pattern.shape[-1]) - 1] = 0
        tracer.result.save()


@pytest.mark.parametrize("in_place", [True, False])
def test_keys_that_come_out_of_the_cache(gpt2, opened, in_place):
    """In place an edit stays in the cache, as by hand; assigned, it is for this step alone."""
    model, path = opened(gpt2), ATTENTION["gpt2"].format(1)

    def hand(module, step, given):
        query, key, value = given
        if module != path:
            return None
        return (query, key.mul_(1.5) if in_place else key * 1.5, value)

    with model.generate(IDS, **GREEDY) as tracer:
        call = attention_of(model, "gpt2")
        if in_place:
            call.inputs[0][2][:] *= 1.5
        else:
            args, options = call.inputs
            call.inputs = ((*args[:2], args[2] * 1.5, *args[3:]), options)
        seen = weft.save([])
        for _ in tracer.iter[:]:
            seen.append(attention_of(model, "gpt2").output[1])
        ids = tracer.result.save()
    with by_hand(gpt2, given=hand):
        expected = own(gpt2)
    bitwise(ids, expected.sequences)
    bitwise(list(seen), [step[1] for step in expected.attentions])


def test_a_value_of_one_step_in_a_later_one(gpt2, opened):
    model, path = opened(gpt2), ATTENTION["gpt2"].format(1)
    kept = {}

    def hand(module, step, pattern):
        if module != path:
            return None
        kept[step] = pattern[:, :, -1:, :9]
        return None if step != 2 else torch.cat([kept[0], pattern[..., 9:]], -1)

    with model.generate(IDS, **GREEDY) as tracer:
        soft = lambda: attention_of(model, "gpt2").source.softmax_0
        first = soft().output[:, :, -1:, :9]
        with tracer.iter[2]:
            soft().output[..., :9] = first
        out = weft.save([])
        for _ in tracer.iter[:]:
            out.append(model.lm_head.output)
        ids = tracer.result.save()
    with by_hand(gpt2, hand):
        seen = generated(gpt2, IDS, {"lm_head.output": None}, **GREEDY)
    bitwise(ids, seen.result)
    bitwise(list(out), [seen["lm_head.output", step] for step in range(NEW)])


def test_late_within_a_step(gpt2, opened):
    model = opened(gpt2)
    inside = lambda: attention_of(model, "gpt2").source
    with pytest.raises(LateEditError), model.generate(IDS, **GREEDY) as tracer:  # noqa: SIM117
        with tracer.iter[1]:
            inside().torch_matmul_0.output = inside().softmax_0.output
    with model.generate(IDS, **GREEDY) as tracer:
        with tracer.iter[0]:
            kept = inside().softmax_0.output[:, :, -1:, :1].sum()
        with tracer.iter[1]:
            inside().torch_matmul_0.output *= 1 + 0 * kept  # of an earlier step: it is there
        tracer.result.save()


# -- without a cache -------------------------------------------------------------------------------


def test_an_edit_of_all_positions_is_the_same_without_a_cache(gpt2, opened):
    model, path = opened(gpt2), ATTENTION["gpt2"].format(1)
    found = []
    for use_cache in (True, False):
        with model.generate(IDS, **GREEDY, use_cache=use_cache) as tracer:
            attention_of(model, "gpt2").input[:] *= 1.5
            model.transformer.h[2].mlp.source.self_act_0.output[..., :8] = 0
            with tracer.iter[3]:
                logits = model.lm_head.output[:, -1].save()
            found.append((tracer.result.save(), logits))
    (one, cached), (two, whole) = found
    bitwise(one, two)
    bounded(cached, whole)

    def given(module, step, tensors):
        return (tensors[0] * 1.5, *tensors[1:]) if module == path else None

    def no_eight(step, h):
        h[..., :8] = 0

    with by_hand(gpt2, given=given):
        seen = generated(gpt2, IDS, {"transformer.h.2.mlp.act.output": no_eight}, **GREEDY)
    bitwise(one, seen.result)


def _keys(model):
    attention_of(model, "gpt2").inputs[0][2][:] *= 2


def _pattern(model):
    attention_of(model, "gpt2").source.softmax_0.output[:, 0] = 0


@pytest.mark.parametrize("edit", [_keys, _pattern])
def test_what_means_something_else_without_a_cache_is_refused(gpt2, opened, edit):
    """With a cache a step has the keys of all positions, too, of which earlier ones are edited."""
    model = opened(gpt2)
    with (
        pytest.raises(RecordingError, match="same to every position"),
        model.generate(IDS, **GREEDY, use_cache=False) as tracer,
    ):
        edit(model)
        tracer.result.save()
