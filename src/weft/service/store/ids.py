"""Names for new things: ids of jobs, which sort by time, and tokens of claims, hard to guess.

new_id(now)        # "0h5y0w2m9qk" (the time) and 15 random characters: 26 of [a-z0-9]
new_token()
"""

from __future__ import annotations

import secrets

DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
TIME, CHANCE = 11, 15
"""Characters for microseconds since 1970 (enough for 4,000 years), and for chance (77 bits)."""


def new_id(now: float) -> str:
    """An id that sorts after all ids of an earlier microsecond."""
    return _time(int(now * 1e6)) + "".join(secrets.choice(DIGITS) for _ in range(CHANCE))


def new_token() -> str:
    return secrets.token_urlsafe(18)


def _time(moment: int) -> str:
    if not 0 <= moment < 36**TIME:
        raise ValueError(f"{moment} microseconds since 1970 have no place in an id")
    text = ""
    for _ in range(TIME):
        moment, digit = divmod(moment, 36)
        text = DIGITS[digit] + text
    return text
