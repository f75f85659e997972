"""All inputs of several calls as one: what an empty invoke sees.

    whole = language_together(calls, tokenizer, facts)     # as prepare_language([all prompts])
    places = places_in(calls, whole)                       # whose rows are where

Language prompts are padded on the left, as in any list of prompts; the tensors of other modules are
put one below the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weft.errors import InputError

from .any_module import prepare_any
from .call import ModelCall
from .forward import DEFAULT_OPTIONS, ForwardOptions, LanguageFacts
from .prepare import positions_of, prepare_language


class Rows(NamedTuple):
    """Rows `start` to `stop` of a batch are one call's; its positions are the last `length`."""

    start: int
    stop: int
    length: int | None


def language_together(
    calls: Sequence[ModelCall],
    tokenizer: Any,
    facts: LanguageFacts,
    options: ForwardOptions = DEFAULT_OPTIONS,
) -> ModelCall:
    """The call for all prompts of these calls, in their order."""
    rows: list[list[int]] = []
    for call in calls:
        rows += _prompts(call)
    whole = prepare_language(rows, tokenizer, facts, options=options)
    device = calls[0].kwargs["input_ids"].device  # type: ignore[union-attr]
    return whole.to(device)


def _prompts(call: ModelCall) -> list[list[int]]:
    ids, mask = call.kwargs.get("input_ids"), call.mask
    positions = call.kwargs.get("position_ids")
    own = positions is not None and (mask is None or not _are_plain(positions, mask))
    if not isinstance(ids, Tensor) or own or "token_type_ids" in call.kwargs:
        raise InputError(
            "the whole batch can only be shown for prompts that are token ids: one of the invokes "
            "has embeddings, positions or token types of its own",
            fix="leave out the empty invoke, and save in the others",
        )
    if mask is None:
        return ids.tolist()
    return [row[real].tolist() for row, real in zip(ids, mask.to(ids.device), strict=True)]


def _are_plain(positions: Any, mask: Tensor) -> bool:
    return torch.equal(positions.cpu(), positions_of(mask).cpu())


def plain_together(calls: Sequence[ModelCall]) -> ModelCall:
    """The call with the tensors of these calls one below the other."""
    first = calls[0]
    args = [_joined([call.args[n] for call in calls], f"argument {n}")
            for n in _same([len(call.args) for call in calls])]  # fmt: skip
    names = [tuple(call.kwargs) for call in calls]
    if any(set(one) != set(names[0]) for one in names):
        raise _unlike("their keywords")
    kwargs: Mapping[str, object] = {
        name: _joined([call.kwargs[name] for call in calls], name) for name in first.kwargs
    }
    return prepare_any(tuple(args), kwargs)


def _same(counts: list[int]) -> range:
    if len(set(counts)) > 1:
        raise _unlike("how many arguments they have")
    return range(counts[0])


def _joined(values: list[Any], name: str) -> Any:
    first = values[0]
    if not isinstance(first, Tensor):
        if any(isinstance(value, Tensor) or value != first for value in values):
            raise _unlike(name)
        return first
    shapes = {tuple(value.shape[1:]) if isinstance(value, Tensor) else None for value in values}
    if len(shapes) > 1 or not first.dim() or len({value.dtype for value in values}) > 1:
        raise _unlike(name)
    return torch.cat(values)


def _unlike(what: str) -> InputError:
    return InputError(
        f"the inputs of the invokes are no batch together: they differ in {what}",
        fix="leave out the empty invoke, and save in the others",
    )


def places_in(calls: Sequence[ModelCall]) -> list[Rows]:
    """Where the rows of each call lie in the call for all of them."""
    places, start = [], 0
    for call in calls:
        stop = start + (call.batch or 0)
        places.append(Rows(start, stop, call.length))
        start = stop
    return places
