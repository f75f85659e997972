"""What sampling options do to scores: the processors of `transformers`, as functions of tensors.

    steps = score_steps(sampling, prompt=9, longest=29, real=None)
    scores = processed(steps, ids, logits.float())      # [batch, vocab], float32

Names, order, defaults and numbers are those of `GenerationMixin._get_logits_processor` and
`generation/logits_process.py` in transformers 5.23, against which they are tested one by one and
together. `ids` are prompt and answer so far, `[batch, pos]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .sampling import Sampling

Step = Callable[[Tensor, Tensor], Tensor]
"""(ids, scores) -> scores"""

_OUT = float("-inf")


def processed(steps: Sequence[Step], ids: Tensor, scores: Tensor) -> Tensor:
    """The scores after all steps."""
    for step in steps:
        scores = step(ids, scores)
    return scores


def score_steps(
    sampling: Sampling, *, prompt: int, longest: int, real: Tensor | None = None
) -> list[Step]:
    """What `sampling` does to scores, in order; nothing for options that are off.

    prompt: tokens of the prompt, padding included; longest: of prompt and answer, at most; real:
    bool `[batch, prompt]`, False at padding.
    """
    steps = [*_penalties(sampling, real), *_lengths(sampling, prompt, longest)]
    if sampling.do_sample:
        steps += _warpers(sampling)
    if sampling.renormalize_logits:
        steps.append(lambda ids, scores: scores.log_softmax(-1))
    return steps


# -- what is there already, and where the end is ---------------------------------------------------


def _penalties(sampling: Sampling, real: Tensor | None) -> list[Step]:
    steps: list[Step] = []
    penalty = sampling.repetition_penalty
    if penalty is not None and penalty != 1:
        steps.append(lambda ids, scores: _repeated(ids, scores, penalty, real))
    if sampling.no_repeat_ngram_size:
        size = sampling.no_repeat_ngram_size
        steps.append(lambda ids, scores: _no_run_twice(ids, scores, size))
    if sampling.bad_words_ids:
        ends = [(end,) for end in sampling.eos_token_id or ()]
        words = [word for word in sampling.bad_words_ids if word not in ends]
        steps.append(lambda ids, scores: _without_words(ids, scores, words))
    return steps


def _lengths(sampling: Sampling, prompt: int, longest: int) -> list[Step]:
    steps: list[Step] = []
    ends = sampling.eos_token_id
    shortest = sampling.min_length
    if sampling.min_new_tokens is not None:
        shortest = prompt + sampling.min_new_tokens
    if ends and shortest:
        steps.append(_at(lambda length: length < shortest, lambda s: _without(s, ends)))
    first, last = sampling.forced_bos_token_id, sampling.forced_eos_token_id
    if first is not None:
        steps.append(_at(lambda length: length == 1, lambda s: _only(s, (first,))))
    if last is not None:
        steps.append(_at(lambda length: length == longest - 1, lambda s: _only(s, last)))
    if sampling.remove_invalid_values:
        steps.append(lambda ids, scores: _valid(scores))
    if sampling.exponential_decay_length_penalty is not None and ends:
        start, factor = sampling.exponential_decay_length_penalty
        steps.append(lambda ids, s: _decayed(ids.shape[1] - start - prompt, s, factor, ends))
    never, begin = sampling.suppress_tokens, sampling.begin_suppress_tokens
    if never is not None:
        steps.append(lambda ids, scores: _without(scores, never))
    if begin is not None:
        at = prompt if prompt > 1 or first is None else prompt + 1
        steps.append(_at(lambda length: length == at, lambda s: _without(s, begin)))
    return steps


def _at(when: Callable[[int], bool], change: Callable[[Tensor], Tensor]) -> Step:
    """A change where the length so far is such."""
    return lambda ids, scores: change(scores) if when(ids.shape[1]) else scores


def _repeated(ids: Tensor, scores: Tensor, penalty: float, real: Tensor | None) -> Tensor:
    """Tokens that are there become less likely (arXiv:1909.05858); padding is not there."""
    vocab = scores.shape[-1]
    if real is not None:
        ids = ids.clone()
        ids[:, : real.shape[1]].masked_fill_(~real, vocab)
    ids = ids.clamp(max=vocab)
    wide = torch.nn.functional.pad(scores, (0, 1))
    there = wide.gather(1, ids)
    there = torch.where(there < 0, there * penalty, there / penalty)
    return wide.scatter(1, ids, there)[:, :vocab]


def _no_run_twice(ids: Tensor, scores: Tensor, size: int) -> Tensor:
    """A token that would end a run of `size` tokens which is there already is out."""
    length, vocab = ids.shape[1], scores.shape[-1]
    if length < size:
        return scores
    runs = ids.unfold(1, size, 1)  # [batch, runs, size]
    same = (runs[..., :-1] == ids[:, None, length + 1 - size :]).all(-1)
    out = scores.new_zeros((len(scores), vocab + 1), dtype=torch.bool)
    out.scatter_(1, torch.where(same, runs[..., -1].clamp(max=vocab), vocab), True)
    return scores.masked_fill(out[:, :vocab], _OUT)


def _without_words(ids: Tensor, scores: Tensor, words: Sequence[tuple[int, ...]]) -> Tensor:
    """A token that would complete one of the words is out."""
    out = torch.zeros_like(scores, dtype=torch.bool)
    for word in words:
        before = torch.tensor(word[:-1], dtype=ids.dtype, device=ids.device)
        if len(before) <= ids.shape[1]:
            out[:, word[-1]] |= (ids[:, ids.shape[1] - len(before) :] == before).all(-1)
    return scores.masked_fill(out, _OUT)


def _without(scores: Tensor, ids: tuple[int, ...]) -> Tensor:
    return scores.index_fill(1, _inside(ids, scores), _OUT)


def _only(scores: Tensor, ids: tuple[int, ...]) -> Tensor:
    return torch.full_like(scores, _OUT).index_fill(1, _inside(ids, scores), 0)


def _inside(ids: tuple[int, ...], scores: Tensor) -> Tensor:
    """The ids that the vocabulary has."""
    known = [one for one in ids if one < scores.shape[-1]]
    return torch.tensor(known, dtype=torch.int64, device=scores.device)


def _valid(scores: Tensor) -> Tensor:
    kind = torch.finfo(scores.dtype)
    return torch.nan_to_num(scores, nan=0.0, posinf=kind.max, neginf=kind.min)


def _decayed(past: int, scores: Tensor, factor: float, ends: tuple[int, ...]) -> Tensor:
    """The end becomes likelier, by more at each token past the start."""
    if past <= 0:
        return scores
    where = _inside(ends, scores)
    there = scores[:, where]
    more = (there.abs() * (pow(factor, past) - 1)).masked_fill(~there.isfinite(), 0)
    return scores.index_copy(1, where, there + more)


# -- only when drawing -----------------------------------------------------------------------------


def _warpers(sampling: Sampling) -> list[Step]:
    """In this order. Each keeps at least one token."""
    steps: list[Callable[[Tensor], Tensor]] = []
    warm, k, p = sampling.temperature, sampling.top_k, sampling.top_p
    least, typical = sampling.min_p, sampling.typical_p
    epsilon, eta = sampling.epsilon_cutoff, sampling.eta_cutoff
    if warm is not None and warm != 1:
        steps.append(lambda scores: scores / warm)
    if k:
        steps.append(lambda scores: _top_k(scores, k))
    if p is not None and p < 1:
        steps.append(lambda scores: _top_p(scores, p))
    if least is not None:
        steps.append(lambda scores: _min_p(scores, least))
    if typical is not None and typical < 1:
        steps.append(lambda scores: _typical(scores, typical))
    if epsilon is not None and 0 < epsilon < 1:
        steps.append(lambda scores: _cut(scores, torch.tensor(epsilon)))
    if eta is not None and 0 < eta < 1:
        steps.append(lambda scores: _eta(scores, eta))
    return [_plain(step) for step in steps]


def _plain(step: Callable[[Tensor], Tensor]) -> Step:
    return lambda ids, scores: step(scores)


def _top_k(scores: Tensor, k: int) -> Tensor:
    last = scores.topk(min(k, scores.shape[-1]))[0][:, -1:]
    return scores.masked_fill(scores < last, _OUT)


def _top_p(scores: Tensor, p: float) -> Tensor:
    """The likeliest tokens whose probabilities sum to `p` (arXiv:1904.09751)."""
    rising, places = scores.sort()
    out = rising.softmax(-1).cumsum(-1) <= 1 - p
    out[:, -1:] = False
    return scores.masked_fill(out.scatter(1, places, out), _OUT)


def _min_p(scores: Tensor, part: float) -> Tensor:
    """Tokens at least `part` as likely as the likeliest (arXiv:2407.01082)."""
    chance = scores.softmax(-1)
    out = chance < part * chance.amax(-1, keepdim=True)
    out.scatter_(-1, chance.topk(1)[1], False)
    return scores.masked_fill(out, _OUT)


def _typical(scores: Tensor, mass: float) -> Tensor:
    """Tokens whose surprise is nearest to the expected one (arXiv:2202.00666)."""
    log = scores.log_softmax(-1)
    entropy = -(log * log.exp()).nansum(-1, keepdim=True)
    rising, places = (-log - entropy).abs().sort()
    sums = scores.gather(-1, places).softmax(-1).cumsum(-1)
    last = (sums < mass).sum(1).clamp(max=rising.shape[-1] - 1)
    out = rising > rising.gather(1, last[:, None])
    out[:, :1] = False
    return scores.masked_fill(out.scatter(1, places, out), _OUT)


def _eta(scores: Tensor, epsilon: float) -> Tensor:
    """A cut that follows the entropy (arXiv:2210.15191)."""
    entropy = torch.distributions.Categorical(logits=scores, validate_args=False).entropy()
    low = torch.tensor(epsilon, device=scores.device)
    return _cut(scores, torch.min(low, low.sqrt() * (-entropy).exp())[:, None])


def _cut(scores: Tensor, least: Tensor) -> Tensor:
    """Tokens of at least that probability, and the likeliest."""
    out = scores.softmax(-1) < least.to(scores.device)
    return scores.masked_fill(out & (scores < scores.amax(-1, keepdim=True)), _OUT)
