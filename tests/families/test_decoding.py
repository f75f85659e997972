"""A generation is the one of transformers: the same forwards, the same numbers, the same tokens."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import transformers

from tests.families import zoo
from tests.families.decoded import (
    EVERY,
    assert_same,
    build,
    decoding,
    generated,
    noting_calls,
    prompt,
    run,
)
from weft.errors import InputError, SamplingError
from weft.families.call import ModelCall
from weft.families.decoding import Decoding
from weft.families.sampling import Sampling, sampling_of
from weft.families.stopping import stop_strings

NEW = 8


def _prompts(name: str) -> list[list[list[int]]]:
    """One row; rows of several lengths, or of one where padding is not verified."""
    return [zoo.tokens(4), zoo.tokens(5, 5) if name == "mamba" else zoo.tokens(3, 9)]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", EVERY)
def test_each_forward_and_each_token_is_that_of_transformers(name: str, use_cache: bool) -> None:
    net = build(name)
    before = {path: buffer.clone() for path, buffer in net.named_buffers()}
    for rows in _prompts(name):
        call = prompt(net, rows)
        options: Any = {"max_new_tokens": NEW, "use_cache": use_cache}
        theirs, expected = noting_calls(net, lambda c=call, o=options: generated(net, c, **o))
        for path, buffer in net.named_buffers():  # generate leaves rotary frequencies changed
            buffer.copy_(before[path])
        one = decoding(net, call, **options)
        ours, got = noting_calls(net, lambda d=one: run(net, d))
        assert len(ours) == one.step + 1
        assert_same(ours, theirs)
        assert_same(got, expected)
        assert_same(dict(net.named_buffers()), before)


def test_a_long_rope_really_switches_in_these_tests() -> None:
    net = build("phi3 longrope")
    one = decoding(net, zoo.tokens(4), max_new_tokens=NEW)
    calls, _ = noting_calls(net, lambda: run(net, one))
    assert [call["input_ids"].shape[1] for call in calls] == [4, 1, 1, 1, 1, 1, 1, 11]


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "mamba"])
def test_ended_rows_are_padded_until_all_have_ended(name: str) -> None:
    net = build(name)
    call = prompt(net, zoo.tokens(5, 5, 5))
    free = run(net, decoding(net, call, max_new_tokens=NEW))
    ends = [int(free[0, 5 + 1]), int(free[1, 5 + 4])]
    for options in (
        {"eos_token_id": ends, "pad_token_id": 7},
        {"eos_token_id": ends[0], "pad_token_id": None},  # the end of sequence itself
        {"eos_token_id": None},
    ):
        got = run(net, decoding(net, call, max_new_tokens=NEW, **options))
        expected = generated(net, call, max_new_tokens=NEW, **options)
        assert torch.equal(got, expected)


def test_the_generation_is_over_when_all_rows_have_ended() -> None:
    net = zoo.build("llama")
    free = run(net, decoding(net, zoo.tokens(5), max_new_tokens=NEW))
    end = int(free[0, 7])
    one = decoding(net, zoo.tokens(5), max_new_tokens=NEW, eos_token_id=end)
    got = run(net, one)
    assert got.shape[1] <= 8
    assert got[0, -1] == end
    assert one.over
    assert one.step == got.shape[1] - 5 - 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 9},
        {"max_length": 9, "max_new_tokens": 2},
        {},  # 20 new ones
        {"max_new_tokens": NEW, "min_new_tokens": 6},
        {"max_new_tokens": NEW, "min_length": 10},
        {"max_new_tokens": NEW, "repetition_penalty": 1.7},
        {"max_new_tokens": NEW, "no_repeat_ngram_size": 2},
        {"max_new_tokens": NEW, "suppress_tokens": [3, 50, 90], "begin_suppress_tokens": [4]},
        {"max_new_tokens": NEW, "forced_eos_token_id": 5},
        {"max_new_tokens": NEW, "bad_words_ids": [[60], [61, 62]]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_options_mean_what_they_mean_to_transformers(options: dict[str, Any]) -> None:
    net = zoo.build("qwen2")
    call = prompt(net, zoo.tokens(3, 6))
    some = run(net, decoding(net, call, max_new_tokens=NEW))
    options = {"eos_token_id": int(some[0, 8]), "pad_token_id": 0, **options}
    if "bad_words_ids" in options:
        options["bad_words_ids"] = [[int(some[0, 7])], some[1, 8:10].tolist()]
    assert torch.equal(run(net, decoding(net, call, **options)), generated(net, call, **options))


def test_what_the_models_own_config_says_counts() -> None:
    net: Any = zoo.build("llama")
    call = prompt(net, zoo.tokens(4))
    net.generation_config.update(
        do_sample=True, top_k=3, temperature=0.5, max_length=9, eos_token_id=[2, 9]
    )
    sampling = sampling_of({}, net.generation_config)
    assert (sampling.do_sample, sampling.top_k, sampling.temperature) == (True, 3, 0.5)
    assert sampling.eos_token_id == (2, 9)
    assert run(net, decoding(net, call, seed=0)).shape == (1, 9)
    got = run(net, decoding(net, call, do_sample=False, max_new_tokens=3))
    assert torch.equal(got, generated(net, call, do_sample=False, max_new_tokens=3))


def test_stop_strings_end_a_row() -> None:
    """Against transformers' own criterion, on a tokenizer of bytes and pieces of words."""
    tokenizer = _of_bytes()
    net = zoo.build("gpt2", vocab_size=len(tokenizer))
    start = tokenizer("the hat, the mat")["input_ids"]
    call = prompt(net, torch.tensor([start] * 2))
    draw: Any = {"max_new_tokens": 20, "eos_token_id": None, "top_k": 8, "do_sample": True}
    free = run(net, decoding(net, call, **draw, seed=1))
    texts = [tokenizer.decode(row[len(start) :]) for row in free.tolist()]
    whole = free.shape[1]
    ended = 0
    for stop in {text[at : at + n] for text in texts for at in (2, 9, 14, 20) for n in (1, 2, 4)}:
        if "\ufffd" in stop:
            continue
        got = run(net, decoding(net, call, tokenizer, **draw, stop_strings=[stop, "never"], seed=1))
        criteria = transformers.StopStringCriteria(tokenizer, [stop, "never"])
        lengths = range(len(start) + 1, whole + 1)
        ends = [criteria(free[:, :n], None) for n in lengths]  # type: ignore[arg-type]
        ended_by = torch.stack(ends).cumsum(0).clamp(max=1).sum(0)  # of each row: for how many
        expected = min(whole, whole - int(ended_by.min()) + 1)
        assert got.shape[1] == expected, repr(stop)
        assert torch.equal(got, free[:, :expected])
        ended += expected < whole
    assert ended > 3


