"""Errors in the form that OpenAI's clients read: `{"error": {message, type, param, code}}`.

Beside `error` stand the fields of our own `ErrorReport`, so that a client of Weft reads it as well.
"""

from __future__ import annotations

from typing import Any, NoReturn

import msgspec
from starlette.responses import Response

from weft.errors import MessageError
from weft.wire.messages import ErrorReport

from ..errors import Refused

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
CODES = {"access": "invalid_api_key", "wrong-model": "model_not_found", "limit": "limit_exceeded"}
"""Our codes that OpenAI has a name for; others are ours."""


def odd(param: str | None, message: str, fix: str | None = None) -> NoReturn:
    """Refuses a request for one of its fields."""
    named = None if param is None else param.encode(errors="backslashreplace").decode()
    raise Refused(MessageError(message, fix=fix), 400, param=named)


def error_of(report: ErrorReport, status: int, param: str | None = None) -> dict[str, Any]:
    """The error as data."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    parts = (report.message, report.line and f"at {report.line}", report.fix)
    message = "; ".join(part for part in parts if part)
    if report.request_id:
        message += f" (request {report.request_id})"
    code = CODES.get(report.code, report.code)
    error = {"message": message, "type": kind, "param": param, "code": code}
    return {**msgspec.to_builtins(report), "error": error}


def refusal(refused: Refused, request_id: str) -> Response:
    """The answer to a request that is refused."""
    said = error_of(refused.report(request_id), refused.status, refused.param)
    body = msgspec.json.encode(said)
    return Response(body, refused.status, refused.headers, "application/json")
