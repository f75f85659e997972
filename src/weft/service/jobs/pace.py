"""How fast jobs of a model are done, from those that were done last. Pure.

    seconds_each(jobs)                     # 0.2: while it worked, one was done every 0.2 seconds

Jobs that ran side by side count for the time that passed, not for the sum of their times: where ten
share a forward pass of one second, one is done every tenth of a second.
"""

from __future__ import annotations

from collections.abc import Iterable

from weft.service.jobs.life import Job


def seconds_each(jobs: Iterable[Job]) -> float | None:
    """Seconds of a worker's time for each job; None where none was done yet."""
    spans = sorted((j.ended - j.stages.get("run", 0.0), j.ended) for j in jobs if j.ended)
    if not spans:
        return None
    busy, until = 0.0, float("-inf")
    for begun, ended in spans:
        busy += max(0.0, ended - max(begun, until))
        until = max(until, ended)
    return busy / len(spans)
