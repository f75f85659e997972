"""A model's tokenizer for the gateway, which never loads PyTorch.

Where the model's card has a file that gives the same ids and texts as the model's own tokenizer, it
is read here (`tokenizers`); else, and for chats, whose template is a program, the checker is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weft.service.store.interface import Key
from weft.wire.messages import ModelCard, Tokens, TokensQuery

from ..questions import answered, put
from ..state import Gateway
from .asks import Asked
from .errors import odd

KEPT = 16
"""Tokenizers that are kept."""
ROWS = 8192
"""Rows that the checker is asked for at once."""
AT_ONCE = 64
"""Rows that take less time than another thread."""


class Speaker:
    """Text to ids and back, for one request."""

    def __init__(self, gateway: Gateway, key: Key, card: ModelCard) -> None:
        if card.tokenizer is None:
            odd("model", f"{card.info.id} has no tokenizer on this server", "use the API of Weft")
        self._gateway = gateway
        self._key = key
        self._card = card

    async def ids(self, asked: Asked) -> tuple[tuple[int, ...], ...]:
        """The ids of each prompt. Raises `Refused` where there are none."""
        if asked.is_chat:
            if not self._card.tokenizer or not self._card.tokenizer.chat:
                odd("messages", f"{asked.model} has no chat template", "use /v1/completions")
            return self._whole((await self._asked(chats=asked.prompts)).rows)
        texts = [one for one in asked.prompts if isinstance(one, str)]
        told = iter((await self._asked(texts=tuple(texts))).rows if texts else ())
        rows: list[Any] = [next(told) if isinstance(one, str) else one for one in asked.prompts]
        return self._whole(rows)

    def _whole(self, rows: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
        if not all(rows):
            odd("prompt", "the prompt has no tokens")
        return tuple(rows)

    async def decode(self, rows: Sequence[tuple[int, ...]], marks: bool = False) -> tuple[str, ...]:
        """The texts of rows of ids, without the tokenizer's marks."""
        file = self._file()
        if file is None:
            parts = [rows[at : at + ROWS] for at in range(0, len(rows), ROWS)]
            found = [await self._asked(rows=tuple(p), skip_special_tokens=not marks) for p in parts]
            return tuple([text for one in found for text in one.texts])
        if len(rows) <= AT_ONCE:
            return _decoded(file, rows, marks)
        return await self._gateway.off(_decoded, file, rows, marks)

    def _file(self) -> Any:
        """The tokenizer of the card, if it gives the same texts."""
        told = self._card.tokenizer
        if told is None or told.json is None or not told.decodes:
            return None
        speakers, print_ = self._gateway.speakers, self._card.info.fingerprint
        if print_ not in speakers or speakers[print_][0] != told.json:
            from tokenizers import Tokenizer

            if len(speakers) >= KEPT:
                speakers.clear()
            speakers[print_] = told.json, Tokenizer.from_str(told.json)
        return speakers[print_][1]

    async def _asked(self, **what: Any) -> Tokens:
        query = TokensQuery(model=self._card.info.id, **what)
        gateway = self._gateway
        id = await gateway.off(put, gateway, self._key.owner, query, self._key)
        return await answered(gateway, id, TokensQuery)


def _decoded(file: Any, rows: Sequence[tuple[int, ...]], marks: bool) -> tuple[str, ...]:
    return tuple([file.decode(list(row), skip_special_tokens=not marks) for row in rows])
