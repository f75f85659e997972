"""What a key's owner has used, and which limits a key may have of its own. Pure.

    spent(before, after, now)              # what a step of a job adds to the account; None: nothing
    settings_for(settings, job.limits)     # the settings as they are for one key

**What is counted of a job.** Once, when it is over and was begun at least once: one job, and the
cost that it was priced at. Seconds of the accelerator are those of the last time that it was begun,
the one that ended it, as its worker measured them. A time that was lost, with a worker that died
or a server that was stopped, is nobody's, unless the job fails for it: then all of them are its
own, as it may have been what the workers died of. A job that is begun again is so counted once. One
that was never begun costs nothing, and counts as refused if it was the checker that did not want
it. Bytes of weights are counted when a job is priced, whatever becomes of it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace as changed
from typing import Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from weft.service.jobs.life import FINAL, Job

DAY = 24 * 3600.0

S = TypeVar("S", bound=Any)


class Usage(Struct, frozen=True, kw_only=True):
    """What one owner used on one day (UTC), of one model (or, as "", of none in particular).

    `cost` is in floating point operations, as priced; `seconds` are those of the accelerator, `up`
    and `down` bytes of bodies, `weights` bytes of the model's weights that may have left.
    """

    owner: str
    day: str
    model: str = ""
    jobs: int = 0
    cost: float = 0.0
    seconds: float = 0.0
    up: int = 0
    down: int = 0
    requests: int = 0
    refusals: int = 0
    weights: int = 0


WHOSE = ("owner", "day", "model")
COUNTED = tuple(name for name in Usage.__struct_fields__ if name not in WHOSE)


def plus(one: Usage, other: Usage) -> Usage:
    """Both together, in the account of the first."""
    return replace(one, **{name: getattr(one, name) + getattr(other, name) for name in COUNTED})


def total(rows: list[Usage]) -> Usage:
    found = Usage(owner="", day="")
    for row in rows:
        found = plus(found, row)
    return found


def day_of(now: float) -> str:
    """The day (UTC), `2026-01-31`."""
    return time.strftime("%Y-%m-%d", time.gmtime(now))


def until_tomorrow(now: float) -> float:
    """Seconds until the next day begins (UTC)."""
    return DAY - now % DAY


# -- jobs ------------------------------------------------------------------------------------------


def spent(before: Job, after: Job, now: float) -> Usage | None:
    """What a step adds to the account of a job's owner."""
    mine = Usage(owner=after.owner, day=day_of(now), model=after.model)
    if before.state == "received" and after.state == "queued":
        return replace(mine, weights=after.weights) if after.weights else None
    if after.state not in FINAL or before.state in FINAL:
        return None
    if after.attempts == 0:
        return replace(mine, refusals=1) if after.state == "failed" else None
    return replace(mine, jobs=1, cost=after.cost, seconds=_seconds(before, after, now))


def _seconds(before: Job, after: Job, now: float) -> float:
    if after.used is not None:
        return after.used
    if before.state != "running":
        return 0.0  # cancelled while it waited to be begun again
    if after.state == "failed" and " Lost " in after.history[-1]:
        return after.stages.get("run", 0.0)
    return max(0.0, now - before.since)


# -- limits of a key -------------------------------------------------------------------------------

PER_TIME = ("requests_per_minute", "up_bytes_per_day", "down_bytes_per_day", "run_seconds_per_day")
"""Limits of what is used in a time; 0: any amount."""
AT_ONCE = (
    *("queued_jobs", "running_jobs", "stored_bytes", "kept_bytes"),
    *("sessions", "key_session_bytes"),
)
"""Limits of what is there at once."""
OF_ONE = (
    *("body_bytes", "constant_bytes", "result_bytes", "memory_bytes", "flops", "nodes"),
    *("run_seconds", "log_bytes", "stream_bytes", "new_tokens", "choices", "session_bytes"),
)
"""Limits of one request."""
KEY_LIMITS = (*PER_TIME, *AT_ONCE, *OF_ONE)
"""Settings that may be others for a key."""


def settings_for(settings: S, limits: Mapping[str, float]) -> S:
    """The settings (a dataclass) as they are for a key that has these limits."""
    known = {name: value for name, value in limits.items() if name in KEY_LIMITS}
    given = {name: type(getattr(settings, name))(value) for name, value in known.items()}
    return changed(settings, **given) if given else settings