def _of_bytes() -> Any:
    """A byte-level tokenizer, trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the cat and the hat sat on the mat, that is that"] * 5, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_stop_string_may_begin_in_the_prompt_and_must_end_anew() -> None:
    words = _Letters()
    stopped = stop_strings(Sampling(stop_strings=("aba",)), words)
    assert stopped is not None

    def ends(*texts: str) -> list[bool]:
        return stopped(torch.tensor([[ord(one) for one in text] for text in texts])).tolist()

    assert ends("xaba", "abab", "abax", "baba") == [True, False, False, True]
    assert ends("aba" + "x" * 30, "x" * 30 + "aba") == [False, True]


class _Letters:
    """A tokenizer of letters."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        decoding(zoo.build("gpt2"), zoo.tokens(4), stop_strings="a")


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_a_prompt_of_embeddings_gives_the_answer_alone(name: str) -> None:
    net: Any = zoo.build(name)
    embeds = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    call = prompt(net, None, inputs_embeds=embeds)
    got = run(net, decoding(net, call, max_new_tokens=NEW))
    assert torch.equal(got, generated(net, call, max_new_tokens=NEW))
    assert got.shape[1] <= NEW


def test_positions_of_ones_own_go_on_from_the_last() -> None:
    net = zoo.build("llama")
    ids = torch.tensor(zoo.tokens(4))
    call = prompt(net, ids, position_ids=torch.tensor([3, 7, 8, 11]))
    for use_cache in (True, False):
        one = decoding(net, call, max_new_tokens=3, use_cache=use_cache)
        calls, _ = noting_calls(net, lambda d=one: run(net, d))
        assert [int(c["position_ids"][0, -1]) for c in calls] == [11, 12, 13]
    assert calls[0]["attention_mask"].all()  # else the jumps would be taken for packed sequences


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_cache_changes_no_token(use_cache: bool) -> None:
    net = zoo.build("gemma3")
    one = decoding(net, zoo.tokens(3, 9), max_new_tokens=NEW, use_cache=use_cache)
    other = decoding(net, zoo.tokens(3, 9), max_new_tokens=NEW)
    assert torch.equal(run(net, one), run(net, other))


