"""From what a user gives to the call of a language model's forward.

    facts = language_facts(net.config, type(net))
    call = prepare_language(["The Eiffel Tower", "Rome"], tokenizer, facts)
    net(*call.args, **call.kwargs)

Rows of different lengths are padded on the left (an encoder's on the right), whatever side the
tokenizer would take, with mask and position ids for every row: each row gives the numbers it would
give alone (where that is not so, `refuse_padding`). Where nothing is padded the model gets the ids
alone, as if called by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.errors import InputError
from weft.families.answer import answered, refuse_left_padding
from weft.families.call import ModelCall
from weft.families.forward import (
    DEFAULT_OPTIONS,
    TENSOR_NAMES,
    ForwardOptions,
    LanguageFacts,
    forward_keywords,
    refuse_padding,
)
from weft.families.tokens import Rows, read_tokens


def prepare_language(
    inputs: object,
    tokenizer: Any,
    facts: LanguageFacts,
    *,
    options: ForwardOptions = DEFAULT_OPTIONS,
    tensors: Mapping[str, object] | None = None,
) -> ModelCall:
    """The call of a language model's forward for one prompt or a batch of them.

    inputs: a text; texts; chat messages or several chats (through the chat template, up to where
        the assistant is to speak); token ids `[pos]` or `[batch, pos]` as tensor, array or lists
        (rows may differ in length); a mapping like a tokenizer's result; None if all is in
        `tensors`.
    tensors: inputs by keyword: input_ids, attention_mask `[batch, pos]` (1 = real token),
        position_ids, inputs_embeds `[batch, pos, d_model]`, token_type_ids. A mask without padding
        is left out: the numbers are the same to the bit. Of an encoder-decoder these are the
        encoder's; `decoder_input_ids` are the decoder's, the token that begins an answer if not
        given.

    The user's tensors are neither modified nor shared with the call. Raises InputError for an input
    that the model could not use or would use wrongly, UnknownOptionError for an option that it does
    not take.
    """
    if not tensors and not isinstance(inputs, Mapping) and inputs is not None:
        given: dict[str, object] = {}
        tokens = read_tokens(inputs, tokenizer)
    else:
        given = _merge(inputs, tensors or {})
        if "input_ids" not in given:
            return _prepare_embeddings(given, facts, options)
        tokens = read_tokens(given.pop("input_ids"), tokenizer)
    answer = given.pop("decoder_input_ids", None)
    ids, mask = _as_batch(tokens, given.pop("attention_mask", None), tokenizer, facts)
    _check_ids(ids, facts)
    return answered(_call("input_ids", ids, mask, given, facts, options), answer, facts)


def _call(
    name: str,
    tensor: Tensor,
    mask: Tensor | None,
    given: dict[str, object],
    facts: LanguageFacts,
    options: ForwardOptions,
) -> ModelCall:
    """The call for ids or embeddings `tensor`: `[batch, pos, ...]`, real where `mask` is True."""
    batch, length = tensor.shape[:2]
    keywords: dict[str, object] = {name: tensor}
    if mask is None:
        lengths = (length,) * batch
    else:
        lengths = tuple(mask.sum(-1).tolist())
        refuse_padding(facts, lengths)
        refuse_left_padding(facts, mask)
        keywords["attention_mask"] = mask.long()
        if "position_ids" in facts.takes:
            keywords["position_ids"] = positions_of(mask)
    if given:
        keywords |= _other_tensors(given, batch, length, facts)
    if mask is None and "position_ids" in given:
        # Without mask and cache, transformers takes a jump in positions for the start of another
        # packed sequence (masking_utils.find_packed_sequence_indices). A mask of ones says that
        # there is none.
        keywords["attention_mask"] = tensor.new_ones((batch, length), dtype=torch.int64)
    _check_positions(lengths, keywords, given, facts)
    keywords |= forward_keywords(options, facts)
    return ModelCall((), keywords, mask, lengths, batch, length)


def positions_of(mask: Tensor) -> Tensor:
    """Position ids `[batch, pos]`: real tokens count from 0, whatever the side of the padding.

    Pads get 0 or the position of the token before them: inside any table of positions, and masked
    anyway.
    """
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


# --- ids and masks -------------------------------------------------------------------------------


def _as_batch(
    tokens: Tensor | Rows, mask: object, tokenizer: Any, facts: LanguageFacts
) -> tuple[Tensor, Tensor | None]:
    """Ids `[batch, pos]` and a bool mask of that shape, None where every position is real."""
    if isinstance(tokens, Tensor):
        if tokens.numel() == 0:
            raise InputError(
                f"the prompt is empty: token ids of shape {list(tokens.shape)}",
                fix="give at least one token",
            )
        return tokens, None if mask is None else _mask(mask, tokens.shape, tokens.device)
    lengths = [len(row) for row in tokens]
    if not all(lengths):
        raise InputError(
            f"the prompt is empty: row {lengths.index(0)} has no tokens",
            fix="give each row at least one token, or leave it out",
        )
    if min(lengths) == max(lengths):
        ids = _tensor(tokens)
        return ids, None if mask is None else _mask(mask, ids.shape, ids.device)
    ids = _tensor(_padded(tokens, _pad_id(tokenizer, facts), facts))
    real = [[1] * n for n in lengths] if mask is None else _mask_rows(mask, lengths)
    return ids, _mask(_padded(real, 0, facts), ids.shape, ids.device)


def _padded(rows: Rows, pad: int, facts: LanguageFacts) -> Rows:
    """Rows of one length. An encoder counts its positions from the left, whatever is masked."""
    width = max(map(len, rows))
    if facts.encoder:
        return [row + [pad] * (width - len(row)) for row in rows]
    return [[pad] * (width - len(row)) + row for row in rows]


def _tensor(rows: Rows) -> Tensor:
    try:
        return torch.tensor(rows, dtype=torch.int64)
    except (ValueError, RuntimeError) as error:  # an int of more than 64 bits
        raise InputError(
            f"token ids do not fit: {error}", fix="give ids of this model's vocabulary"
        ) from error


def _pad_id(tokenizer: Any, facts: LanguageFacts) -> int:
    """Any id inside the vocabulary would do: pads are masked. The tokenizer's choice reads best."""
    for name in ("pad_token_id", "eos_token_id"):
        pad = getattr(tokenizer, name, None)
        if isinstance(pad, int) and 0 <= pad < facts.vocab:
            return pad
    return facts.pad


