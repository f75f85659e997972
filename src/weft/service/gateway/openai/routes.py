"""`/v1`: models, completions and chat completions, for clients that speak OpenAI's interface.

Each request is an ordinary job: priced, queued, merged, limited and counted as any other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

import msgspec
from starlette.responses import Response

from weft.errors import WeftError
from weft.service.store.interface import Card
from weft.wire.messages import ModelCard, decode

from ..accept import check_model, models_of
from ..bodies import Bound, check_plain, form_of, held, while_there
from ..errors import Refused, trusted
from ..events import stream
from ..models import not_ready
from ..state import Gateway, Visit, limits_for
from .asks import Asked, chat, completion
from .choices import Choice, Part, together
from .errors import error_of
from .following import BEAT_SECONDS
from .jobs import check_choices, submitted
from .replies import Reply, Told, comment, event
from .speaking import Speaker
from .spelling import added

JSON_BYTES = 8 << 20
CARD_SECONDS = 0.25
"""How often it is looked whether anything is known of a model by now."""
CLOSED_EARLY = 499


def models(gateway: Gateway, visit: Visit) -> Response:
    cards = {card.model: card for card in gateway.ledger.cards()}
    listed = [_model(gateway, id) for id in models_of(gateway, visit.key) if _speaks(cards.get(id))]
    return _json({"object": "list", "data": listed})


def model(gateway: Gateway, visit: Visit) -> Response:
    id = visit.request.path_params["model"]
    check_model(gateway, visit.key, id)
    return _json(_model(gateway, id))


def _speaks(card: Card | None) -> bool:
    return card is None or card.state != "failed"


def _model(gateway: Gateway, id: str) -> dict[str, Any]:
    return {"id": id, "object": "model", "created": int(gateway.born), "owned_by": "weft"}


def _json(body: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), 200, headers, "application/json")


async def completions(gateway: Gateway, visit: Visit) -> Response:
    return await _answered(gateway, visit, completion)


async def chats(gateway: Gateway, visit: Visit) -> Response:
    return await _answered(gateway, visit, chat)


async def _answered(gateway: Gateway, visit: Visit, reading: Callable[[bytes], Asked]) -> Response:
    if gateway.draining:
        raise not_ready("the server is about to stop and takes no new jobs")
    async with held(gateway, visit.request, _bound(gateway, visit)) as data:
        asked = reading(data)
    card = await gateway.off(_card, gateway, visit, asked.model)
    if card is None and asked.stream:
        return stream(_streamed(gateway, visit, asked, None))
    while card is None:
        if await visit.request.is_disconnected():
            return Response(status_code=CLOSED_EARLY)
        card = await _card_soon(gateway, visit, asked.model)
    begun = await _begun(gateway, visit, asked, card, watched=False)
    headers = {"Weft-Job": visit.request.scope["weft"].job}
    if asked.stream:
        return stream(_streamed(gateway, visit, asked, begun), headers)
    return await _whole(gateway, visit, begun, headers)


def _bound(gateway: Gateway, visit: Visit) -> Bound:
    if form_of(visit.request) != "json":
        raise Refused(WeftError("the body is JSON"), 415)
    check_plain(visit.request)
    most = min(JSON_BYTES, limits_for(gateway, visit.key).body_bytes)
    return Bound(most, "body_bytes")


def _card(gateway: Gateway, visit: Visit, model: str) -> ModelCard | None:
    """The model's card. None: it is not known yet. Blocks."""
    found = check_model(gateway, visit.key, model)
    if found is None:
        return None
    with trusted():
        return decode(found.card, ModelCard)


async def _card_soon(gateway: Gateway, visit: Visit, model: str) -> ModelCard | None:
    """The same, a moment later."""
    await asyncio.sleep(CARD_SECONDS)
    if gateway.draining or gateway.closing:
        raise not_ready("the server is about to stop and takes no new jobs")
    return await gateway.off(_card, gateway, visit, model)


class Begun(NamedTuple):
    """Choices whose jobs are there, and how they are told."""

    choices: list[Choice]
    reply: Reply


