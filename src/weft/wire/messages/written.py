"""Bytes of messages, and messages of bytes."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from weft.errors import MessageError, TravelError


def encode(message: Struct, form: str = "msgpack") -> bytes:
    """The bytes of a message; `form` is `msgpack` or `json`.

    Raises `TravelError` for what has no bytes: half a character, a number beyond 64 bits.
    """
    module = msgspec.json if form == "json" else msgspec.msgpack
    try:
        return module.encode(message)
    except (UnicodeEncodeError, OverflowError, RecursionError) as error:
        raise TravelError(f"this cannot be written as a message: {error}") from None


def decode(data: bytes, kind: Any, form: str = "msgpack") -> Any:
    """The message. Raises `MessageError`, saying what is wrong and where."""
    module = msgspec.json if form == "json" else msgspec.msgpack
    try:
        return module.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeError, ValueError) as error:
        raise MessageError(f"this is not a message that can be read: {str(error)[:500]}") from None
