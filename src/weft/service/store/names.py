"""What objects may be called: `[A-Za-z0-9_-]+` parts with `/` between. Nothing else is a name.

So no name can lead out of the folder, be hidden, or be one name on one system and two on another.
"""

from __future__ import annotations

import re

PART = 128
"""The longest part; owners, ids and digests are shorter."""
PARTS = 8
_NAME = re.compile(rf"[A-Za-z0-9_-]{{1,{PART}}}(?:/[A-Za-z0-9_-]{{1,{PART}}}){{0,{PARTS - 1}}}")


def checked(name: str) -> str:
    """The name. Raises ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot be an object's name: at most {PARTS} parts of [A-Za-z0-9_-], "
            f"each of at most {PART}, with / between"
        )
    return name


def checked_prefix(prefix: str) -> str:
    """A folder with its `/`, or empty. Raises ValueError."""
    if prefix and not prefix.endswith("/"):
        raise ValueError(f"{prefix!r} is no folder: it should end with /")
    if prefix:
        checked(prefix[:-1])
    return prefix


def checked_range(start: int, end: int | None) -> None:
    """Raises ValueError."""
    if start < 0 or (end is not None and end < start):
        raise ValueError(f"there are no bytes from {start} to {end}")
