"""A served model's tokenizer on the user's machine: the `tokenizers` file it published, and asking.

speaker(["The Eiffel Tower", "Rome"])["input_ids"]      # the ids of the model's own tokenizer
speaker.decode(ids)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from weft.errors import InputError, MessageError, UnknownOptionError
from weft.wire.messages import ChatMessage, TokenizerCard, Tokens, TokensQuery

Ids = list[int]


class Encoded(dict[str, Any]):
    """What a tokenizer gives, by name; `.input_ids` too."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class Speaker:
    """A tokenizer made from its card. `ask` puts a question to the server.

    `bos_token`, `eos_token_id` and their kin are attributes; None for a mark that it has not got.
    """

    def __init__(self, id: str, card: TokenizerCard, ask: Callable[[TokensQuery], Tokens]) -> None:
        self.name_or_path = id
        self.chat_template = "on the server" if card.chat else None
        self._card = card
        self._ask = ask
        self._file = _opened(card)
        for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
            mark, number = card.special.get(f"{name}_token", (None, None))
            setattr(self, f"{name}_token", mark)
            setattr(self, f"{name}_token_id", number)

    def __repr__(self) -> str:
        where = "here" if self._file is not None else "asked of the server"
        return f"<tokenizer of {self.name_or_path}, {where}>"

    # -- texts to ids ----------------------------------------------------------------------------

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        **unknown: Any,
    ) -> Encoded:
        """`input_ids` and `attention_mask` of a text, or of several: lists, or with
        `return_tensors="pt"` tensors `[batch, pos]`.

        Raises `InputError` for texts of different lengths as one tensor, `UnknownOptionError` for
        options that it has not got (padding is added by `trace`).
        """
        if unknown:
            raise UnknownOptionError(f"a served tokenizer has no option {', '.join(unknown)}")
        one = isinstance(text, str)
        rows = self._rows([text] if isinstance(text, str) else list(text), add_special_tokens)
        masks = [[1] * len(row) for row in rows]
        if return_tensors == "pt":
            if len({len(row) for row in rows}) > 1:
                raise InputError(
                    "texts of different lengths make no tensor",
                    fix="give the texts to trace(...), which pads them",
                )
            return Encoded(input_ids=torch.tensor(rows), attention_mask=torch.tensor(masks))
        if return_tensors is not None:
            raise UnknownOptionError(f"return_tensors is 'pt' or None, not {return_tensors!r}")
        return Encoded(
            input_ids=rows[0] if one else rows, attention_mask=masks[0] if one else masks
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> Ids:
        """The ids of a text."""
        return self._rows([text], add_special_tokens)[0]

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, str]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
    ) -> Ids:
        """The ids of a chat through the model's own template, which the server runs."""
        if not tokenize or return_dict:
            raise UnknownOptionError(
                "a served tokenizer gives the ids of a chat, as a list",
                fix="leave out tokenize= and return_dict=",
            )
        chat = tuple([ChatMessage(role=m["role"], content=m["content"]) for m in messages])
        query = TokensQuery(
            model=self.name_or_path, chats=(chat,), add_generation_prompt=add_generation_prompt
        )
        return _one_each(self._ask(query).rows, 1)[0]

    def _rows(self, texts: list[str], special: bool) -> list[Ids]:
        for text in texts:
            if not isinstance(text, str):
                raise InputError(f"a tokenizer takes text, not {type(text).__name__}")
        if self._file is not None:
            found = self._file.encode_batch(texts, add_special_tokens=special)
            return [one.ids for one in found]
        query = TokensQuery(model=self.name_or_path, texts=tuple(texts), add_special_tokens=special)
        return _one_each(self._ask(query).rows, len(texts))

    # -- ids to texts ----------------------------------------------------------------------------

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of ids: a list, a tensor `[pos]`, or one id."""
        return self.batch_decode([ids], skip_special_tokens)[0]

    def batch_decode(self, rows: Iterable[Any], skip_special_tokens: bool = False) -> list[str]:
        """The text of each row of ids."""
        lists = [_ids(row) for row in rows]
        if self._file is not None and self._card.decodes:
            return self._file.decode_batch(lists, skip_special_tokens=skip_special_tokens)
        query = TokensQuery(
            model=self.name_or_path,
            rows=tuple(map(tuple, lists)),
            skip_special_tokens=skip_special_tokens,
        )
        return _one_each(self._ask(query).texts, len(lists))

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""
        return self._whole().get_vocab(with_added_tokens=True)

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The tokens of ids, or of one id."""
        if isinstance(ids, int):
            return self._whole().id_to_token(ids)
        return [self._whole().id_to_token(number) for number in _ids(ids)]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The ids of tokens, or of one token."""
        if isinstance(tokens, str):
            return self._whole().token_to_id(tokens)
        return [self._whole().token_to_id(token) for token in tokens]

    def __len__(self) -> int:
        return self._whole().get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        return True

    def _whole(self) -> Any:
        if self._file is None:
            raise InputError(
                f"the tokenizer of {self.name_or_path} is on the server only",
                fix="use it on texts and ids, or give tokenizer= when opening the model",
            )
        return self._file


def _opened(card: TokenizerCard) -> Any:
    """The tokenizer's file as the library reads it; None where the server is to be asked."""
    if card.json is None:
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    try:
        return Tokenizer.from_str(card.json)
    except Exception as error:  # noqa: BLE001 (the library raises no other)
        raise MessageError(f"the tokenizer of the card cannot be read: {error!s:.200}") from None


def _ids(row: Any) -> Ids:
    if isinstance(row, int):
        return [row]
    found = row.tolist() if isinstance(row, torch.Tensor) else list(row)
    return found if isinstance(found, list) else [found]


def _one_each(found: Sequence[Any], count: int) -> list[Any]:
    if len(found) != count:
        raise MessageError(f"the server's tokenizer gave {len(found)} answers to {count} questions")
    return [list(one) if isinstance(one, tuple) else one for one in found]
