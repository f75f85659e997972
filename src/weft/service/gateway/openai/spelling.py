"""Log-probabilities in OpenAI's form: tokens by their text, and where each begins.

    spelling = Spelling(speaker, prompt_ids, asked)
    spelling.told(scores)           # of the next tokens; None where nothing was asked for

The text of a token is the difference that it makes after those before it. One that is no whole
characters there has no text of its own, and is called `token_id:N`, as is a second one of the same
text among the likely ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .asks import Asked
from .scores import Score
from .speaking import Speaker
from .texts import HALF

BEFORE = 3
"""So many ids before are decoded along with one."""
LEAST = -9999.0
"""What stands for a log-probability of minus infinity, as JSON has none."""


class Spelling:
    """See the module's text."""

    def __init__(self, speaker: Speaker, prompt: Sequence[int], asked: Asked) -> None:
        self._speaker = speaker
        self._asked = asked
        self._prompt = tuple(prompt)
        self._before = () if asked.echo else self._prompt[-BEFORE:]
        self._offset = 0  # of the next token in the text

    async def told(
        self, scores: Sequence[Score], begun: Sequence[Score] | None = None
    ) -> dict[str, Any] | None:
        """The next tokens. `begun` are the prompt's own from the second on; the first has none."""
        told: list[Score | int] = list(scores)
        if self._asked.echo and not self._before and (begun or len(self._prompt) == 1):
            told = [self._prompt[0], *(begun or ()), *told]
        if self._asked.tops is None or not told:
            return None
        rows = [self._row(one, told[:number]) for number, one in enumerate(told)]
        texts = iter(await self._speaker.decode([row for each in rows for row in each]))
        named = [await self._named(row, [next(texts) for _ in row]) for row in rows]
        self._before = (*self._before, *[_id(one) for one in told])[-BEFORE:]
        found = [(one, names) for one, (names, _) in zip(told, named, strict=True)]
        if self._asked.is_chat:
            return _chat(found)
        return _completion(found, [self._place(length) for _, length in named])

    async def _named(
        self, row: Sequence[tuple[int, ...]], texts: Sequence[str]
    ) -> tuple[list[str | None], int]:
        """The texts of the last ids of rows after the first, which is what stands before them; and
        by how many characters the first of them makes the text longer."""
        before, own = texts[:2]
        names = [_added(before, text) for text in texts[1:]]
        marks = [one[-1:] for one, name in zip(row[1:], names, strict=True) if name == ""]
        if marks:  # what is no text has a name of its own
            found = iter(await self._speaker.decode(marks, marks=True))
            names = [next(found) if name == "" else name for name in names]
        return names, len(own.rstrip(HALF)) - len(before.rstrip(HALF))

    def _place(self, length: int) -> int:
        """Where a token of so many characters begins."""
        place = self._offset
        self._offset += length
        return place

    def _row(self, one: Score | int, earlier: Sequence[Score | int]) -> list[tuple[int, ...]]:
        """What came before, with the token, and with each of the likely ones."""
        before = (*self._before, *[_id(two) for two in earlier[-BEFORE:]])[-BEFORE:]
        tops = () if isinstance(one, int) else one.tops
        return [before, (*before, _id(one)), *[(*before, id) for id, _ in tops]]


def _id(one: Score | int) -> int:
    return one if isinstance(one, int) else one.id


def _added(before: str, text: str) -> str | None:
    """What an id adds to the text before it; None where that is no whole characters."""
    own = text[len(before) :] if text.startswith(before) else HALF
    return None if HALF in own or before.endswith(HALF) else own


def _number(value: float) -> float | None:
    """As JSON has it: NaN is null."""
    return None if math.isnan(value) else max(value, LEAST)


def _completion(
    found: Sequence[tuple[Score | int, list[str | None]]], places: list[int]
) -> dict[str, Any]:
    tokens, values, tops = [], [], []
    for one, (own, *others) in found:
        tokens.append(f"token_id:{_id(one)}" if own is None else own)
        values.append(None if isinstance(one, int) else _number(one.value))
        tops.append(None if isinstance(one, int) or not others else _likely(one, others))
        if tops[-1] is not None:
            tops[-1].setdefault(tokens[-1], values[-1])
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops if any(one is not None for one in tops) else None,
        "text_offset": places,
    }


def _likely(one: Score, names: Sequence[str | None]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for (id, value), name in zip(one.tops, names, strict=True):
        known = name is None or name in found
        found[f"token_id:{id}" if known else name] = _number(value)  # type: ignore[index]
    return found


def _chat(found: Sequence[tuple[Score | int, list[str | None]]]) -> dict[str, Any]:
    content = []
    for one, (own, *others) in found:
        assert isinstance(one, Score)
        likely = [
            _token(id, value, name) for (id, value), name in zip(one.tops, others, strict=True)
        ]
        content.append(_token(one.id, one.value, own) | {"top_logprobs": likely})
    return {"content": content, "refusal": None}


def _token(id: int, value: float, text: str | None) -> dict[str, Any]:
    name = f"token_id:{id}" if text is None else text
    return {
        "token": name,
        "logprob": _number(value),
        "bytes": None if text is None else list(text.encode()),
    }


def added(first: dict[str, Any] | None, more: dict[str, Any] | None) -> dict[str, Any] | None:
    """Two of them, one after the other."""
    if first is None or more is None:
        return more if first is None else first
    return {name: _both(first[name], more[name]) for name in first}


def _both(one: Any, two: Any) -> Any:
    return one if two is None else two if one is None else [*one, *two]
