"""One route as data. The table of them (`app.ROUTES`) makes the routing, the OpenAPI document and
the page at `/docs`; `docs/wire.md` is tested against it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from msgspec import Struct
from starlette.responses import Response

from .state import Gateway, Visit

Handler = Callable[[Gateway, Visit], Response | Awaitable[Response]]
"""One that is no coroutine function may block: it is called on a thread."""


class NoQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """The route takes no query parameters."""


class Entry(Struct, frozen=True, kw_only=True):
    """`takes` and `gives` are messages, or the media type of something else.

    `statuses` says what each other answer means: those that every route has are left out. `scope`
    is what a key needs (`jobs.scopes`), where `key` says that one is needed at all.
    """

    method: str
    path: str
    handler: Handler
    text: str
    takes: Any = None
    gives: Any = None
    status: int = 200
    statuses: dict[int, str] = {}
    query: type[Struct] = NoQuery
    headers: dict[str, str] = {}
    key: bool = True
    protocol: bool = True
    scope: str = "run"


BODY = {
    400: "the body cannot be read",
    408: "the body stopped coming",
    413: "the body is longer than the limit",
    415: "a Content-Type or Content-Encoding that is not taken",
}
"""What may be wrong with a body."""
