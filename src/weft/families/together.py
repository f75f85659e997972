"""All inputs of several calls as one: what an empty invoke sees.

    whole = language_together(calls, tokenizer, facts)     # as prepare_language([all prompts])
    places = places_in(calls, whole)                       # whose rows are where

Language prompts are padded on the left, as in any list of prompts; the tensors of other modules are
put together along the dimension that their user names.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    if facts.encoder:
        raise InputError(
            "the whole batch cannot be shown of an encoder with a decoder",
            fix="leave out the empty invoke: give the prompts together, tracer.invoke([a, b])",
        )
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


def plain_together(calls: Sequence[ModelCall], batch_dim: int = 0) -> ModelCall:
    """The call with the tensors of these calls put together along dimension `batch_dim`.

    The size of that dimension in a call's first tensor is its number of rows. A tensor of another
    size there, or with fewer dimensions, is everybody's: it has to be the same in all calls, as
    have all plain values. Raises InputError where they are not.
    """
    if any(call.batch is None for call in calls):
        raise _unlike(f"dimension {batch_dim} of their first tensors, which not all have")
    args = _joined([list(call.args) for call in calls], calls, batch_dim, "argument")
    kwargs = _joined([dict(call.kwargs) for call in calls], calls, batch_dim, "")
    return prepare_any(tuple(args), kwargs, batch_dim)


def _joined(values: list[Any], calls: Sequence[ModelCall], dim: int, name: str) -> Any:
    """The values of one place in all calls, as one value."""
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise _unlike(name)
    if isinstance(first, Tensor):
        return _joined_tensors(values, calls, dim, name)
    if type(first) is dict:
        if any(value.keys() != first.keys() for value in values):
            raise _unlike(f"the keywords of {name}" if name else "their keywords")
        return {
            key: _joined([value[key] for value in values], calls, dim, f"{name} {key}".strip())
            for key in first
        }
    if type(first) in (list, tuple):
        if len({len(value) for value in values}) > 1:
            raise _unlike(f"how many values {name} has" if name != "argument" else _COUNT)
        parts = zip(*values, strict=True)
        found = [_joined([*part], calls, dim, f"{name} {n}") for n, part in enumerate(parts)]
        return type(first)(found)
    if not isinstance(first, _PLAIN) or any(value != first for value in values):
        raise _unlike(name)  # an object of another class may hold rows, and nobody knows where
    return first


_COUNT = "how many arguments they have"


def _joined_tensors(values: list[Tensor], calls: Sequence[ModelCall], dim: int, name: str) -> Any:
    first = values[0]
    sizes = [value.shape[dim] if value.dim() > dim else None for value in values]
    if sizes != [call.batch for call in calls]:
        if all(value is first or _equal(value, first) for value in values):
            return first
        raise _unlike(name)
    others = {(*value.shape[:dim], *value.shape[dim + 1 :]) for value in values}
    if len(others) > 1 or len({(value.dtype, value.device) for value in values}) > 1:
        raise _unlike(name)
    return torch.cat(values, dim)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


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
