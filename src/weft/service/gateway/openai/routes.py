"""`/v1`: models, completions and chat completions, for clients that speak OpenAI's interface.

Each request is an ordinary job: priced, queued, merged, limited and counted as any other.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response

from weft.errors import WeftError
from weft.service.jobs.life import Job
from weft.service.store.interface import Card
from weft.wire.messages import ModelCard, decode

from ..accept import check_model, models_of
from ..bodies import Bound, check_plain, form_of, pieces
from ..errors import Refused, trusted
from ..events import stream
from ..models import not_ready
from ..state import Gateway, Visit, limits_for
from .asks import Asked, chat, completion
from .errors import error_of
from .following import abandon, answer_of, followed
from .jobs import IDS, Sent, submitted
from .replies import Reply, event
from .speaking import Speaker
from .texts import Text

INLINE_BYTES = 65_536
"""A result of at most so many bytes comes with the answer."""
JSON_BYTES = 8 << 20


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
    key = visit.key
    assert key is not None
    asked = reading(await _body(gateway, visit))
    card = await gateway.off(_card, gateway, visit, asked.model)
    speaker = Speaker(gateway, key, card)
    ids = await speaker.ids(asked)
    sent = await gateway.off(submitted, gateway, key, asked, ids, card)
    text = Text(speaker.decode, ids, asked.stop)
    reply = Reply(asked, sent, card.info.fingerprint)
    headers = {"Weft-Job": sent.job.id}
    visit.request.scope["weft"].job = sent.job.id
    if asked.stream:
        return stream(_streamed(gateway, visit, asked, sent, text, reply), headers)
    return await _whole(gateway, visit, asked, sent, text, reply, headers)


async def _body(gateway: Gateway, visit: Visit) -> bytes:
    if form_of(visit.request) != "json":
        raise Refused(WeftError("the body is JSON"), 415)
    check_plain(visit.request)
    most = min(JSON_BYTES, limits_for(gateway, visit.key).body_bytes)
    bound = Bound(most, "body_bytes")
    return b"".join([piece async for piece in pieces(visit.request, bound)])


def _card(gateway: Gateway, visit: Visit, model: str) -> ModelCard:
    found = check_model(gateway, visit.key, model)
    if found is None:
        raise not_ready(f"{model} is still being loaded")
    with trusted():
        return decode(found.card, ModelCard)


# -- at once --------------------------------------------------------------------------------------


async def _whole(
    gateway: Gateway,
    visit: Visit,
    asked: Asked,
    sent: Sent,
    text: Text,
    reply: Reply,
    headers: dict[str, str],
) -> Response:
    job = None
    try:
        async with aclosing(followed(gateway, sent)) as news:
            async for one in news:
                job = one.over
                if job is None and await visit.request.is_disconnected():
                    break
    finally:
        if job is None:
            await gateway.off(abandon, gateway, sent, "its client went away")
    if job is None:
        return Response(status_code=499)
    ids = await gateway.off(answer_of, gateway, sent, job)
    said = await text.add(_spoken(ids, sent)) + await text.end()
    more = await gateway.off(_told, gateway, asked, job)
    body = reply.whole(said, _reason(ids, sent, text), len(ids), more)
    return Response(body, 200, headers, "application/json")


def _spoken(ids: tuple[int, ...], sent: Sent) -> tuple[int, ...]:
    """The ids without the one that ends them."""
    return ids[:-1] if ids and ids[-1] in sent.ends else ids


def _reason(ids: tuple[int, ...], sent: Sent, text: Text) -> str:
    ended = bool(ids) and ids[-1] in sent.ends
    return "length" if len(ids) >= sent.most and not (ended or text.stopped) else "stop"


def _told(gateway: Gateway, asked: Asked, job: Job) -> dict[str, Any] | None:
    """The job, for who asked for more than text; with its result, if that is small. Blocks."""
    if not asked.extended:
        return None
    told: dict[str, Any] = {"job": job.id, "names": [name for name in job.names if name != IDS]}
    if told["names"] and (job.result_bytes or 0) <= INLINE_BYTES:
        told["result"] = base64.b64encode(gateway.objects.get(f"results/{job.id}")).decode()
    return told


# -- in pieces ------------------------------------------------------------------------------------


async def _streamed(
    gateway: Gateway, visit: Visit, asked: Asked, sent: Sent, text: Text, reply: Reply
) -> AsyncGenerator[bytes, None]:
    over = False
    try:
        yield reply.piece("" if asked.is_chat else None, first=True) if asked.is_chat else b""
        async with aclosing(_parts(gateway, sent, text)) as parts:
            async for part, ids, job in parts:
                over = job is not None
                if part:
                    yield reply.piece(part)
                if job is not None:
                    more = await gateway.off(_told, gateway, asked, job)
                    yield reply.piece(None, _reason(ids, sent, text), more)
                    yield reply.last(len(ids))
    except (Refused, WeftError) as error:
        over = True
        refused = error if isinstance(error, Refused) else Refused(error)
        yield event(error_of(refused.report(visit.id), refused.status))
    finally:
        if not over:
            await gateway.off(abandon, gateway, sent, "its client went away")


async def _parts(
    gateway: Gateway, sent: Sent, text: Text
) -> AsyncGenerator[tuple[str, tuple[int, ...], Job | None], None]:
    """Text as it comes; at last all ids and the job."""
    seen: tuple[int, ...] = ()
    async with aclosing(followed(gateway, sent)) as news:
        async for one in news:
            if one.over is None:
                seen += one.ids
                yield await text.add(one.ids), seen, None
                continue
            ids = await gateway.off(answer_of, gateway, sent, one.over)
            rest = _spoken(ids, sent)[len(seen) :]
            yield await text.add(rest) + await text.end(), ids, one.over
