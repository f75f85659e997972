"""What the server is and has: handshake, health, models as data."""

from __future__ import annotations

import logging
import time
from typing import Annotated

from msgspec import Meta, Struct
from msgspec.structs import replace
from starlette.responses import Response

from weft.errors import ModelNotReadyError
from weft.service.store.interface import Card
from weft.service.store.models import WorkerMemory
from weft.wire.messages import (
    PROTOCOL,
    Hello,
    ModelCard,
    ModelInfo,
    ModelList,
    ModelStatus,
    ServerStatus,
    Tables,
    decode,
)

from .accept import RETRY_SECONDS, check_model, models_of
from .bodies import answer, preferred
from .errors import Refused, trusted
from .state import Gateway, Visit, limits_of

LOG = logging.getLogger("weft.gateway")

WARM = 0.9
"""A model with so much of its files in memory needs no disk to be loaded."""

CAPABILITIES = ("constants", "events", "looks", "ranges", "sessions", "tokens")


class ModelQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`model`: the id of one of the server's models."""

    model: Annotated[str, Meta(min_length=1, max_length=200)]


def not_ready(why: str) -> Refused:
    """Come back later."""
    error = ModelNotReadyError(why, fix=f"try again in {RETRY_SECONDS} seconds")
    return Refused(error, 503, {"Retry-After": str(RETRY_SECONDS)})


def hello(gateway: Gateway, visit: Visit) -> Response:
    said = Hello(
        protocols=(PROTOCOL,),
        version=gateway.version,
        capabilities=CAPABILITIES,
        limits=limits_of(gateway.settings),
    )
    return answer(visit.request, said)


def status(gateway: Gateway, visit: Visit) -> Response:
    return answer(visit.request, _status(gateway, visit))


def _status(gateway: Gateway, visit: Visit) -> ServerStatus:
    counts = gateway.ledger.counts()
    cards = {card.model: card for card in gateway.ledger.cards()}

    taken = {row.model: row for row in gateway.ledger.memories()}

    def told(model: str) -> ModelStatus:
        row = taken.get(model, WorkerMemory(model=model))
        return ModelStatus(
            id=model,
            state=state_of(cards.get(model), taken.get(model)),
            waiting=counts.get((model, "received"), 0) + counts.get((model, "queued"), 0),
            running=counts.get((model, "running"), 0),
            host_bytes=row.host,
            device_bytes=row.device,
            used=row.used or None,
        )

    seconds = time.monotonic() - gateway.started
    models = tuple(told(model) for model in models_of(gateway, visit.key))
    return ServerStatus(version=gateway.version, seconds=seconds, models=models)


def listing(gateway: Gateway, visit: Visit) -> Response:
    cards = {card.model: card for card in gateway.ledger.cards()}
    taken = {row.model: row for row in gateway.ledger.memories()}
    ids = models_of(gateway, visit.key)
    models = tuple(info_of(id, cards.get(id), taken.get(id)) for id in ids)
    return answer(visit.request, ModelList(models=models))


def serves(gateway: Gateway, card: Card) -> bool:
    """Whether jobs of the model are taken and will run; one that is loaded on demand need not be
    there."""
    if card.state in ("ready", "cold"):
        return True
    row = gateway.ledger.memory(card.model)
    return card.state == "loading" and row is not None and not row.pinned


def state_of(card: Card | None, row: WorkerMemory | None) -> str:
    """How a model is, for people: `ModelInfo.state`."""
    state = "loading" if card is None else card.state
    return state if row is None else state_by_row(state, row)


def state_by_row(state: str, row: WorkerMemory) -> str:
    """The state, where one that is cold may be warm."""
    warm = state == "cold" and row.files and row.cached >= WARM * row.files
    return "warm" if warm else state


def info_of(id: str, card: Card | None, row: WorkerMemory | None) -> ModelInfo:
    """A model as the list of models has it."""
    known = ModelInfo(id=id, family="", class_name="", fingerprint="", dtype="", parameters=0)
    if card is not None and card.card:
        with trusted():
            known = decode(card.card, _InfoOnly).info
    row = row or WorkerMemory(model=id)
    return replace(
        known,
        state=state_of(card, row),
        reason=None if card is None else card.reason,
        pinned=row.pinned,
        host_bytes=row.host,
        device_bytes=row.device,
        need_bytes=row.need,
        need_device_bytes=row.need_device,
        weight_bytes=row.weights,
        loaded_bytes=row.loaded,
        used=row.used or None,
    )


class _InfoOnly(Struct):
    """The head of a card, without its modules."""

    info: ModelInfo


def card(gateway: Gateway, visit: Visit) -> Response:
    found = _ready(gateway, visit)
    form = preferred(visit.request)
    headers = {"ETag": f'"{found.fingerprint}-{form}"', "Cache-Control": "private, no-cache"}
    if visit.request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    with trusted():
        told = decode(found.card, ModelCard)
    return answer(visit.request, told, headers=headers)


def tables(gateway: Gateway, visit: Visit) -> Response:
    return answer(visit.request, Tables(data=_ready(gateway, visit).tables))


def _ready(gateway: Gateway, visit: Visit) -> Card:
    query = visit.query
    assert isinstance(query, ModelQuery)
    found = check_model(gateway, visit.key, query.model)
    if found is None:
        raise not_ready(f"{query.model} is still being loaded")
    return found