async def _begun(
    gateway: Gateway, visit: Visit, asked: Asked, card: ModelCard, watched: bool
) -> Begun:
    """`watched`: somebody else looks whether the client is there."""
    key = visit.key
    assert key is not None
    check_choices(gateway, key, asked)
    speaker = Speaker(gateway, key, card)
    reading = _read(asked, speaker)
    rows, openings = await (reading if watched else while_there(visit.request, reading))
    sent = await gateway.off(submitted, gateway, key, asked, rows, card, visit.id)
    choices = [
        Choice(gateway, asked, one, speaker, number, openings[number // asked.n])
        for number, one in enumerate(sent)
    ]
    visit.request.scope["weft"].job = ",".join(one.job.id for one in sent)
    created, begun = sent[0].job.created, sum(map(len, rows))
    return Begun(choices, Reply(asked, created, begun, card.info.fingerprint))


async def _read(asked: Asked, speaker: Speaker) -> tuple[tuple[tuple[int, ...], ...], list[str]]:
    """The ids of its prompts, and what stands before the answers of each."""
    rows = await speaker.ids(asked)
    return rows, await _openings(asked, rows, speaker)


async def _openings(asked: Asked, rows: Sequence[tuple[int, ...]], speaker: Speaker) -> list[str]:
    """What stands before the answers of each prompt: with `echo`, the prompt."""
    if not asked.echo:
        return [""] * len(rows)
    texts = await speaker.decode(rows)
    pairs = zip(asked.prompts, texts, strict=True)
    return [given if isinstance(given, str) else text for given, text in pairs]


# -- at once --------------------------------------------------------------------------------------


async def _whole(gateway: Gateway, visit: Visit, begun: Begun, headers: dict[str, str]) -> Response:
    told: list[Told] = []
    try:
        for choice in begun.choices:  # one after the other: nothing is lost that came before
            found = await _told(visit, choice)
            if found is None:
                return Response(status_code=CLOSED_EARLY)
            told.append(found)
    finally:
        await gateway.off(_abandon, begun.choices)
    return Response(begun.reply.whole(told), 200, headers, "application/json")


async def _told(visit: Visit, choice: Choice) -> Told | None:
    """A whole choice; None where its client has gone."""
    text, scores = "", None
    async with aclosing(choice.parts()) as parts:
        async for part in parts:
            text, scores = text + part.text, added(scores, part.scores)
            if part.reason is not None:
                return Told(text, scores, part.reason, part.weft, choice.count)
            if await visit.request.is_disconnected():
                return None
    return None


def _abandon(choices: Sequence[Choice]) -> None:
    for choice in choices:
        choice.abandon()


# -- in pieces ------------------------------------------------------------------------------------


async def _streamed(
    gateway: Gateway, visit: Visit, asked: Asked, begun: Begun | None
) -> AsyncGenerator[bytes, None]:
    """`begun` is None while nothing is known of the model."""
    try:
        card, since = None, time.monotonic()
        while begun is None:
            if time.monotonic() - since >= BEAT_SECONDS:
                since = time.monotonic()
                yield comment(f"{asked.model} is being loaded")
            card = await _card_soon(gateway, visit, asked.model)
            begun = None if card is None else await _begun(gateway, visit, asked, card, True)
        async with aclosing(_pieces(asked, begun)) as pieces:
            async for piece in pieces:
                yield piece
    except (Refused, WeftError) as error:
        refused = error if isinstance(error, Refused) else Refused(error)
        visit.request.scope["weft"].meets(refused)
        yield event(error_of(refused.report(visit.id), refused.status))
    finally:
        if begun is not None:
            await gateway.off(_abandon, begun.choices)


async def _pieces(asked: Asked, begun: Begun) -> AsyncGenerator[bytes, None]:
    choices, reply = begun
    if asked.is_chat:
        for choice in choices:
            yield reply.piece(choice.index, Part(), first=True)
    async with aclosing(together(choices)) as parts:
        async for choice, part in parts:
            if part.text or part.scores or part.reason:
                yield reply.piece(choice.index, part)
            elif part.idle:
                yield comment(part.idle)
    yield reply.last(sum(choice.count for choice in choices))
