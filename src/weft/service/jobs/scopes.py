"""What a key may do: its scopes, and which of them a route is content with. Pure.

- `run`: submit jobs, cancel and delete them, upload constants, ask what recording needs
- `read`: one's own jobs and results, the models
- `deploy`: load models and put them away
- `metrics`: what the server counts of itself
- `admin`: all of these, and everybody's usage

allows(("run",), "read")               # True: who may run may read what it ran
"""

from __future__ import annotations

from collections.abc import Iterable

SCOPES = ("run", "read", "deploy", "metrics", "admin")
USUAL = ("run", "read")
"""The scopes of a key of which nothing else was said, such as one of before there were scopes."""

_IMPLIED: dict[str, frozenset[str]] = {
    "run": frozenset({"read"}),
    "deploy": frozenset({"read"}),
    "admin": frozenset(SCOPES),
}


def allows(scopes: Iterable[str], needed: str) -> bool:
    """Whether a key with these scopes may do what needs that one."""
    return any(needed == one or needed in _IMPLIED.get(one, ()) for one in scopes)
