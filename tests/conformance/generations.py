"""Case 3: steering in `generate`, held against `transformers`' own `generate` with plain hooks.

Tokens are compared to the bit. Where the numbers are only within their bound, in half precision,
the best two logits may change places, and the oracle is led along the tokens that were found: each
of them must then be the best of what was found at its step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import weft
from tests.families import zoo
from tests.language.generated import generated
from weft.errors import RecordingError
from weft.testing.same import bitwise

from .lanes import Lane, hidden
from .models import Subject
from .verdicts import Judge

NEW, PINNED = 4, 2
OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [2]}
"""Without the end of sequence: every step happens."""
(PROMPT,) = zoo.tokens(9, seed=11)


@dataclass
class Found:
    """What a generation had: its ids, and of each step the hidden states and the logits."""

    ids: torch.Tensor
    states: list[torch.Tensor]
    logits: list[torch.Tensor]

    @property
    def numbers(self) -> list[torch.Tensor]:
        """One tensor of states and one of logits: of few numbers the largest error is chance."""
        return [torch.cat(self.states, 1), torch.cat(self.logits, 1)]


def steering(lane: Lane, judge: Judge) -> None:
    """Steering of every generated token, of one of them, and with and without a cache."""
    v = _direction(lane.subject)
    plain = _generate(lane)
    _held(lane.subject, judge, plain, {})
    steered = _generate(lane, always=v)
    _held(lane.subject, judge, steered, dict.fromkeys(range(NEW), v))
    judge.moves(steered.states[0], plain.states[0])
    pinned = _generate(lane, once=v)
    _held(lane.subject, judge, pinned, {PINNED: v})
    judge.exact(pinned.states[:PINNED], plain.states[:PINNED])
    judge.moves(pinned.states[PINNED], plain.states[PINNED])
    whole = _generate(lane, always=v, use_cache=False)
    _held(lane.subject, judge, whole, dict.fromkeys(range(NEW), v), use_cache=False)
    _same_without_a_cache(judge, lane.subject, whole, steered)
    for options in ({"last": v}, {"once": v}):
        opened = lambda options=options: _generate(lane, **options, use_cache=False)
        judge.raises(RecordingError, "without a cache", opened)


def _direction(subject: Subject) -> torch.Tensor:
    """What is added to hidden states."""
    embedding: Any = subject.net.get_submodule(subject.paths.embedding)
    width = embedding.weight.shape[-1]
    return torch.randn(width, generator=torch.Generator().manual_seed(3)).to(subject.dtype)


def _generate(
    lane: Lane,
    always: torch.Tensor | None = None,
    last: torch.Tensor | None = None,
    once: torch.Tensor | None = None,
    **options: Any,
) -> Found:
    """The prompt goes on, steered: at every step, there at the last position, or at one step."""
    layer = lane.answering(1)
    states, logits = [], []
    with lane.generation(PROMPT, **OPTIONS, **options) as tracer:
        if always is not None:
            hidden(layer.output)[:] += always
        if last is not None:
            hidden(layer.output)[:, -1] += last
        if once is not None:
            for _ in tracer.iter[PINNED]:
                hidden(layer.output)[:] += once
        for _ in tracer.iter[:]:
            states.append(hidden(layer.output))
            logits.append(lane.model.output.logits)
        states, logits = weft.save([states, logits])
        ids = tracer.result.save()
    return Found(ids, states, logits)


def _held(
    subject: Subject,
    judge: Judge,
    found: Found,
    pushes: Mapping[int, torch.Tensor],
    **options: Any,
) -> None:
    """The numbers of `generate` with hooks, and its tokens."""
    expected = _by_hooks(subject.net, subject, pushes, **options)
    if _is_bitwise([found.ids, *found.numbers], [expected.ids, *expected.numbers]):
        return
    if subject.dtype is torch.float32:
        judge.exact(found.ids, expected.ids)
    judge.same(found.numbers, lambda net: _led(net, subject, pushes, found.ids, **options).numbers)
    best = torch.stack([_allowed(one[:, -1]).argmax(-1) for one in found.logits], 1)
    judge.exact(found.ids[:, -NEW:], best)


def _same_without_a_cache(judge: Judge, subject: Subject, whole: Found, steered: Found) -> None:
    """Each step's last position is that of the generation with a cache, and so is each token.

    Two ways to round may choose different tokens of half precision; there each is held against
    `generate` as it is.
    """
    if subject.dtype is not torch.float32:
        return
    judge.exact(whole.ids, steered.ids)
    ends = [torch.stack([one[:, -1] for one in found.logits]) for found in (whole, steered)]
    judge.same(ends[0], lambda net: ends[1], "without a cache each step computes all positions")


def _by_hooks(
    net: nn.Module, subject: Subject, pushes: Mapping[int, torch.Tensor], **options: Any
) -> Found:
    """The oracle. A push acts on hidden states in place, at its step."""
    layer = f"{subject.answering(1)}.output"

    def hook(step: int, output: Any) -> None:
        if step in pushes:
            hidden(output)[:] += pushes[step]

    seen = generated(
        net,
        torch.tensor([PROMPT]),
        {layer: hook, ".output": None},
        **{**OPTIONS, **options},
    )
    states = [hidden(seen[layer, step]) for step in range(NEW)]
    return Found(seen.result, states, [seen[".output", step].logits for step in range(NEW)])


def _led(
    net: nn.Module,
    subject: Subject,
    pushes: Mapping[int, torch.Tensor],
    ids: torch.Tensor,
    **options: Any,
) -> Found:
    """The oracle along these tokens."""

    def only(so_far: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).scatter_(1, ids[:, so_far.shape[1], None], 0.0)

    return _by_hooks(net, subject, pushes, logits_processor=[only], **options)


def _allowed(logits: torch.Tensor) -> torch.Tensor:
    without = logits.clone()
    without[..., OPTIONS["suppress_tokens"]] = -torch.inf
    return without


def _is_bitwise(got: Any, expected: Any) -> bool:
    try:
        bitwise(got, expected)
    except AssertionError:
        return False
    return True
