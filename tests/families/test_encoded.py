"""Generations of an encoder-decoder are those of transformers; the encoder runs in step 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from tests.families import zoo
from tests.families.decoded import noting_calls, run
from weft.errors import InputError
from weft.families.decoding import Decoding
from weft.families.encoded import EncoderDecoding, generation_of
from weft.families.forward import language_facts
from weft.families.prepare import prepare_language
from weft.families.sampling import sampling_of

ROWS = torch.tensor(zoo.tokens(6, 6))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=zoo.VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
    )
    config.decoder_start_token_id = 0
    with torch.random.fork_rng(devices=[]):
        net = transformers.T5ForConditionalGeneration(config)
    zoo.randomize(net, 0)
    return net.eval()


def _decoding(net: Any, ids: Any, mask: Any = None, **options: Any) -> EncoderDecoding:
    sampling = sampling_of(options, net.generation_config)
    facts = language_facts(net.config, type(net))
    masks = {} if mask is None else {"attention_mask": mask}
    call = prepare_language(ids, None, facts, tensors=masks)
    one = generation_of(net, call, sampling)
    assert isinstance(one, EncoderDecoding)
    return one


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mask", [None, MASK, MASK.flip(1)], ids=["full", "right", "left"])
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 8},
        {"max_length": 6},
        {"max_new_tokens": 8, "repetition_penalty": 1.5},
        {"max_new_tokens": 8, "eos_token_id": list(range(60)), "pad_token_id": 3},
    ],
    ids=str,
)
def test_tokens_are_those_of_transformers(options: Any, mask: Any, use_cache: bool) -> None:
    net = _t5()
    one = _decoding(net, ROWS, mask, use_cache=use_cache, **options)
    given = torch.ones_like(ROWS) if mask is None else mask
    expected = net.generate(input_ids=ROWS, attention_mask=given, use_cache=use_cache, **options)
    assert torch.equal(run(net, one), expected)


def test_the_encoder_runs_once_and_in_step_0() -> None:
    net = _t5()
    count = []
    hook = net.encoder.register_forward_hook(lambda m, a, out: count.append(len(calls_seen)))
    calls_seen: list[int] = []
    root = net.register_forward_pre_hook(lambda m, a: calls_seen.append(1))
    one = _decoding(net, ROWS, MASK, max_new_tokens=5, eos_token_id=None)
    calls, _ = noting_calls(net, lambda: run(net, one))
    hook.remove()
    root.remove()
    assert count == [1]
    assert len(calls) == 5
    assert ["input_ids" in call for call in calls] == [True] + [False] * 4
    assert [call["decoder_input_ids"].shape[1] for call in calls] == [1] * 5
    assert all(torch.equal(call["attention_mask"], MASK) for call in calls)


def test_an_answer_that_cannot_grow_and_models_of_the_other_kind_are_refused() -> None:
    net = _t5()
    with pytest.raises(InputError, match="has 1 tokens, max_length is 1"):
        _decoding(net, ROWS, max_length=1)
    gpt2: Any = zoo.build("gpt2")
    call = prepare_language(ROWS, None, language_facts(gpt2.config, type(gpt2)))
    with pytest.raises(InputError, match="has no encoder"):
        EncoderDecoding(gpt2, call, sampling_of({}))
    with pytest.raises(InputError, match="has an encoder"):
        Decoding(net, call, sampling_of({}))
    net.config.decoder_start_token_id = net.config.bos_token_id = None
    with pytest.raises(InputError, match="with which token an answer begins"):
        _decoding(net, ROWS)
