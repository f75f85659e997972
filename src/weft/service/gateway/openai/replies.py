"""What is sent back, in OpenAI's form."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

from .asks import Asked
from .jobs import Sent


class Reply:
    """The answers to one request: whole, or in pieces."""

    def __init__(self, asked: Asked, sent: Sent, print_: str) -> None:
        self._asked = asked
        self._sent = sent
        prefix = "chatcmpl" if asked.is_chat else "cmpl"
        self._kind = "chat.completion" if asked.is_chat else "text_completion"
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(sent.job.created),
            "model": asked.model,
            "system_fingerprint": f"fp_{print_[:12]}",
        }

    def whole(self, text: str, reason: str, count: int, weft: Mapping[str, Any] | None) -> bytes:
        """The answer at once."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if self._asked.is_chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        body = {**self._head, "object": self._kind, "choices": [choice], "usage": self.usage(count)}
        return msgspec.json.encode(body if weft is None else {**body, "weft": weft})

    def piece(
        self,
        text: str | None,
        reason: str | None = None,
        weft: Mapping[str, Any] | None = None,
        *,
        first: bool = False,
    ) -> bytes:
        """A part of the answer as an event; `first` begins a chat's."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if self._asked.is_chat:
            said = {} if text is None else {"content": text}
            choice["delta"] = {"role": "assistant", **said} if first else said
        else:
            choice["text"] = text or ""
        return self._event([choice], {} if weft is None else {"weft": weft})

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
        prompt = len(self._sent.ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": count,
            "total_tokens": prompt + count,
        }


def event(body: Any) -> bytes:
    return b"data: %s\n\n" % msgspec.json.encode(body)
