"""What the server is and has: handshake, health, models as data."""

from __future__ import annotations

import logging
import time
from typing import Annotated

from msgspec import Meta, Struct
from starlette.responses import Response

from weft.errors import ModelNotReadyError
from weft.service.store.interface import Card
from weft.wire.messages import (
    PROTOCOL,
    Health,
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


def health(gateway: Gateway, visit: Visit) -> Response:
    """Without a key, so without names: how many models there are is no secret, which is one."""
    try:
        cards = gateway.ledger.cards()
        store = "ok"
    except Exception:
        LOG.exception("the store cannot be read", extra={"request": visit.id})
        cards, store = [], "failing"
    ready = sum(card.state == "ready" and card.model in gateway.models for card in cards)
    parts = {
        "gateway": "draining" if gateway.draining else "ok",
        "store": store,
        "models": f"{ready} of {len(gateway.models)} ready",
    }
    if gateway.sandbox is not None:
        parts["sandbox"] = gateway.sandbox
    well = not gateway.draining and store == "ok" and ready == len(gateway.models)
    headers = {} if well else {"Retry-After": str(RETRY_SECONDS)}
    said = Health(live=True, ready=well, parts=parts)
    return answer(visit.request, said, 200 if well else 503, headers)


def status(gateway: Gateway, visit: Visit) -> Response:
    return answer(visit.request, _status(gateway, visit))


def _status(gateway: Gateway, visit: Visit) -> ServerStatus:
    counts = gateway.ledger.counts()
    cards = {card.model: card for card in gateway.ledger.cards()}

    def told(model: str) -> ModelStatus:
        return ModelStatus(
            id=model,
            state=cards[model].state if model in cards else "loading",
            waiting=counts.get((model, "received"), 0) + counts.get((model, "queued"), 0),
            running=counts.get((model, "running"), 0),
        )

    seconds = time.monotonic() - gateway.started
    models = tuple(told(model) for model in models_of(gateway, visit.key))
    return ServerStatus(version=gateway.version, seconds=seconds, models=models)


def listing(gateway: Gateway, visit: Visit) -> Response:
    cards = {card.model: card for card in gateway.ledger.cards()}
    models = tuple(_info(id, cards.get(id)) for id in models_of(gateway, visit.key))
    return answer(visit.request, ModelList(models=models))


def _info(id: str, card: Card | None) -> ModelInfo:
    if card is not None and card.state == "ready":
        with trusted():
            return decode(card.card, _InfoOnly).info
    return ModelInfo(
        id=id,
        family="",
        class_name="",
        fingerprint="",
        dtype="",
        parameters=0,
        state="loading" if card is None else card.state,
        reason=None if card is None else card.reason,
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
