"""From logits to tokens: the one sampler, for a generation alone or beside others. Torch only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .sampling import Sampling


class Sampler:
    """Chooses tokens for the rows of one generation, and knows which rows have ended."""

    def __init__(
        self, sampling: Sampling, ids: Tensor, mask: Tensor | None, config: Any, tokenizer: Any
    ) -> None:
        self.sampling = sampling
        positions = getattr(config, "max_position_embeddings", None)
        self.longest = sampling.longest(ids.shape[1], positions)
        self.open = torch.ones(len(ids), dtype=torch.bool, device=ids.device)

    def choose(self, logits: Tensor) -> Tensor:
        """A token for each row, `[batch]`, from logits `[batch, vocab]`; pads for ended rows."""
        tokens = logits.float().argmax(-1)
        if self.sampling.eos_token_id:
            tokens = torch.where(self.open, tokens, self.sampling.pad)  # type: ignore[arg-type]
        return tokens

    def ended(self, ids: Tensor) -> bool:
        """Notes which rows end with the last token of `ids`; whether all have."""
        if self.sampling.eos_token_id:
            ends = torch.tensor(self.sampling.eos_token_id, device=ids.device)
            self.open &= ~torch.isin(ids[:, -1], ends)
        return ids.shape[1] >= self.longest or not bool(self.open.any())
