"""How much in which time: a bucket that fills by itself; and what is said where it is too much.
Pure: the time is passed in.

bucket = Bucket(full=100)
wait, bucket = take(bucket, 100, 60.0, now)   # 0.0: there was one; else seconds until there is
raise no_seconds(most=60.0, used=61.5, now=now)     # of the accelerator, today
"""

from __future__ import annotations

import math

from msgspec import Struct

from weft.errors import LimitError

from .usage import until_tomorrow


class Bucket(Struct, frozen=True):
    """How many are in it, and when that was. A new one is full, whatever `left` says."""

    left: float = 0.0
    at: float | None = None


def take(bucket: Bucket, most: int, seconds: float, now: float) -> tuple[float, Bucket]:
    """Takes one out, if there is one. `most` fit in, and as many come back in `seconds`.

    Where there is none, the first number is after how many seconds there is, and the bucket stays.
    """
    rate = most / seconds
    left = most if bucket.at is None else min(most, bucket.left + rate * max(0.0, now - bucket.at))
    if left >= 1.0 - 1e-9:  # who waited for as long as it was told finds one
        return 0.0, Bucket(max(0.0, left - 1.0), now)
    return (1.0 - left) / rate, Bucket(left, now)


# -- what is said ----------------------------------------------------------------------------------


def beyond(
    name: str, value: float, what: str, *, seconds: float, fix: str, sure: bool = True
) -> LimitError:
    """That something is more than a limit lets: the limit, its value, and when to come back.

    `seconds`: after which it may be asked anew; not `sure`: there may be room by then.
    """
    when = f"{fix}; in {in_words(whole(seconds))} there {'is' if sure else 'may be'} room"
    return LimitError(f"{what}; the limit {name} is {value:.15g}", fix=when)


def no_seconds(most: float, used: float, now: float) -> LimitError:
    """That the seconds of a day are used up (`run_seconds_per_day`)."""
    return beyond(
        "run_seconds_per_day",
        most,
        f"jobs of this key ran {used:.1f} seconds today",
        seconds=until_tomorrow(now),
        fix="wait for the next day (UTC)",
    )


def whole(seconds: float) -> int:
    """As `Retry-After` says it."""
    return max(1, math.ceil(seconds))


def in_words(seconds: int) -> str:
    """`90 seconds`, `3 hours`."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{math.ceil(seconds / length)} {unit}"
    return f"{seconds} second{'s' * (seconds != 1)}"
