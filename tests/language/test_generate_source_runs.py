"""Operations at the steps of a generation: skipped, asked by stops, in several invokes, in both
halves of an encoder-decoder, in experiments that are kept. See `test_generate_source`."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch

import weft
from tests.language import sources
from tests.language.generated import generated
from tests.language.sources import (
    ATTENTION,
    GREEDY,
    IDS,
    NEW,
    SHORT,
    attention_of,
    by_hand,
    eager,
    no_head,
    own,
)
from tests.language.test_generate_encoded import CROSS, built
from tests.language.test_generate_encoded import IDS as ENCODED
from weft.errors import RecordingError
from weft.testing.same import bitwise


@pytest.fixture
def opened(place):
    """Gives a handle on a model, in the place where this test runs."""
    return lambda net: sources.opened(place, net)


@cache
def eager_encoded(name):
    net: Any = copy.deepcopy(built(name))
    net.set_attn_implementation("eager")
    return net


@pytest.fixture
def gpt2():
    return eager("gpt2")


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