def _mask(given: object, shape: torch.Size, device: torch.device) -> Tensor | None:
    """The user's mask as bool `[batch, pos]`; None if it masks nothing."""
    mask = _as_tensor("attention_mask", given).to(device)
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape != shape:
        raise InputError(
            f"attention_mask is {list(mask.shape)}, the tokens are {list(shape)}",
            fix="one 0 or 1 for each token; masks of more dimensions are not taken",
        )
    real = mask != 0
    if mask.dtype is not torch.bool and not torch.equal(real.to(mask.dtype), mask):
        raise InputError(
            "attention_mask holds more than 0 and 1",
            fix="one 0 (padding) or 1 (a token) for each token",
        )
    if real.all():
        return None
    if not real.any(-1).all():
        raise InputError(
            f"the prompt is empty: row {int(real.any(-1).long().argmin())} is all mask",
            fix="give each row at least one token, or leave it out",
        )
    return real


def _mask_rows(given: object, lengths: list[int]) -> Rows:
    """A mask for rows of different lengths: a list of lists of the same lengths."""
    rows = given.tolist() if isinstance(given, Tensor) else given
    if (
        not isinstance(rows, list | tuple)
        or [len(row) if isinstance(row, list | tuple) else None for row in rows] != lengths
    ):
        raise InputError(
            f"attention_mask does not fit rows of {', '.join(map(str, lengths))} tokens",
            fix="one 0 or 1 for each token, or no mask at all: padding is added and masked for you",
        )
    return [list(row) for row in rows]


def _check_ids(ids: Tensor, facts: LanguageFacts) -> None:
    low, high = torch.aminmax(ids)
    if int(low) < 0 or int(high) >= facts.vocab:  # numbers first: comparing tensors costs twice
        row, column = torch.nonzero((ids < 0) | (ids >= facts.vocab))[0].tolist()
        raise InputError(
            f"token id {int(ids[row, column])} at row {row}, position {column} is outside the "
            f"vocabulary of {facts.vocab}",
            fix="use the tokenizer that belongs to this model",
        )


