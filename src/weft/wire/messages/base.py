"""What all messages have in common: names and numbers with bounds, and who sends."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

PROTOCOL = 1

# `$` alone would let a line break follow
Id = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+(?!\n)$")]
Seconds = Annotated[float, Meta(gt=0, le=10**10)]
ModelId = Annotated[str, Meta(min_length=1, max_length=200)]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}(?!\n)$")]
"""SHA-256 of a tensor: of `dtype`, the shape as a JSON list, and its bytes (`frames.digest`)."""
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class Ask(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a client sends."""


class Tell(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a server sends."""
