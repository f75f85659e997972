"""`GET /api/usage`: what an owner used, by day and model; with the scope `admin`, anybody."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.responses import Response

from weft.service.jobs.usage import DAY, KEY_LIMITS, day_of
from weft.wire.messages import UsageList, UsageRow

from .auth import check_scope
from .bodies import answer
from .state import Gateway, Visit, limits_for

DAYS = 30
"""How many days are told where nobody says since when."""

Day = Annotated[str, Meta(pattern="^[0-9]{4}-[0-9]{2}-[0-9]{2}$")]


class UsageQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`owner`: somebody else's, or `*`: everybody's; `since`, `until`: days, `2026-01-31`."""

    owner: Annotated[str, Meta(min_length=1, max_length=64)] | UnsetType = UNSET
    since: Day | UnsetType = UNSET
    until: Day | UnsetType = UNSET


def usage(gateway: Gateway, visit: Visit) -> Response:
    query, key = visit.query, visit.key
    assert isinstance(query, UsageQuery) and key is not None
    owner = visit.owner if query.owner is UNSET else query.owner
    if owner != visit.owner:
        check_scope(key, "admin")
    gateway.meter.flush()
    since = day_of(gateway.clock() - DAYS * DAY) if query.since is UNSET else query.since
    until = "9" if query.until is UNSET else query.until
    rows = gateway.ledger.usage(None if owner == "*" else owner, since, until)
    limits = limits_for(gateway, key)
    said = UsageList(
        usage=tuple(
            UsageRow(**{name: getattr(row, name) for name in UsageRow.__struct_fields__})
            for row in rows
        ),
        limits={name: float(getattr(limits, name)) for name in KEY_LIMITS},
        weight=key.weight,
        expires=key.expires,
    )
    return answer(visit.request, said)
