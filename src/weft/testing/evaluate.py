"""Measures a model on the tasks of the tiny corpus: plain torch and one transformers model.

Not a benchmark: the prompts are those of `weft.testing.corpus`, and the tokenizer must keep each
answer as one token, as that of the tiny model does.

    scores = evaluate(model, tokenizer)
    assert scores.ioi_accuracy > 0.9
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from weft.testing import corpus
from weft.testing.corpus import Contrast, IoiPair, Prompt


@dataclass(frozen=True)
class Scores:
    """What `evaluate` found. Accuracies are shares from 0 to 1, losses nats per token."""

    ioi_accuracy: float
    ioi_logit_difference: float
    induction_first_half: float
    induction_second_half: float
    facts: float
    two_hop_facts: float
    sums: float
    agreement: float


def evaluate(model: Any, tokenizer: Any, n: int = 256, seed: int = 1) -> Scores:
    """All figures; `n` held-out prompts of each open kind, and the closed lists whole."""
    ioi_right, ioi_difference = ioi(model, tokenizer, corpus.ioi_pairs(n, seed))
    first, second = induction_loss(model, tokenizer, corpus.induction_sequences(n, seed))
    return Scores(
        ioi_accuracy=ioi_right,
        ioi_logit_difference=ioi_difference,
        induction_first_half=first,
        induction_second_half=second,
        facts=accuracy(model, tokenizer, corpus.facts()),
        two_hop_facts=accuracy(model, tokenizer, corpus.two_hop_facts()),
        sums=accuracy(model, tokenizer, corpus.sums()),
        agreement=preference(model, tokenizer, corpus.agreement(n, seed)),
    )


def ioi(model: Any, tokenizer: Any, pairs: Sequence[IoiPair]) -> tuple[float, float]:
    """Accuracy, and mean logit difference (answer minus wrong), on the clean prompts.

    A prompt counts as right where the answer is first of the whole vocabulary.
    """
    logits = next_token_logits(model, tokenizer, [pair.clean for pair in pairs])
    answers = token_ids(tokenizer, [pair.answer for pair in pairs])
    wrong = token_ids(tokenizer, [pair.wrong for pair in pairs])
    right = (logits.argmax(-1) == answers).float().mean().item()
    return right, (_pick(logits, answers) - _pick(logits, wrong)).mean().item()


@torch.no_grad()
def induction_loss(model: Any, tokenizer: Any, texts: Sequence[str]) -> tuple[float, float]:
    """Mean loss in nats per token over the first and the second half of repeated sequences.

    The texts have one even length. The first token of the second half is left out: nothing in the
    text says yet that it has begun to repeat.
    """
    batch = tokenizer(list(texts), return_tensors="pt")
    logits = model(**batch).logits[:, :-1]  # [text, pos, vocab]; position p predicts token p + 1
    targets = batch["input_ids"][:, 1:]  # without <bos>: [text, 2 * half]
    losses = cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none")
    half = targets.shape[1] // 2
    return losses[:, :half].mean().item(), losses[:, half + 1 :].mean().item()


def accuracy(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> float:
    """The share of prompts whose answer is first of the whole vocabulary."""
    logits = next_token_logits(model, tokenizer, [prompt.text for prompt in prompts])
    answers = token_ids(tokenizer, [prompt.answer for prompt in prompts])
    return (logits.argmax(-1) == answers).float().mean().item()


def preference(model: Any, tokenizer: Any, prompts: Sequence[Contrast]) -> float:
    """The share of prompts whose answer has a higher logit than the wrong word."""
    logits = next_token_logits(model, tokenizer, [prompt.text for prompt in prompts])
    answers = token_ids(tokenizer, [prompt.answer for prompt in prompts])
    wrong = token_ids(tokenizer, [prompt.wrong for prompt in prompts])
    return (_pick(logits, answers) > _pick(logits, wrong)).float().mean().item()


@torch.no_grad()
def next_token_logits(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Logits after the last token of each text: `[text, vocab]`. Pads on the left."""
    batch = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="left")
    return model(**batch).logits[:, -1].float()


@torch.no_grad()
def answer_by_layer(model: Any, tokenizer: Any, prompt: Prompt) -> list[float]:
    """The logit lens: the probability of the answer after each layer, at the last position.

    For models in the Llama layout (`model.model.norm`, `model.lm_head`).
    """
    batch = tokenizer(prompt.text, return_tensors="pt")
    states = model(**batch, output_hidden_states=True).hidden_states
    # The last state is normed already; those before it are the plain residual stream.
    normed = [*(model.model.norm(state[0, -1]) for state in states[1:-1]), states[-1][0, -1]]
    answer = token_ids(tokenizer, [prompt.answer]).item()
    return [model.lm_head(state).softmax(-1)[answer].item() for state in normed]


def token_ids(tokenizer: Any, words: Sequence[str]) -> Tensor:
    """The one token of each word: `[word]`. Raises ValueError where a word is not one token."""
    encoded = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    for word, ids in zip(words, encoded, strict=True):
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"an answer must be one known token, but {word!r} is {ids} here; "
                "use the tokenizer of the tiny model, or prompts with other answers"
            )
    return torch.tensor([ids[0] for ids in encoded])


def _pick(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(-1, ids[:, None])[:, 0]
