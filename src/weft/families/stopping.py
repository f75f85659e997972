"""Stop strings: which rows end because their text has come to contain one.

    stopped = stop_strings(sampling, tokenizer)
    stopped(ids)                                 # bool [batch]

A row ends with the token that completes a stop string, as in `transformers`: the string may begin
in the prompt and end in the middle of the token. Texts are compared, not tokens, so any tokenizer
that can decode will do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.errors import InputError

from .sampler import Stopped
from .sampling import Sampling

_MARGIN = 8  # tokens before the longest string: decoding may treat a first token in its own way


def stop_strings(sampling: Sampling, tokenizer: Any) -> Stopped | None:
    """The rows that end; None where there are no stop strings. Raises InputError."""
    stops = sampling.stop_strings
    if stops is None:
        return None
    if tokenizer is None:
        raise InputError(
            "stop_strings are texts, and this model has no tokenizer",
            fix="LanguageModel(..., tokenizer=<id, folder or tokenizer>), or give eos_token_id",
        )
    width = max(len(stop.encode()) for stop in stops) + _MARGIN

    def stopped(ids: Tensor) -> Tensor:
        ends = [_completes(row, stops, tokenizer) for row in ids[:, -width:].tolist()]
        return torch.tensor(ends, dtype=torch.bool, device=ids.device)

    return stopped


def _completes(row: list[int], stops: tuple[str, ...], tokenizer: Any) -> bool:
    """Whether one of `stops` occurs once more with the last token than without."""
    text = tokenizer.decode(row)
    found = [stop for stop in stops if stop in text]
    if not found:
        return False
    before = tokenizer.decode(row[:-1])
    return any(_count(stop, text) > _count(stop, before) for stop in found)


def _count(stop: str, text: str) -> int:
    """How often it occurs, overlaps included."""
    return sum(text.startswith(stop, at) for at in range(len(text)))
