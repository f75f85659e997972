"""What is counted of jobs that are over, for whoever watches the server. Pure.

    tallied(before, after)      # what a step of a job adds; nothing unless it ends

A count has a name and labels. Of a histogram each value counts in one bucket, in `_sum` and in
`_count`; buckets are added up when they are shown. Nothing is said of owners.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import Struct

from weft.service.jobs.life import FINAL, Job

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper ends of the buckets of times."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Upper ends of the buckets of batches."""


class Count(Struct, frozen=True):
    """So much more of something. `labels` are (name, value), in order."""

    name: str
    labels: tuple[tuple[str, str], ...] = ()
    value: float = 1.0


def tallied(before: Job, after: Job) -> list[Count]:
    """What a step adds."""
    if before.state in FINAL or after.state not in FINAL:
        return []
    model = ("model", after.model)
    found = [Count("weft_jobs_finished_total", (model, ("state", after.state)))]
    for stage, seconds in after.stages.items():
        found += observed("weft_stage_seconds", (model, ("stage", stage)), seconds, SECONDS)
    total = max(0.0, (after.ended or 0.0) - after.created)
    found += observed("weft_stage_seconds", (model, ("stage", "total")), total, SECONDS)
    if after.attempts:
        found += observed("weft_batch_jobs", (model,), after.batch, SIZES)
        found.append(Count("weft_jobs_merged_total", (model,), float(after.batch > 1)))
    return found


def observed(
    name: str, labels: tuple[tuple[str, str], ...], value: float, ends: Sequence[float]
) -> Iterator[Count]:
    """One value of a histogram."""
    end = next((f"{end:g}" for end in ends if value <= end), "+Inf")
    yield Count(f"{name}_bucket", (*labels, ("le", end)))
    yield Count(f"{name}_sum", labels, value)
    yield Count(f"{name}_count", labels)
