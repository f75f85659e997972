"""What the decoder of an encoder-decoder is given: the answer so far."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from weft.errors import InputError

from .call import ModelCall
from .forward import LanguageFacts


def answered(call: ModelCall, answer: object, facts: LanguageFacts) -> ModelCall:
    """The call with `decoder_input_ids` `[batch, pos]`; without any, the token that begins answers.

    Raises InputError for ids that the model cannot take, and for any of a model without an encoder.
    """
    if not facts.encoder:
        if answer is None:
            return call
        raise InputError(
            f"models of type {facts.model_type!r} take no decoder_input_ids",
            fix="give prompt and answer together, as one input",
        )
    batch = call.batch or 1
    ids = torch.full((batch, 1), start_of(facts)) if answer is None else _checked(answer, batch)
    low, high = torch.aminmax(ids)
    if int(low) < 0 or int(high) >= facts.vocab:
        raise InputError(
            f"decoder_input_ids hold a token outside the vocabulary of {facts.vocab}",
            fix="use the tokenizer that belongs to this model",
        )
    if facts.positions is not None and ids.shape[1] > facts.positions:
        raise InputError(
            f"the answer has {ids.shape[1]} positions, this model has {facts.positions}",
            fix="give a shorter one",
        )
    tensor: Any = call.kwargs.get("input_ids", call.kwargs.get("inputs_embeds"))
    ids = ids.to(tensor.device)
    return replace(call, kwargs={**call.kwargs, "decoder_input_ids": ids})


def start_of(facts: LanguageFacts) -> int:
    """The token with which an answer begins, as `generate` of `transformers` takes it."""
    for name in ("decoder_start_token_id", "bos_token_id"):
        found = getattr(facts.config, name, None)
        if isinstance(found, int):
            return found
    raise InputError(
        "the model does not say with which token an answer begins",
        fix="give decoder_input_ids",
    )


def refuse_left_padding(facts: LanguageFacts, mask: Tensor) -> None:
    """Raises where an encoder that counts positions would count the padding before a prompt."""
    if facts.encoder and facts.positions is not None and not bool(mask[:, 0].all()):
        raise InputError(
            "the prompt is padded on the left: this encoder counts positions from there",
            fix="pad on the right, or give lists of token ids",
        )


def _checked(answer: object, batch: int) -> Tensor:
    try:
        ids = torch.as_tensor(answer)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"decoder_input_ids is not a tensor: {error}",
            fix="give a tensor, an array or a list of numbers",
        ) from error
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.is_floating_point() or ids.dtype is torch.bool or ids.ndim != 2 or not ids.numel():
        raise InputError(
            f"decoder_input_ids are token ids [batch, pos], not {ids.dtype} {list(ids.shape)}",
            fix="one row of ids for each prompt, of equal length",
        )
    if len(ids) not in (1, batch):
        raise InputError(
            f"decoder_input_ids has {len(ids)} rows, the prompt has {batch}",
            fix="give [pos], [1, pos] or [batch, pos]",
        )
    return ids.long().expand(batch, -1).clone()
