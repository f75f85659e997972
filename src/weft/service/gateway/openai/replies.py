"""What is sent back, in OpenAI's form."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from .asks import Asked
from .choices import Part


class Told(NamedTuple):
    """A whole choice."""

    text: str
    scores: dict[str, Any] | None
    reason: str | None
    weft: dict[str, Any] | None
    count: int  # of tokens


class Reply:
    """The answers to one request: whole, or in pieces. `begun`: the tokens of its prompts."""

    def __init__(self, asked: Asked, created: float, begun: int, print_: str) -> None:
        self._asked = asked
        self._begun = begun
        prefix = "chatcmpl" if asked.is_chat else "cmpl"
        self._kind = "chat.completion" if asked.is_chat else "text_completion"
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(created),
            "model": asked.model,
            "system_fingerprint": f"fp_{print_[:12]}",
        }

    def whole(self, choices: Sequence[Told]) -> bytes:
        """The answer at once."""
        body = {
            **self._head,
            "object": self._kind,
            "choices": [self._choice(number, one) for number, one in enumerate(choices)],
            "usage": self.usage(sum(one.count for one in choices)),
        }
        if len(choices) == 1 and choices[0].weft is not None:
            body["weft"] = choices[0].weft
        return msgspec.json.encode(body)

    def _choice(self, number: int, told: Told) -> dict[str, Any]:
        found = self._head_of(number, told.reason, told.scores)
        if self._asked.is_chat:
            found["message"] = {"role": "assistant", "content": told.text, "refusal": None}
        else:
            found["text"] = told.text
        return (
            found if self._asked.choices == 1 or told.weft is None else found | {"weft": told.weft}
        )

    def piece(self, number: int, part: Part, *, first: bool = False) -> bytes:
        """A part of a choice as an event; `first` begins a chat's."""
        choice = self._head_of(number, part.reason, part.scores)
        text = None if part.reason and not part.text and not first else part.text
        if self._asked.is_chat:
            said = {} if text is None else {"content": text}
            choice["delta"] = {"role": "assistant", **said} if first else said
        else:
            choice["text"] = text or ""
        return self._event([choice], {} if part.weft is None else {"weft": part.weft})

    def _head_of(self, number: int, reason: str | None, scores: Any) -> dict[str, Any]:
        return {"index": number, "finish_reason": reason, "logprobs": scores}

    def last(self, count: int) -> bytes:
        """What was used, where it was asked for, and the end."""
        used = self._event([], {"usage": self.usage(count)}) if self._asked.usage else b""
        return used + b"data: [DONE]\n\n"

    def _event(self, choices: list[Any], more: Mapping[str, Any]) -> bytes:
        kind = f"{self._kind}.chunk" if self._asked.is_chat else self._kind
        if self._asked.usage:
            more = {"usage": None, **more}
        return event({**self._head, "object": kind, "choices": choices, **more})

    def usage(self, count: int) -> dict[str, int]:
        """Each prompt counts once, whatever the number of its choices."""
        return {
            "prompt_tokens": self._begun,
            "completion_tokens": count,
            "total_tokens": self._begun + count,
        }


def event(body: Any) -> bytes:
    return b"data: %s\n\n" % msgspec.json.encode(body)


def comment(text: str) -> bytes:
    """What keeps a connection open, and is no event."""
    return b": %s\n\n" % text.encode(errors="replace").replace(b"\n", b" ")
