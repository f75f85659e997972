"""Options, scores and draws. Oracle of the scores: the processors of transformers, in its order."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.families import zoo
from weft.errors import SamplingError, UnknownOptionError
from weft.families.sampler import Sampler
from weft.families.sampling import OPTION_NAMES, Sampling, sampling_of
from weft.families.scores import processed, score_steps

PROMPT = 5


# -- options ---------------------------------------------------------------------------------------


def test_without_options_all_is_as_transformers_would_take_it() -> None:
    net: Any = zoo.build("llama")
    general = net.generation_config._get_default_generation_params()
    ours = sampling_of({}, net.generation_config)
    for name in OPTION_NAMES:
        expected = getattr(net.generation_config, name, None)
        if expected is None and name != "max_length":
            expected = general.get(name)
        if name in ("renormalize_logits", "output_attentions", "output_hidden_states"):
            expected = bool(expected)
        if name == "logits_to_keep":
            expected = 1
        if name == "eos_token_id":
            expected = (expected,)
        assert getattr(ours, name) == expected, name


def test_none_turns_an_option_of_the_model_off() -> None:
    shipped = {"top_k": 3, "eos_token_id": 2, "repetition_penalty": 1.2}
    assert sampling_of({}, shipped).eos_token_id == (2,)
    off = sampling_of({"top_k": None, "eos_token_id": None, "repetition_penalty": None}, shipped)
    assert (off.top_k, off.eos_token_id, off.repetition_penalty) == (None, None, None)


@pytest.mark.parametrize(
    ("option", "message", "fix"),
    [
        ({"num_beams": 4}, "num_beams=4: beam search is not offered", "num_beams=1"),
        ({"penalty_alpha": 0.6}, "contrastive search", "penalty_alpha=None"),
        ({"num_return_sequences": 2}, "one sequence", r"\[prompt\] \* n"),
        ({"assistant_model": "small"}, "assisted decoding", "leave it out"),
        ({"output_scores": True}, "the result of a generation is its token ids", "save"),
        ({"return_dict_in_generate": True}, "is its token ids", "save"),
        ({"cache_implementation": "static"}, "the cache grows", "leave it out"),
        ({"max_time": 3.0}, "on another day", "max_new_tokens"),
        ({"presence_penalty": 1.0}, "unknown option 'presence_penalty'", "repetition_penalty"),
        ({"max_tokens": 3}, "unknown option", "max_new_tokens"),
        ({"temprature": 3}, "unknown option", "did you mean temperature?"),
        ({"custom_generate": "x"}, "unknown option", "no code of others"),
        ({"temperature": 0}, "temperature=0: it is a number above 0", ""),
        ({"temperature": float("nan")}, "above 0", ""),
        ({"top_p": 1.5}, "from 0 to 1", ""),
        ({"top_k": -1}, "whole number, 0 or more", ""),
        ({"top_k": 1.5}, "whole number", ""),
        ({"max_new_tokens": 0}, "1 or more", ""),
        ({"max_new_tokens": True}, "1 or more", ""),
        ({"do_sample": 1}, "True or False", ""),
        ({"eos_token_id": "</s>"}, "a token id or several", ""),
        ({"stop_strings": ["a", ""]}, "none of them empty", ""),
        ({"bad_words_ids": [3]}, "list of lists", ""),
        ({"seed": -1}, "0 or more", ""),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refused(option: dict[str, Any], message: str, fix: str) -> None:
    with pytest.raises(UnknownOptionError, match=f"(?s){message}.*{fix}"):
        sampling_of(option)


def test_what_the_models_config_asks_for_and_is_not_offered() -> None:
    with pytest.raises(UnknownOptionError, match="num_beams=4 in the model's generation config"):
        sampling_of({}, {"num_beams": 4})
    assert sampling_of({"num_beams": 1}, {"num_beams": 4}) == Sampling()
    assert sampling_of({}, {"cache_implementation": "hybrid", "output_scores": True}) == Sampling()


def test_every_option_of_transformers_is_taken_or_refused_by_name() -> None:
    """A new field of GenerationConfig must be looked at: this test fails then."""
    import transformers

    from weft.families.sampling import _IDLE, _UNSUPPORTED

    known = {*OPTION_NAMES, *_UNSUPPORTED, *_IDLE}
    aside = {
        # of the config itself, of beams and assistants, or of how fast it runs
        *("transformers_version", "bos_token_id", "decoder_start_token_id", "cache_config"),
        *("early_stopping", "length_penalty", "use_mtp", "max_cache_len", "low_memory"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
        *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"),
        *("assistant_ensemble_weight", "target_lookbehind", "speculation_type"),
        *("max_matching_ngram_size", "compile_config", "disable_compile"),
        *("continuous_batching_config",),
    }
    names = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    assert names - known == aside


def test_a_sampling_is_plain_and_can_be_a_key() -> None:
    one = sampling_of({"eos_token_id": [1, 2], "bad_words_ids": [[3], [4, 5]], "stop_strings": "a"})
    assert hash(one) == hash(sampling_of({f.name: getattr(one, f.name) for f in fields(one)}))


# -- scores ----------------------------------------------------------------------------------------


def _theirs(sampling: dict[str, Any], real: torch.Tensor | None) -> Any:
    """The processors that generate makes for these options."""
    net: Any = zoo.build("gpt2")
    config, _ = net._prepare_generation_config(None, **sampling)
    net._prepare_special_tokens(config, False)
    config = net._prepare_generated_length(
        config,
        has_default_max_length="max_length" not in sampling,
        has_default_min_length="min_length" not in sampling,
        model_input_name="input_ids",
        inputs_tensor=torch.zeros(1, PROMPT),
        input_ids_length=PROMPT,
    )
    return net._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=PROMPT,
        encoder_input_ids=torch.zeros(1, PROMPT, dtype=torch.int64),
        device="cpu",
        model_kwargs={"attention_mask": real},
    )


def _agree(options: dict[str, Any], length: int, seed: int, padded: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 12, (3, length), generator=draw)
    logits = 3 * torch.randn(3, zoo.VOCAB, generator=draw)
    logits[0, :3] = torch.tensor([float("-inf"), float("-inf"), 1e4])
    real = torch.ones(3, PROMPT, dtype=torch.bool)
    if padded:
        real[1, :2] = False
    sampling = sampling_of(options)
    longest = sampling.longest(PROMPT, 64)
    steps = score_steps(sampling, prompt=PROMPT, longest=longest, real=real if padded else None)
    expected = _theirs(options, real.long() if padded else None)(ids, logits.clone())
    torch.testing.assert_close(processed(steps, ids, logits), expected, rtol=0, atol=0)


EACH: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 3},
    {"bad_words_ids": [[4], [5, 6], [2], list(range(9))]},
    {"min_length": 9},
    {"min_new_tokens": 4, "max_new_tokens": 20},
    {"forced_bos_token_id": 7},
    {"forced_eos_token_id": [7, 8], "max_new_tokens": 4},
    {"remove_invalid_values": True},
    {"exponential_decay_length_penalty": (1, 1.3)},
    {"suppress_tokens": [1, 2, 90]},
    {"begin_suppress_tokens": [1, 2, 90]},
    {"begin_suppress_tokens": [1, 90], "forced_bos_token_id": 7},
    {"renormalize_logits": True},
    {"do_sample": True},
    {"do_sample": True, "top_k": 0, "temperature": 0.3},
    {"do_sample": True, "top_k": 5},
    {"do_sample": True, "top_k": 1000},
    {"do_sample": True, "top_k": None, "top_p": 0.7},
    {"do_sample": True, "top_k": 0, "top_p": 0.0},
    {"do_sample": True, "top_k": 0, "min_p": 0.05},
    {"do_sample": True, "top_k": 0, "typical_p": 0.5},
    {"do_sample": True, "top_k": 0, "epsilon_cutoff": 0.02},
    {"do_sample": True, "top_k": 0, "eta_cutoff": 0.02},
    {"temperature": 0.5, "top_p": 0.5},  # of no effect: nothing is drawn
]


@pytest.mark.parametrize("options", EACH, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore")  # transformers' own, for options without effect
def test_scores_are_those_of_transformers(options: dict[str, Any], padded: bool) -> None:
    for length in (5, 6, 8, 12):
        _agree({"eos_token_id": [2, 9], **options}, length, length, padded)


MIXTURES = st.fixed_dictionaries(
    {"do_sample": st.booleans(), "eos_token_id": st.sampled_from([2, [2, 9]])},
    optional={
        "temperature": st.floats(0.2, 3.0),
        "top_k": st.integers(0, 60),
        "top_p": st.floats(0.1, 1.0),
        "min_p": st.floats(0.0, 0.3),
        "typical_p": st.floats(0.1, 1.0),
        "epsilon_cutoff": st.floats(0.0, 0.1),
        "eta_cutoff": st.floats(0.0, 0.1),
        "repetition_penalty": st.floats(0.5, 2.0),
        "no_repeat_ngram_size": st.integers(0, 3),
        "min_new_tokens": st.integers(0, 9),
        "suppress_tokens": st.lists(st.integers(0, 99), min_size=1),
        "remove_invalid_values": st.booleans(),
        "renormalize_logits": st.booleans(),
    },
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(options=MIXTURES, length=st.integers(5, 14), seed=st.integers(0, 99), padded=st.booleans())
@pytest.mark.filterwarnings("ignore")
def test_in_every_mixture_too(
    options: dict[str, Any], length: int, seed: int, padded: bool
) -> None:
    _agree(options, length, seed, padded)


# -- draws -----------------------------------------------------------------------------------------


def _sampler(rows: int, **options: Any) -> Sampler:
    prompt = torch.zeros(rows, PROMPT, dtype=torch.int64)
    given = {"do_sample": True, "top_k": 0, "eos_token_id": None, **options}
    return Sampler(sampling_of(given), prompt, None, PROMPT + 20)


def _drawn(logits: torch.Tensor, length: int = PROMPT, **options: Any) -> torch.Tensor:
    ids = torch.zeros(len(logits), length, dtype=torch.int64)
    return _sampler(len(logits), **options).choose(ids, logits)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    scores = torch.tensor([0.0, 2.0, float("-inf"), 1.0, -1.0, float("-inf")])
    drawn = _drawn(scores.expand(20000, 6), seed=3)
    counts = drawn.bincount(minlength=6).double()
    expected = 20000 * scores.double().softmax(-1)
    there = expected > 0
    squares = ((counts - expected)[there] ** 2 / expected[there]).sum()
    assert counts[~there].sum() == 0
    assert squares < 16.3  # chi-square of 3 degrees of freedom, p = 0.001


def test_a_draw_depends_on_seed_step_and_row_only() -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    whole = _drawn(logits, seed=5)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert torch.equal(_drawn(logits[:3], seed=5), whole[:3])
    assert torch.equal(_drawn(logits + 1e-7, seed=5), whole)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(_drawn(logits, seed=6), whole)
    assert not torch.equal(_drawn(logits, PROMPT + 1, seed=5), whole)
    same = _drawn(logits[:1].expand(8, 50), seed=5)
    assert len(set(same.tolist())) > 3


def test_without_a_seed_the_global_one_counts_and_is_told() -> None:
    torch.manual_seed(4)
    one, other = _sampler(1), _sampler(1)
    torch.manual_seed(4)
    again = _sampler(1)
    assert one.seed == again.seed
    assert one.seed != other.seed
    assert _sampler(1, do_sample=False, seed=3).seed is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_cannot_be_drawn_from_is_said(bad: float) -> None:
    logits = torch.zeros(3, 6)
    logits[1, 4] = bad
    with pytest.raises(SamplingError, match="at step 2 are no distribution in row 1"):
        _drawn(logits, PROMPT + 2)
    assert _drawn(logits, remove_invalid_values=True).shape == (3,)
    with pytest.raises(SamplingError, match="in row 0"):
        _drawn(torch.full((1, 6), float("-inf")))


def test_a_row_that_has_ended_need_not_be_a_distribution() -> None:
    sampler = _sampler(2, eos_token_id=3, pad_token_id=1)
    ids = torch.zeros(2, PROMPT + 1, dtype=torch.int64)
    ids[0, -1] = 3
    assert not sampler.ended(ids)
    assert sampler.open.tolist() == [False, True]
    logits = torch.zeros(2, 6)
    logits[0] = float("nan")
    assert sampler.choose(ids, logits)[0] == 1


def test_bfloat16_logits_are_drawn_from_in_float32() -> None:
    logits = torch.randn(4, 50).bfloat16()
    assert torch.equal(_drawn(logits, seed=1), _drawn(logits.float(), seed=1))
