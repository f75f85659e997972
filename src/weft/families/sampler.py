"""From logits to tokens: the one sampler, for a generation alone or beside others. Torch only.

    sampler = Sampler(sampling, prompt=ids, real=None, longest=29)
    tokens = sampler.choose(ids, logits)               # [batch]
    over = sampler.ended(torch.cat([ids, tokens[:, None]], -1))

A draw depends on the seed, the step and the row, on nothing that was drawn before or beside it: one
number from 0 to 1, and the token at which the summed probabilities, in the order of the
vocabulary, pass it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from weft.errors import SamplingError
from weft.kernels.execute import seed_of

from .sampling import Sampling
from .scores import processed, score_steps

Stopped = Callable[[Tensor], Tensor]
"""Ids `[batch, pos]` -> bool `[batch]`: which rows end with their last token."""

_DRAW = -1  # the number of this draw among a graph's, which count from 0


class Sampler:
    """Chooses tokens for the rows of one generation, and knows which rows have ended.

    prompt: ids `[batch, pos]`; real: bool of that shape, False at padding; longest: tokens of
    prompt and answer, at most; stopped: further ends, such as stop strings. `open` says of each row
    whether it goes on.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Tensor,
        real: Tensor | None,
        longest: int,
        stopped: Stopped | None = None,
    ) -> None:
        self.sampling = sampling
        self.longest = longest
        self.open = torch.ones(len(prompt), dtype=torch.bool, device=prompt.device)
        self._start = prompt.shape[1]
        self._steps = score_steps(sampling, prompt=self._start, longest=longest, real=real)
        self._stopped = stopped
        self._ends: Tensor | None = None
        if sampling.eos_token_id:
            self._ends = torch.tensor(sampling.eos_token_id, device=prompt.device)
        self._seed = sampling.seed
        if self._seed is None and sampling.do_sample:
            self._seed = int(torch.randint(1 << 62, ()))  # as generate: of the process's own stream

    @property
    def seed(self) -> int | None:
        """What keys the draws; None where nothing is drawn."""
        return self._seed if self.sampling.do_sample else None

    def choose(self, ids: Tensor, logits: Tensor) -> Tensor:
        """A token for each row, `[batch]`, from logits `[batch, vocab]`; pads for ended rows.

        Raises SamplingError where the scores of a row are no distribution to draw from.
        """
        scores = logits.detach().to(ids.device, torch.float32)
        scores = processed(self._steps, ids, scores)
        if self.sampling.do_sample:
            tokens = self._drawn(scores, ids.shape[1] - self._start)
        else:
            tokens = scores.argmax(-1)
        if self._ends is not None:
            tokens = torch.where(self.open, tokens, self.sampling.pad)  # type: ignore[arg-type]
        return tokens

    def ended(self, ids: Tensor) -> bool:
        """Notes which rows end with the last token of `ids`; whether the generation is over."""
        if self._ends is not None:
            self.open &= ~torch.isin(ids[:, -1], self._ends)
        if self._stopped is not None:
            self.open &= ~self._stopped(ids)
        return ids.shape[1] >= self.longest or not bool(self.open.any())

    def _drawn(self, scores: Tensor, step: int) -> Tensor:
        sums = scores.softmax(-1).double().cumsum(-1)
        whole = sums[:, -1:]
        wrong = ~whole[:, 0].isfinite() & self.open
        if bool(wrong.any()):
            row = int(wrong.long().argmax())
            raise SamplingError(
                f"the logits at step {step} are no distribution in row {row}: NaN, an infinity, or "
                "no token that the options allow",
                fix="look at the edits of this step; remove_invalid_values=True reads NaN as 0",
            )
        at = torch.tensor([[self._uniform(step, row)] for row in range(len(scores))])
        found = torch.searchsorted(sums, at.to(sums) * whole, right=True)
        last = (sums < whole).sum(-1)  # the last token that is not impossible
        return torch.minimum(found[:, 0], last)

    def _uniform(self, step: int, row: int) -> float:
        """From 0 to below 1; a double has 53 bits."""
        return (seed_of(self._seed or 0, _DRAW, step, row) >> 11) / (1 << 53)
