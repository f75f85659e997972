"""Operations inside forwards at the steps of a generation.

The oracle is `transformers`' own `generate`, with `output_attentions`, and with a function that the
forwards call replaced by hand.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch

import weft
from tests.families import zoo
from tests.language import sources
from tests.language.generated import generated
from tests.language.hooks import hook_count
from tests.language.sources import ATTENTION, IDS, attention_of, by_hand, eager
from tests.language.test_generate_encoded import CROSS, built
from tests.language.test_generate_encoded import IDS as ENCODED
from weft.errors import LateEditError, RecordingError
from weft.testing.same import bitwise, bounded, moves

NEW = 4
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
OWN = {**GREEDY, "pad_token_id": 0, "min_new_tokens": None}
SHORT = torch.tensor(zoo.tokens(5, seed=4))


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


@cache
def eager_encoded(name):
    net: Any = copy.deepcopy(built(name))
    net.set_attn_implementation("eager")
    return net


@pytest.fixture
def gpt2():
    return eager("gpt2")


def own(net: Any, ids: torch.Tensor = IDS, **options: Any) -> Any:
    """What `generate` returns: `sequences`, and `attentions[step][layer]`."""
    with torch.no_grad():
        return net.generate(
            ids, output_attentions=True, return_dict_in_generate=True, **{**OWN, **options}
        )


def no_head(module, step, pattern):
    if module == ATTENTION["gpt2"].format(1):
        pattern = pattern.clone()
        pattern[:, 0] = 0
        return pattern
    return None


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


def test_a_number_that_an_operation_gave(opened):
    """What is no tensor is a number of step 0, and another one later."""
    model = opened(eager_encoded("t5"))
    block = model.decoder.block[1]
    read = lambda: block.layer[0].SelfAttention.source.past_key_values_get_seq_length_0.output
    with model.generate(ENCODED, **GREEDY) as tracer:
        seen = [read() for _ in tracer.iter[:]]
        tracer.result.save()
    assert seen == [0, 1, 2, 3]
    with pytest.raises(RecordingError, match="it is 1 at step 1") as caught:  # noqa: SIM117
        with model.generate(ENCODED, **GREEDY) as tracer:
            before = block.layer[
                0
            ].SelfAttention.source.past_key_values_get_seq_length_0.output  # it
            block.output[0][:] += before
            tracer.result.save()
    assert "# it" in str(caught.value)


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


# -- skips, stops ----------------------------------------------------------------------------------


def test_an_operation_is_skipped_at_every_step(gpt2, opened):
    model, path = opened(gpt2), ATTENTION["gpt2"].format(1)
    hand = lambda module, step, pattern: pattern * 0 + 0.25 if module == path else None
    with model.generate(IDS, **GREEDY) as tracer:
        soft = attention_of(model, "gpt2").source.softmax_0
        soft.skip(torch.full_like(soft.input, 0.25))
        pattern = weft.save([])
        for _ in tracer.iter[:]:
            pattern.append(attention_of(model, "gpt2", 2).output[1])
        ids = tracer.result.save()
    with by_hand(gpt2, hand):
        expected = own(gpt2)
    bitwise(ids, expected.sequences)
    bitwise(list(pattern), [step[2] for step in expected.attentions])


def test_a_skip_has_to_fit_every_step(gpt2, opened):
    model = opened(gpt2)
    with (
        pytest.raises(RecordingError, match="not valid at step 1"),
        model.generate(IDS, **GREEDY) as tracer,
    ):
        attention_of(model, "gpt2").source.softmax_0.skip(torch.zeros(1, 4, 9, 9))
        tracer.result.save()
    with model.generate(IDS, **GREEDY) as tracer, tracer.iter[3]:
        attention_of(model, "gpt2").source.softmax_0.skip(torch.zeros(1, 4, 1, 12))
        mixed = attention_of(model, "gpt2").output[0].save()
    assert mixed.shape == (1, 1, 4, 8) and not mixed.any()


def test_a_stop_that_asks_an_operation(gpt2, opened):
    model = opened(gpt2)
    largest = [step[1][0, 0, -1].max() for step in own(gpt2).attentions]
    bound = float(sorted(largest)[-1]) - 1e-6
    count = next(n for n, one in enumerate(largest) if one > bound)
    with model.generate(IDS, **GREEDY) as tracer:
        tracer.stop_if(attention_of(model, "gpt2").output[1][0, 0, -1].max() > bound)
        ids = tracer.result.save()
    bitwise(ids, own(gpt2).sequences[:, : 9 + count])


# -- several inputs, encoders ----------------------------------------------------------------------


def test_invokes(gpt2, opened):
    """Who names an operation has forwards of its own, with the bits that it has alone."""
    model = opened(gpt2)
    with model.generate(**GREEDY) as tracer:
        with tracer.invoke(IDS):
            attention_of(model, "gpt2").source.softmax_0.output[:, 0] = 0
            one = tracer.result.save()
        with tracer.invoke(SHORT):
            patterns = weft.save([])
            for _ in tracer.iter[:]:
                patterns.append(attention_of(model, "gpt2").output[1])
            two = tracer.result.save()
        with tracer.invoke(IDS):
            three = tracer.result.save()
        with tracer.invoke(SHORT):
            four = tracer.result.save()
    with by_hand(gpt2, no_head):
        bitwise(one, own(gpt2).sequences)
    expected = own(gpt2, SHORT)
    bitwise(two, expected.sequences)
    bitwise(list(patterns), [step[1] for step in expected.attentions])
    bitwise(three, own(gpt2).sequences)
    bitwise(four, two)


def test_an_encoder_and_a_decoder(opened):
    """Of the encoder at step 0, of the decoder and its cross-attention at each."""
    both_halves("t5", opened(eager_encoded("t5")), "encoder.block.1.layer.0.SelfAttention")


def both_halves(name, model, encoder):
    net, path = eager_encoded(name), CROSS[name]
    cross = lambda: model.get(path).source.attention_interface_0
    with model.generate(ENCODED, **GREEDY) as tracer:
        cross().source.softmax_0.output[:, 0] = 0
        with tracer.iter[0]:
            inner = model.get(encoder).source.attention_interface_0.source.softmax_0
            inner.output[:, 1] *= 0.5
        seen = weft.save([])
        for _ in tracer.iter[:]:
            seen.append(cross().output[1])
        ids = tracer.result.save()

    def hand(module, step, pattern):
        if module not in (path, encoder):
            return None
        pattern[:, int(module == encoder)] *= 0.5 * (module == encoder)
        return pattern

    with by_hand(net, hand) as patched:
        expected = own(net, ENCODED, pad_token_id=None)
    bitwise(ids, expected.sequences)
    bitwise(list(seen), [patched.seen[path, step] for step in range(NEW)])
    assert seen[0].shape == seen[-1].shape == (1, 4, 1, 7)


def test_keys_of_cross_attention_are_made_once(opened):
    """Later steps take them out of the cache."""
    net: Any = eager_encoded("t5")
    model = opened(net)
    keys = lambda: model.get(CROSS["t5"]).source.self_k_0
    with model.generate(ENCODED, **GREEDY) as tracer:
        with tracer.iter[0]:
            keys().output[:] *= 2
        out = weft.save([])
        for _ in tracer.iter[:]:
            out.append(model.get(CROSS["t5"]).output[0])
        ids = tracer.result.save()
    double = {f"{CROSS['t5']}.k.output": lambda step, h: h * 2, f"{CROSS['t5']}.output": None}
    seen = generated(net, ENCODED, double, **GREEDY)
    bitwise(ids, seen.result)
    bitwise(list(out), [seen[f"{CROSS['t5']}.output", step][0] for step in range(NEW)])
    with (
        pytest.raises(RecordingError, match=r"source.self_k_0 does not run there"),
        model.generate(ENCODED, **GREEDY) as tracer,
    ):
        keys().output[:] *= 2
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


# -- kept, edited, eager, near ---------------------------------------------------------------------


def test_run_again(gpt2, opened, tmp_path):
    model = opened(gpt2)
    with model.generate(IDS, **GREEDY) as tracer:
        attention_of(model, "gpt2").source.softmax_0.output[:, 0] = 0
        tracer.result.save("ids")
        for step in tracer.iter[:]:
            attention_of(model, "gpt2", 2).output[1].save(f"pattern {step}")
    tracer.graph.save(tmp_path / "no-head.weft")
    again = weft.Experiment.load(tmp_path / "no-head.weft")
    for ids in (IDS, SHORT):
        got = again.run(model, ids)
        with by_hand(gpt2, no_head):
            expected = own(gpt2, ids)
        bitwise(got["ids"], expected.sequences)
        patterns = [got[f"pattern {step}"] for step in range(NEW)]
        bitwise(patterns, [step[2] for step in expected.attentions])


def test_an_edited_model_generates(gpt2, opened):
    model = opened(gpt2)
    with model.edit() as edited:
        attention_of(model, "gpt2").source.softmax_0.output[:, 0] = 0
    with edited.generate(IDS, **GREEDY) as tracer:
        ids = tracer.result.save()
    with by_hand(gpt2, no_head):
        bitwise(ids, own(gpt2).sequences)


def test_a_look_and_values_as_they_come(gpt2, opened):
    model = opened(gpt2)
    expected = [step[1][0, 0, -1, 0] for step in own(gpt2).attentions]
    with model.generate(IDS, **GREEDY) as tracer:
        first = attention_of(model, "gpt2").source.softmax_0.output[0, 0, -1, 0]
        tracer.stream(first)
        assert float(first) == float(expected[0])
        ids = tracer.result.save()
    assert [float(one) for one in tracer.stream] == [float(one) for one in expected]
    bitwise(ids, own(gpt2).sequences)


def test_the_source_is_shown_at_a_step(gpt2, opened):
    model = opened(gpt2)
    with model.generate(IDS, **GREEDY) as tracer:
        with tracer.iter[1]:
            call = attention_of(model, "gpt2")
            assert "def eager_attention_forward" in call.source.text
            assert len(call.source.softmax_0.calls) == 1
        tracer.result.save()
