"""From what a user gives to token ids: text, chat messages, lists, arrays, tensors.

Nothing here pads: the result is a tensor `[batch, pos]` of the user's own, or a list of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.errors import InputError

Rows = list[list[int]]

WHAT_IS_TAKEN = (
    "a text, a list of texts, chat messages, token ids (list, list of lists, tensor, array), "
    "or a dict with input_ids"
)


def read_tokens(inputs: object, tokenizer: Any) -> Tensor | Rows:
    """Token ids as an int64 tensor `[batch, pos]` (never the user's own), or as rows of any
    lengths.

    `tokenizer` may be None where no text is given. Raises InputError, saying what is taken.
    """
    if isinstance(inputs, str):
        return [
            tokenizer_of(tokenizer)(inputs)["input_ids"]
        ]  # with the special tokens of its default
    if isinstance(inputs, Tensor):
        return _tensor_ids(inputs)
    if isinstance(inputs, np.ndarray):
        return _array_ids(inputs)
    if isinstance(inputs, list | tuple):
        return _list_ids(inputs, tokenizer)
    if isinstance(inputs, Mapping) and "role" in inputs:
        raise InputError("a chat is a list of messages", fix="[{'role': ..., 'content': ...}]")
    raise InputError(f"cannot make a prompt of {_kind(inputs)}", fix=f"give {WHAT_IS_TAKEN}")


def _list_ids(inputs: Sequence[Any], tokenizer: Any) -> Rows:
    if not inputs:
        raise InputError("the prompt is empty: no row", fix=f"give {WHAT_IS_TAKEN}")
    first = inputs[0]
    if isinstance(first, str):
        texts = list(_all(inputs, str, "texts"))
        return tokenizer_of(tokenizer)(texts)["input_ids"]
    if isinstance(first, Mapping):
        return [_chat_ids(inputs, tokenizer)]
    if isinstance(first, list | tuple) and first and isinstance(first[0], Mapping):
        return [_chat_ids(chat, tokenizer) for chat in _all(inputs, list | tuple, "chats")]
    if isinstance(first, list | tuple) or (isinstance(first, Tensor | np.ndarray) and first.ndim):
        return [_row(row) for row in _all(inputs, list | tuple | Tensor | np.ndarray, "rows")]
    return [_row(inputs)]


def _all(items: Sequence[Any], kind: Any, name: str) -> Sequence[Any]:
    """The items, all of one kind: a mixture is a mistake somewhere."""
    for number, item in enumerate(items):
        if not isinstance(item, kind):
            raise InputError(
                f"a list of {name} holds {_kind(item)} at index {number}",
                fix="give a list whose items are all of one kind",
            )
    return items


# --- text ----------------------------------------------------------------------------------------


def tokenizer_of(tokenizer: Any) -> Callable[..., Any]:
    """The tokenizer; InputError if there is none."""
    if tokenizer is None:
        raise InputError(
            "a text was given, and this model has no tokenizer",
            fix="LanguageModel(..., tokenizer=<id, folder or tokenizer>), or give token ids",
        )
    return tokenizer


def _chat_ids(messages: Sequence[Any], tokenizer: Any) -> list[int]:
    """One chat through the tokenizer's template, ending where the assistant is to speak."""
    _check_messages(messages)
    speaker: Any = tokenizer_of(tokenizer)
    if not getattr(speaker, "chat_template", None):
        raise InputError(
            "chat messages were given, and this tokenizer has no chat template",
            fix="give the prompt as one text, or set tokenizer.chat_template",
        )
    return speaker.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
    )


def _check_messages(messages: Sequence[Any]) -> None:
    for number, message in enumerate(messages):
        right = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not right or not isinstance(message.get("content"), str):
            raise InputError(
                f"message {number} of a chat is {_kind(message)} without a text role and content",
                fix="{'role': 'user', 'content': 'a text'}",
            )


# --- ids -----------------------------------------------------------------------------------------

_WHOLE = frozenset({torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8})


def _tensor_ids(ids: Tensor) -> Tensor:
    """A copy: an edit of the embedding's input in place must not reach the user's tensor."""
    if ids.dtype not in _WHOLE:
        raise InputError(
            f"token ids are whole numbers, not a tensor of {ids.dtype}",
            fix="give integers: ids.long()",
        )
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2:
        raise InputError(
            f"token ids are [pos] or [batch, pos], not {list(ids.shape)}",
            fix="give one row, or a batch of rows",
        )
    return ids.clone() if ids.dtype is torch.int64 else ids.long()


def _array_ids(ids: np.ndarray) -> Tensor:
    if ids.dtype.kind not in "iu":
        raise InputError(
            f"token ids are whole numbers, not an array of {ids.dtype}",
            fix="give integers: ids.long()",
        )
    return _tensor_ids(torch.from_numpy(ids.astype(np.int64)))


def _row(row: Any) -> list[int]:
    """One row of token ids as Python ints."""
    if isinstance(row, Tensor | np.ndarray):
        ids = _tensor_ids(row) if isinstance(row, Tensor) else _array_ids(row)
        if len(ids) != 1 or row.ndim != 1:
            raise InputError(
                f"a row of a list is [pos], not {list(row.shape)}",
                fix="give a list of rows, or one tensor [batch, pos]",
            )
        return ids[0].tolist()
    return [_whole(item) for item in row]


def _whole(item: Any) -> int:
    if type(item) is int:
        return item
    if isinstance(item, np.integer):
        return int(item)
    if isinstance(item, Tensor) and item.ndim == 0 and item.dtype in _WHOLE:
        return int(item)
    raise InputError(
        f"a row of token ids holds {_kind(item)}", fix="one list of ints per prompt, no deeper"
    )


def _kind(item: object) -> str:
    name = type(item).__name__
    return f"{name} {item!r}" if isinstance(item, str | int | float | bool) else f"a {name}"
