"""How much in which time: a bucket that fills by itself. Pure: the time is passed in.

bucket = Bucket(full=100)
wait, bucket = take(bucket, 100, 60.0, now)   # 0.0: there was one; else seconds until there is
"""

from __future__ import annotations

from msgspec import Struct


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
