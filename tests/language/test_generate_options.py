"""Every option of `Sampling` in a block that edits: alone, and in steps that invokes share.

The oracle is `transformers`' own `generate` with the same edit as a plain hook. Where tokens are
drawn, its one draw is replaced by the keyed one: the token at which the summed probabilities pass
a number that seed, step and row decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import weft
from tests.families import zoo
from tests.language.generated import Seen, generated, keyed
from weft.families.sampling import OPTION_NAMES
from weft.testing.same import bitwise

NEW = 8
SEED = 11
BASE = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
DRAWN = {"do_sample": True, "top_k": 0, "seed": SEED}


def prompt(*lengths: int) -> torch.Tensor:
    return torch.tensor(zoo.tokens(*lengths, seed=sum(lengths)))


PROMPTS = (prompt(6), prompt(9), prompt(6, 6))
SINGLE = prompt(1)

Answers = list[list[int]]
"""New tokens of each row, of all prompts, as they are without the option."""


def ends(answers: Answers, at: int = 2) -> int:
    """A token that ends a row in the middle."""
    return next(row[at] for row in answers if row[at] not in row[:at])


EACH: dict[str, Callable[[Answers], dict[str, Any]]] = {
    "max_new_tokens": lambda answers: {"max_new_tokens": 3},
    "min_new_tokens": lambda answers: {"min_new_tokens": 5, "eos_token_id": ends(answers)},
    "min_length": lambda answers: {"min_length": 12, "eos_token_id": ends(answers)},
    "do_sample": lambda answers: DRAWN,
    "temperature": lambda answers: {**DRAWN, "temperature": 0.2},
    "top_k": lambda answers: {**DRAWN, "top_k": 4},
    "top_p": lambda answers: {**DRAWN, "top_p": 0.5},
    "min_p": lambda answers: {**DRAWN, "min_p": 0.6},
    "typical_p": lambda answers: {**DRAWN, "typical_p": 0.3},
    "epsilon_cutoff": lambda answers: {**DRAWN, "epsilon_cutoff": 0.012},
    "eta_cutoff": lambda answers: {**DRAWN, "eta_cutoff": 0.05},
    "repetition_penalty": lambda answers: {"repetition_penalty": 3.0},
    "no_repeat_ngram_size": lambda answers: {"no_repeat_ngram_size": 1},
    "bad_words_ids": lambda answers: {"bad_words_ids": [[answers[0][1]], answers[1][1:3]]},
    "suppress_tokens": lambda answers: {"suppress_tokens": [row[2] for row in answers]},
    "begin_suppress_tokens": lambda answers: {"begin_suppress_tokens": [r[0] for r in answers]},
    "forced_bos_token_id": lambda answers: {"forced_bos_token_id": 41},
    "forced_eos_token_id": lambda answers: {"forced_eos_token_id": 42},
    "exponential_decay_length_penalty": lambda answers: {
        "exponential_decay_length_penalty": (1, 3.0),
        "eos_token_id": [40, 50],
    },
    "renormalize_logits": lambda answers: {**DRAWN, "top_k": 6, "renormalize_logits": True},
    "eos_token_id": lambda answers: {"eos_token_id": [ends(answers), ends(answers, 4)]},
    "pad_token_id": lambda answers: {"eos_token_id": answers[2][0], "pad_token_id": 17},
    "use_cache": lambda answers: {"use_cache": False},
}
"""By name: what to give, for the answers that there are without it."""

ELSEWHERE = {
    "max_length": "test_generate_invokes: steps differ between prompts",
    "remove_invalid_values": "below: with NaN",
    "stop_strings": "test_generate_several and tests/families: with a tokenizer",
    "logits_to_keep": "below: it changes no token",
    "output_attentions": "below: it changes no token",
    "output_hidden_states": "below: it changes no token",
    "seed": "in all that are drawn",
}
IDLE = {"renormalize_logits", "use_cache"}
"""They change no token; with any other the tokens must be others."""


def theirs(subject: Any, ids: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> Seen:
    """`generate` of transformers, with `v` added after layer 1 at every step."""

    def add(step: int, h: torch.Tensor) -> None:
        h += v

    given = {**BASE, **options}
    seed = given.pop("seed", 0)
    hooks = {f"{subject.paths.layer(1)}.output": add}
    with keyed(seed):
        return generated(subject.net, ids, hooks, attention_mask=torch.ones_like(ids), **given)


def alone(subject: Any, ids: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> Any:
    """The same in a block of its own."""
    with subject.model.generate(ids, **{**BASE, **options}) as tracer:
        subject.model.get(subject.paths.layer(1)).output[:] += v
        result = tracer.result.save()
    return result


def together(
    subject: Any, v: torch.Tensor, options: dict[str, Any], prompts: Sequence[torch.Tensor]
) -> list[Any]:
    """The same with one invoke for each prompt."""
    found = []
    with subject.model.generate(**{**BASE, **options}) as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                subject.model.get(subject.paths.layer(1)).output[:] += v
                found.append(tracer.result.save())
    return found


def test_each_option_is_here() -> None:
    assert sorted([*EACH, *ELSEWHERE]) == sorted(OPTION_NAMES)


@pytest.fixture
def answers(gpt2: Any, v: torch.Tensor) -> Answers:
    each = [theirs(gpt2, ids, v, {}).result[:, -NEW:] for ids in PROMPTS]
    return torch.cat(each).tolist()


@pytest.mark.parametrize("name", EACH)
def test_an_option_means_what_it_means_to_transformers(
    gpt2: Any, v: torch.Tensor, answers: Answers, name: str
) -> None:
    options = EACH[name](answers)
    prompts = (SINGLE,) * 3 if name == "forced_bos_token_id" else PROMPTS
    expected = [theirs(gpt2, ids, v, options).result for ids in prompts]
    without = {one: value for one, value in options.items() if one != name}
    plain = [theirs(gpt2, ids, v, without).result for ids in prompts]
    pairs = zip(expected, plain, strict=True)
    assert (name in IDLE) == all(torch.equal(one, other) for one, other in pairs)
    bitwise(alone(gpt2, prompts[-1], v, options), expected[-1])
    bitwise(together(gpt2, v, options, prompts), expected)


def test_invalid_values_are_removed(gpt2: Any) -> None:
    """The edit makes some, at every step."""

    def spoil(step: int, logits: torch.Tensor) -> None:
        logits[..., 5], logits[..., 9], logits[..., :5] = float("nan"), float("-inf"), -1.0

    options = {**BASE, "remove_invalid_values": True}
    hooks = {"lm_head.output": spoil}
    expected = [generated(gpt2.net, ids, hooks, **options).result for ids in PROMPTS]
    plain = generated(gpt2.net, PROMPTS[0], hooks, **BASE).result
    assert not torch.equal(plain, expected[0])
    found = []
    with gpt2.model.generate(**options) as tracer:
        for ids in PROMPTS:
            with tracer.invoke(ids):
                logits = gpt2.model.lm_head.output
                logits[..., 5], logits[..., 9] = float("nan"), float("-inf")
                logits[..., :5] = -1.0
                found.append(tracer.result.save())
    bitwise(found, expected)


def test_results_of_steps_have_what_was_asked_for(place: Any, v: torch.Tensor) -> None:
    net: Any = zoo.build("gpt2", attn_implementation="eager")
    more = {"output_hidden_states": True, "output_attentions": True}
    seen: dict[int, Any] = {}

    def add(step: int, h: torch.Tensor) -> None:
        h += v

    def keep(step: int, output: Any) -> None:
        seen[step] = output.hidden_states[2], output.attentions[2]

    hooks = {"transformer.h.1.output": add, ".output": keep}
    expected = generated(net, PROMPTS[1], hooks, **{**BASE, "max_new_tokens": 3}, **more)
    model = place.language(net)
    options = {**BASE, "max_new_tokens": 3, "logits_to_keep": 0, **more}
    with model.generate(PROMPTS[1], **options) as tracer:
        model.transformer.h[1].output[:] += v
        found = weft.save([])
        for _ in tracer.iter[:]:
            found.append((model.output.hidden_states[2], model.output.attentions[2]))
        logits = model.output.logits.save()
        result = tracer.result.save()
    bitwise(result, expected.result)
    bitwise(list(found), [seen[step] for step in range(3)])
    assert logits.shape == (1, 9, zoo.VOCAB)
