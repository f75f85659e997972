"""What the gateway cannot know without torch: it asks the checker, through the store, and waits.

Where nobody waits any more, as the client has gone or the time is over, the question is withdrawn:
the checker does not begin it, and what it has in hand is for nobody.
"""

from __future__ import annotations

import time
from typing import Any

from msgspec import Struct
from starlette.responses import Response

from weft.errors import TimeLimitError
from weft.service.store.ids import new_id
from weft.service.store.interface import Key, Question
from weft.wire.messages import (
    Applied,
    ApplyQuery,
    ErrorReport,
    SignatureQuery,
    SourceQuery,
    SourceText,
    Tables,
    Tokens,
    TokensQuery,
    decode,
    encode,
)
from weft.wire.reports import error_of

from .accept import RETRY_SECONDS, check_model
from .bodies import answer, read, taken, while_there
from .errors import Refused, trusted
from .models import not_ready
from .state import Gateway, Visit

ANSWERS: dict[type[Struct], type[Struct]] = {
    SignatureQuery: Tables,
    SourceQuery: SourceText,
    ApplyQuery: Applied,
    TokensQuery: Tokens,
}
STOPPING = "the server is about to stop and answers no questions"
LAST_SECONDS = 2.0
"""How long an answer is waited for once the checker has been told to stop."""


async def signature(gateway: Gateway, visit: Visit) -> Response:
    return await asked(gateway, visit, SignatureQuery)


async def source(gateway: Gateway, visit: Visit) -> Response:
    return await asked(gateway, visit, SourceQuery)


async def apply(gateway: Gateway, visit: Visit) -> Response:
    return await asked(gateway, visit, ApplyQuery)


async def tokens(gateway: Gateway, visit: Visit) -> Response:
    return await asked(gateway, visit, TokensQuery)


async def asked(gateway: Gateway, visit: Visit, kind: type[Struct]) -> Response:
    """Reads the question, has it answered, and gives the answer or its error."""
    id = await taken(gateway, visit, ask, kind, visit.key)
    found = await while_there(visit.request, answered(gateway, id, kind))
    return answer(visit.request, found)


async def answered(gateway: Gateway, id: str, kind: type[Struct]) -> Any:
    """The answer to a question of this kind that was written down; the error that it is, raised."""
    found = None
    try:
        found = await until_answered(gateway, id)
    finally:
        if found is None:
            await gateway.off(gateway.ledger.withdraw, id)
    if found is None:
        error = TimeLimitError(
            f"the checker had no answer within {gateway.settings.price_seconds:g} seconds, "
            "the limit price_seconds"
        )
        again = {"Retry-After": str(RETRY_SECONDS)}
        raise Refused(error, 503, again, limit="price_seconds")
    return said(found, ANSWERS[kind])


def ask(
    gateway: Gateway, owner: str, data: bytes, form: str, kind: type[Struct], key: Key | None
) -> str:
    """Writes the question down; its id. Blocks."""
    return put(gateway, owner, read(data, kind, form), key)


def put(gateway: Gateway, owner: str, query: Any, key: Key | None) -> str:
    """The same of a question that was read. Blocks."""
    if gateway.draining:
        raise not_ready(STOPPING)
    if check_model(gateway, key, query.model, getattr(query, "fingerprint", None)) is None:
        raise not_ready(f"{query.model} is still being loaded")
    now = gateway.clock()
    question = Question(new_id(now), type(query).__name__, owner, encode(query), created=now)
    gateway.ledger.ask(question)
    gateway.bells.ring("checker")
    return question.id


async def until_answered(gateway: Gateway, id: str) -> Question | None:
    """The answered question. None: the time is over. Where the server is about to stop, the checker
    only answers what it has in hand."""
    end, stopping = time.monotonic() + gateway.settings.price_seconds, False
    with gateway.watch.attend() as waiter:
        while not gateway.closing:
            waiter.clear()
            found = await gateway.off(gateway.ledger.take_answer, id)
            if found is not None:
                return found
            if gateway.draining and not stopping:
                end, stopping = min(end, time.monotonic() + LAST_SECONDS), True
            left = end - time.monotonic()
            if left <= 0:
                if stopping:
                    break
                return None
            await waiter.over(left)
    raise not_ready(STOPPING)


def said(question: Question, kind: type[Struct]) -> Any:
    """The answer as a message; the error that it is is raised."""
    with trusted():
        found = decode(question.answer or b"", kind if question.ok else ErrorReport)
    if isinstance(found, ErrorReport):
        raise error_of(found)
    return found