def _check_positions(
    lengths: tuple[int, ...],
    keywords: dict[str, object],
    given: dict[str, object],
    facts: LanguageFacts,
) -> None:
    if facts.positions is None:
        return
    longest = max(lengths)
    if "position_ids" in given:
        longest = int(keywords["position_ids"].max()) + 1  # type: ignore[union-attr]
    if longest > facts.positions:
        raise InputError(
            f"the prompt has {longest} positions, this model has {facts.positions}",
            fix="give a shorter prompt",
        )


# --- inputs by keyword ---------------------------------------------------------------------------


def _merge(inputs: object, tensors: Mapping[str, object]) -> dict[str, object]:
    """All inputs by name, with one of `input_ids` and `inputs_embeds` among them."""
    if isinstance(inputs, Mapping) and "role" not in inputs:
        given = dict(inputs)
    else:
        given = {} if inputs is None else {"input_ids": inputs}
    if doubled := given.keys() & tensors.keys():
        raise InputError(
            f"{', '.join(sorted(doubled))} given twice", fix="give it once, by name or as the input"
        )
    given |= tensors
    if unknown := given.keys() - set(TENSOR_NAMES):
        raise InputError(
            f"unknown input {', '.join(sorted(map(str, unknown)))}",
            fix=f"inputs by name are {', '.join(TENSOR_NAMES)}",
        )
    given = {name: value for name, value in given.items() if value is not None}
    if ("input_ids" in given) == ("inputs_embeds" in given):
        raise InputError(
            "give the prompt once, as tokens or as inputs_embeds",
            fix="leave one of input_ids and inputs_embeds out",
        )
    return given


def _prepare_embeddings(
    given: dict[str, object], facts: LanguageFacts, options: ForwardOptions
) -> ModelCall:
    """The call for `inputs_embeds`: `[batch, pos, d_model]`, or `[pos, d_model]` for one row."""
    embeds = given.pop("inputs_embeds")
    if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
        raise InputError(
            "inputs_embeds is a floating-point tensor [batch, pos, d_model]",
            fix="take it from the embedding: floats [batch, pos, d_model]",
        )
    if "inputs_embeds" not in facts.takes:
        raise InputError(
            f"models of type {facts.model_type!r} take no inputs_embeds",
            fix="give token ids, and write to the embedding's .output",
        )
    embeds = embeds[None] if embeds.ndim == 2 else embeds
    if embeds.ndim != 3 or embeds.numel() == 0:
        raise InputError(
            f"inputs_embeds is [batch, pos, d_model], not {list(embeds.shape)}",
            fix="give one vector for each position",
        )
    mask, answer = given.pop("attention_mask", None), given.pop("decoder_input_ids", None)
    if mask is not None:
        mask = _mask(mask, embeds.shape[:2], embeds.device)
    return answered(
        _call("inputs_embeds", embeds.clone(), mask, given, facts, options), answer, facts
    )


def _other_tensors(
    given: dict[str, object], batch: int, length: int, facts: LanguageFacts
) -> dict[str, object]:
    """`position_ids` and `token_type_ids`, checked; `[1, pos]` and `[pos]` stand for every row."""
    taken: dict[str, object] = {}
    for name, value in given.items():
        tensor = _as_tensor(name, value)
        if tensor.is_floating_point() or tensor.dtype is torch.bool:
            raise InputError(
                f"{name} holds whole numbers, not {tensor.dtype}",
                fix="give integers, one for each token",
            )
        if tuple(tensor.shape) not in {(length,), (1, length), (batch, length)}:
            raise InputError(
                f"{name} is {list(tensor.shape)}, the tokens are {[batch, length]}",
                fix="give [pos], [1, pos] or [batch, pos]",
            )
        if tensor.min() < 0:
            raise InputError(
                f"{name} holds negative numbers", fix="positions and types count from 0"
            )
        if name in facts.takes:
            taken[name] = tensor.long().expand(batch, length).clone()
        elif name != "token_type_ids" or tensor.any():
            # A tokenizer may add token types of 0 by itself, for a model that knows none.
            raise InputError(
                f"models of type {facts.model_type!r} take no {name}", fix="leave it out"
            )
    return taken


def _as_tensor(name: str, value: object) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name} is not a tensor: {error}", fix="give a tensor, an array or a list of numbers"
        ) from error
