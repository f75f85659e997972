"""Bytes and times for people, as tables and messages of the command line show them."""

from __future__ import annotations

import time


def size_of(count: int | None) -> str:
    """`1.5 GiB`; nothing where there is no figure."""
    if count is None:
        return ""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def seconds_of(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`, `2.0 d`."""
    seconds = max(0.0, seconds)
    for unit, size in (("d", 86_400), ("h", 3_600)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"


def ago(then: float) -> str:
    """How long ago a time was, in seconds since 1970."""
    return seconds_of(time.time() - then)