# -- refused ---------------------------------------------------------------------------------------


def test_too_few_positions_are_said_before_anything_runs() -> None:
    net = zoo.build("gpt2")
    rows = [zoo.tokens(60)[0]]
    run(net, decoding(net, rows, max_new_tokens=5))  # the last one is not run
    with pytest.raises(InputError, match="64 positions") as caught:
        decoding(net, rows, max_new_tokens=6)
    assert caught.value.fix == "max_new_tokens=5, or a shorter prompt"


def test_a_prompt_that_is_too_long_already() -> None:
    with pytest.raises(InputError, match="max_length is 4") as caught:
        decoding(zoo.build("llama"), zoo.tokens(4), max_length=4)
    assert caught.value.fix == "give max_new_tokens"


def test_padding_on_the_right_is_refused() -> None:
    net = zoo.build("llama")
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    call = prompt(net, torch.tensor(zoo.tokens(4, 4)), attention_mask=mask)
    with pytest.raises(InputError, match="row 1 of the prompt ends with padding"):
        decoding(net, call)


def test_a_module_that_cannot_generate() -> None:
    call = ModelCall((), {"input_ids": torch.ones(1, 2, dtype=torch.int64)}, batch=1, length=2)
    with pytest.raises(InputError, match="Linear cannot generate"):
        Decoding(torch.nn.Linear(2, 2), call, Sampling())


# -- what is left behind ---------------------------------------------------------------------------


def _cache(one: Decoding) -> weakref.ref[Any]:
    return weakref.ref(one.kept["past_key_values"])


def test_no_cache_outlives_the_generation() -> None:
    net = zoo.build("llama")
    one = decoding(net, zoo.tokens(4), max_new_tokens=3)
    call = one.begin()
    cache = _cache(one)
    with torch.no_grad():
        while call is not None:
            call = one.next(net(**call[1]))
    gc.collect()
    assert one.result.shape == (1, 7)
    assert cache() is None


def test_nothing_is_left_after_an_error_or_an_early_end() -> None:
    net: Any = build("phi3 longrope")
    before = {path: buffer.clone() for path, buffer in net.named_buffers()}
    plain = {path: set(vars(one)) for path, one in net.named_modules()}
    for early in (True, False):
        one = decoding(net, zoo.tokens(12), max_new_tokens=5, do_sample=True, seed=0)
        call: Any = one.begin()
        cache = _cache(one)
        with torch.no_grad():
            output = net(**call[1])
        assert not torch.equal(net.model.rotary_emb.inv_freq, before["model.rotary_emb.inv_freq"])
        if early:
            one.close()
        else:
            output.logits[:] = float("nan")
            with pytest.raises(SamplingError):
                one.next(output)
        del call, output
        gc.collect()
        assert cache() is None
        assert_same(dict(net.named_buffers()), before)
        assert {path: set(vars(one)) for path, one in net.named_modules()} == plain
