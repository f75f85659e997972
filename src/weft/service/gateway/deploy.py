"""Models that come and go while the server runs, by key.

What is deployed is a row of the store, written before it is acknowledged, so that it is there after
a restart; the fleet takes it over from there. The operator's own models, of the command line and
the file, cannot be touched from outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
from msgspec.structs import replace
from starlette.responses import Response

from weft.errors import AccessError, LimitError, MessageError, WrongModelError
from weft.service.store.interface import Key
from weft.service.store.models import Deployed
from weft.wire.messages import Deploy, Evict, ModelInfo

from .accept import models_of
from .bodies import answer, read, taken
from .errors import Refused
from .models import info_of
from .sources import HUB_ID as NAME
from .sources import source_of
from .state import Gateway, Visit

MOST = 100
"""Models of one server (`fleet.models.MOST`)."""
PATIENCE, LOOK = 5.0, 0.05
"""Seconds until what was asked for shows, at most, and between two looks."""


async def deploy(gateway: Gateway, visit: Visit) -> Response:
    model, new = await taken(gateway, visit, _deployed, visit.key)
    _order(gateway, "look", model)
    await _shows(gateway, lambda: model in gateway.models)
    told = await gateway.off(_told, gateway, model)
    return answer(visit.request, told, 201 if new else 200)


async def evict(gateway: Gateway, visit: Visit) -> Response:
    query: Evict = await taken(gateway, visit, _evicted, visit.key)
    _order(gateway, "look" if query.forget else "evict", query.model)
    if query.forget:
        await _shows(gateway, lambda: query.model not in gateway.models)
        told = await gateway.off(_told, gateway, query.model)
        return answer(visit.request, replace(told, state="gone"))
    told = await gateway.off(_told, gateway, query.model)
    return answer(visit.request, told)


def _order(gateway: Gateway, what: str, model: str) -> None:
    assert gateway.order is not None  # `_fixed` has looked
    gateway.order("look" if what == "look" else "evict", model)


async def _shows(gateway: Gateway, so: Callable[[], bool]) -> None:
    """Waits until it is so; whoever asks later sees it anyway."""
    end = time.monotonic() + PATIENCE
    with gateway.watch.attend() as waiter:
        while not so() and not gateway.closing and time.monotonic() < end:
            waiter.clear()
            await waiter.over(LOOK)


def _told(gateway: Gateway, model: str) -> ModelInfo:
    return info_of(model, gateway.ledger.card(model), gateway.ledger.memory(model))


# -- what the store is told; all of it blocks ------------------------------------------------------


def _deployed(gateway: Gateway, owner: str, data: bytes, form: str, key: Key) -> tuple[str, bool]:
    """Writes the row. Its id, and whether it is new."""
    query: Deploy = read(data, Deploy, form)
    _check_open(gateway)
    source = source_of(query.source, gateway.settings)
    name = query.name or (source.rpartition("/")[2] if source.startswith("/") else source)
    if not NAME.fullmatch(name):
        raise MessageError(
            f"{name[:80]!r} cannot be what clients call a model",
            fix="name it: letters, digits, '.', '_' and '-', of which the first is a letter or a "
            "digit, as ids of the hub",
        )
    if key.models and name not in key.models:
        raise AccessError(
            f"this key is for models of other names than {name!r}",
            fix=f"deploy it as one of {', '.join(key.models)}",
        )
    body = _body(query, name, source)
    rows = {row.id: row for row in gateway.ledger.deployed()}
    before = rows.get(name)
    if before is None and name in gateway.models:
        raise _conflict(f"{name!r} is a model of the server's own configuration")
    if before is None and len(set(gateway.models) | set(rows)) >= MOST:
        raise LimitError(f"this server has {MOST} models, which is the most that one has")
    if before is not None and _weights(before.body) != _weights(body):
        raise _conflict(f"{name!r} is deployed from another source, or in another form")
    now = gateway.clock()
    row = Deployed(name, body, owner, now) if before is None else before
    gateway.ledger.put_deployed(replace(row, body=body, tries=row.tries + 1))
    return name, before is None


def _evicted(gateway: Gateway, owner: str, data: bytes, form: str, key: Key) -> Evict:
    query: Evict = read(data, Evict, form)
    _check_open(gateway)
    models = models_of(gateway, key)
    if query.model not in models:
        served = ", ".join(models) or "none"
        raise WrongModelError(
            f"this server has no model {query.model[:80]!r}", fix=f"the models it has: {served}"
        )
    if query.forget:
        if not gateway.ledger.remove_deployed(query.model):
            raise _conflict(f"{query.model!r} is a model of the server's own configuration")
        return query
    row = gateway.ledger.memory(query.model)
    if row is not None and row.pinned:
        raise _conflict(
            f"{query.model!r} is pinned",
            "deploy it again without pinning it, or forget it; one of the server's own "
            "configuration can be changed there",
        )
    return query


def _body(query: Deploy, name: str, source: str) -> bytes:
    """The fleet's `Deployment`."""
    fields = {
        "id": name,
        "source": source,
        "dtype": query.dtype,
        "attn_implementation": query.attn_implementation,
        "device": query.device,
        "pinned": query.pinned,
    }
    return msgspec.json.encode(fields)


def _weights(body: bytes) -> object:
    """What two deployments of one name must have in common."""
    return {name: value for name, value in msgspec.json.decode(body).items() if name != "pinned"}


def _check_open(gateway: Gateway) -> None:
    if gateway.order is None:
        raise AccessError("the models of this server are fixed")


def _conflict(what: str, fix: str = "choose another name, or forget that one first") -> Refused:
    return Refused(MessageError(what, fix=fix), 409)
