"""What a key may do in a time, or have at once: the refusals, and what they say.

    raise over("queued_jobs", 1000, "1000 jobs of this key wait already", seconds=3.0, fix="...")
    raise too_much("nodes", 10, "the graph has 12 nodes", "record less in one block")

Each refusal names the limit and its value. Of what there may be again later it is 429 and says, in
`Retry-After` too, when to come back; of what one request may not have at all it is 413.
"""

from __future__ import annotations

from starlette.requests import Request

from weft.errors import LimitError
from weft.service.jobs.limits import beyond, no_seconds, whole
from weft.service.jobs.usage import day_of, total, until_tomorrow
from weft.service.store.interface import Key
from weft.service.store.said import expires
from weft.service.store.sweep import UNSENT
from weft.settings import Settings

from .entry import Entry
from .errors import Refused
from .state import Gateway, limits_for

MINUTE = 60.0
"""When to come back where nobody knows."""
ALWAYS = frozenset({"/api/usage", "/api/jobs/{id}/cancel"})
"""Paths that are open to who has used up a day's bytes."""


def over(
    name: str,
    value: float,
    what: str,
    *,
    seconds: float,
    fix: str,
    sure: bool = True,
) -> Refused:
    """The refusal of what is more than a limit lets. `seconds`: after which it may be asked anew;
    not `sure`: there may be room by then.

    Every refusal of that sort is made here, so that all say the limit, its value and the time.
    """
    error = beyond(name, value, what, seconds=seconds, fix=fix, sure=sure)
    return _later(error, name, seconds)


def _later(error: LimitError, name: str, seconds: float) -> Refused:
    return Refused(error, 429, {"Retry-After": str(whole(seconds))}, limit=name)


def too_much(name: str, value: float, what: str, fix: str | None = None) -> Refused:
    """The refusal of what no single request may have."""
    return Refused(LimitError(f"{what}; the limit {name} is {value:.15g}", fix=fix), limit=name)


def check_door(gateway: Gateway, key: Key, entry: Entry, request: Request) -> None:
    """Holds a request to what its key may still do now. Blocks the first time of a day."""
    limits = limits_for(gateway, key)
    if limits.requests_per_minute:
        seconds = gateway.meter.wait(key.owner, limits.requests_per_minute)
        if seconds:
            raise over(
                "requests_per_minute",
                limits.requests_per_minute,
                "this key has asked more often than it may",
                seconds=seconds,
                fix="ask less often",
            )
    if entry.path not in ALWAYS and entry.method != "DELETE":
        _check_bytes(gateway, key, limits, request)


def _check_bytes(gateway: Gateway, key: Key, limits: Settings, request: Request) -> None:
    if not (limits.up_bytes_per_day or limits.down_bytes_per_day):
        return
    now = gateway.clock()
    today = gateway.meter.today(key.owner)
    length = request.headers.get("content-length", "")
    coming = int(length) if length.isascii() and length.isdigit() and len(length) < 19 else 0
    for name, most, used in (
        ("up_bytes_per_day", limits.up_bytes_per_day, today.up + coming),
        ("down_bytes_per_day", limits.down_bytes_per_day, today.down + 1),
    ):
        if most and used > most:
            verb = "send" if name.startswith("up") else "fetch"
            raise over(
                name,
                most,
                f"this key has no bytes left to {verb} today",
                seconds=until_tomorrow(now),
                fix="wait for the next day (UTC)",
            )


def check_seconds(gateway: Gateway, key: Key) -> None:
    """Holds a new job to the seconds of a day; whoever claims it looks again (`store.days`).
    Blocks."""
    most = limits_for(gateway, key).run_seconds_per_day
    if not most:
        return
    now = gateway.clock()
    today = day_of(now)
    used = total(gateway.ledger.usage(key.owner, today, today)).seconds
    if used >= most:
        error = no_seconds(most, used, now)
        raise _later(error, "run_seconds_per_day", until_tomorrow(now))


def check_stored(gateway: Gateway, key: Key | None, size: int) -> None:
    """Holds a constant or an edit that is about to be kept to the bytes that are kept of one key.
    Blocks."""
    most = limits_for(gateway, key).stored_bytes
    if key is None or not most or gateway.store.fits(key.owner, size, most):
        return
    idle = max(gateway.settings.keep_seconds, UNSENT)
    oldest = gateway.store.oldest(key.owner)
    raise over(
        "stored_bytes",
        most,
        f"with these {size} bytes more than may be kept of the constants and edits of this key",
        seconds=idle if oldest is None else oldest + idle - gateway.clock(),
        fix="use fewer tensors, or smaller ones, or delete edits; tensors that are not used any "
        "more go by themselves",
        sure=oldest is not None,
    )


def check_kept(gateway: Gateway, key: Key) -> None:
    """Holds a new job to the bytes that jobs of a key take in the store. Blocks."""
    most = limits_for(gateway, key).kept_bytes
    used = gateway.ledger.kept_bytes(key.owner) if most else 0
    if used < most or not most:
        return
    first = gateway.ledger.first_ended(key.owner)
    until = None if first is None else expires(first, gateway.settings.keep_seconds)
    raise over(
        "kept_bytes",
        most,
        f"{used} bytes of requests, results and events of this key are kept",
        seconds=MINUTE if until is None else until - gateway.clock(),
        fix="fetch results and delete their jobs (job.delete(), weft jobs delete), or wait until "
        "some expire",
        sure=False,
    )


def queue_full(gateway: Gateway, model: str, most: int) -> Refused:
    """Too many jobs wait: there is room when one of them has run."""
    times = [job.stages.get("run", 0.0) for job in gateway.ledger.recent(model, 20)]
    seconds = sum(times) / len(times) if times else 1.0
    return over(
        "queued_jobs",
        most,
        f"{most} jobs of this key wait already",
        seconds=min(60.0, seconds),
        fix="wait until some are done, or cancel some",
        sure=False,
    )
