"""What a key is to be, from the words of a command line, and what keys and usage look like there.

fields = fields_of(scopes=["run"], models=[], expires="30d", weight=2.0, limits=["nodes=10"])
add_key(ledger, "ann", now, **fields)
"""

from __future__ import annotations

import calendar
import difflib
import re
import time
from collections.abc import Sequence
from typing import Any

from weft.errors import SettingError
from weft.service.jobs.scopes import SCOPES, USUAL
from weft.service.jobs.usage import KEY_LIMITS, Usage, day_of
from weft.service.store.interface import Key, Ledger
from weft.settings import TEXTS, Settings

MOST_WEIGHT = 1000.0
DEFAULTS = Settings()
_UNITS = {"h": 3600.0, "d": 24 * 3600.0, "w": 7 * 24 * 3600.0}
_SPAN = re.compile(r"([0-9]{1,6})([hdw])")


def fields_of(
    *,
    scopes: Sequence[str] = (),
    models: Sequence[str] = (),
    expires: str | None = None,
    weight: float = 1.0,
    limits: Sequence[str] = (),
    now: float,
) -> dict[str, Any]:
    """Fields of a `Key`. Raises `SettingError`, which says what there is."""
    for scope in scopes:
        if scope not in SCOPES:
            raise SettingError(
                f"there is no scope {scope!r}", fix=f"scopes are {', '.join(SCOPES)}"
            )
    if not 1 / MOST_WEIGHT <= weight <= MOST_WEIGHT:
        raise SettingError(
            f"a weight of {weight:g} cannot be", fix=f"give one up to {MOST_WEIGHT:g}; 1 is usual"
        )
    return {
        "scopes": tuple(dict.fromkeys(scopes)) or USUAL,
        "models": tuple(dict.fromkeys(models)),
        "expires": None if expires is None else _time(expires, now),
        "weight": weight,
        "limits": dict(_limit(text) for text in limits),
    }


def _limit(text: str) -> tuple[str, float]:
    name, given, value = text.partition("=")
    if name not in KEY_LIMITS:
        near = difflib.get_close_matches(name, KEY_LIMITS, n=1)
        listed = f"did you mean {near[0]}?" if near else f"limits are {', '.join(KEY_LIMITS)}"
        raise SettingError(f"a key has no limit {name!r}", fix=listed)
    try:
        number = float(value) if given else -1.0
    except ValueError:
        number = -1.0
    whole = isinstance(getattr(DEFAULTS, name), int)
    if not 0 <= number < 2**63 or (whole and number % 1):  # 0.5 is not 0, which may be any number
        raise SettingError(
            f"{text!r} sets no limit: {name} is {TEXTS[name]}",
            fix=f"write {name}=NUMBER{', a whole one' if whole else ''}",
        )
    return name, number


def _time(text: str, now: float) -> float:
    """`30d`, `12h`, `2w` from now, or a day (UTC), at whose beginning it ends."""
    span = _SPAN.fullmatch(text)
    then = now + float(span[1]) * _UNITS[span[2]] if span is not None else _start_of(text)
    if then is None or then <= now:
        raise SettingError(
            f"{text!r} is no time to come", fix="write 12h, 30d, 2w, or a day such as 2030-01-31"
        )
    return then


def _start_of(text: str) -> float | None:
    """When a day (UTC) begins; None for what is none."""
    try:
        return float(calendar.timegm(time.strptime(text, "%Y-%m-%d")))
    except ValueError:
        return None


def day_in(text: str) -> str:
    """A day (UTC), such as 2030-01-31; "" for "". Raises `SettingError`."""
    start = _start_of(text) if text else 0.0
    if start is None:
        raise SettingError(f"{text!r} is no day", fix="write one such as 2030-01-31")
    return day_of(start) if text else ""


# -- showing ---------------------------------------------------------------------------------------


def show_keys(ledger: Ledger, now: float) -> str:
    """All keys, one a line: digest, owner, when it was made and used, and what it may."""
    keys = ledger.keys()
    return "\n".join(_line(key, now) for key in keys) or "there are no keys yet"


def _line(key: Key, now: float) -> str:
    used = "never used" if key.used is None else f"used {_minute(key.used)}"
    parts = [key.digest[:12], f"{key.owner:<20}", _day(key.created), f"{used:<21}"]
    parts.append(",".join(key.scopes) or "no scopes")
    if key.models:
        parts.append(f"models {','.join(key.models)}")
    if key.weight != 1.0:
        parts.append(f"weight {key.weight:g}")
    parts += [f"{name}={value:.15g}" for name, value in sorted(key.limits.items())]
    if key.expires is not None:
        parts.append(f"{'expired' if key.expires <= now else 'until'} {_minute(key.expires)}")
    if key.revoked is not None:
        parts.append("revoked")
    return "  ".join(parts)


def show_usage(rows: Sequence[Usage]) -> str:
    """A line for each day, owner and model, under a head."""
    head = ("day", "owner", "model", "jobs", "cost", "seconds", "up", "down", "requests")
    head = (*head, "refusals", "weights")
    lines = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    pad = ["<" if column < 3 else ">" for column in range(len(head))]
    return "\n".join(
        "  ".join(f"{cell:{p}{w}}" for cell, p, w in zip(line, pad, widths, strict=True)).rstrip()
        for line in lines
    )


def _cells(row: Usage) -> tuple[str, ...]:
    counted = (row.up, row.down, row.requests, row.refusals, row.weights)
    first = (row.day, row.owner, row.model or "-", str(row.jobs))
    return (*first, f"{row.cost:.3g}", f"{row.seconds:.2f}", *map(str, counted))


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(at))


def _minute(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(at))
