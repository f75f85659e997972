"""What went wrong, as a status and an `ErrorReport`.

A `WeftError` that a handler raises is the answer; its class gives the status. `Refused` says
another status or adds headers. Anything else is a mistake of ours: the client reads that there was
one, and under which request id the server's log has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from msgspec.structs import replace

from weft.errors import (
    AccessError,
    GraphError,
    LimitError,
    MessageError,
    ModelNotReadyError,
    NoSuchError,
    NotFinishedError,
    OtherModelError,
    ServerError,
    SessionLostError,
    VersionMismatchError,
    WeftError,
    WrongModelError,
)
from weft.wire.messages import ErrorReport
from weft.wire.reports import report_of

STATUS: dict[type[WeftError], int] = {
    MessageError: 400,
    VersionMismatchError: 400,
    AccessError: 403,
    NoSuchError: 404,
    WrongModelError: 404,
    NotFinishedError: 409,
    OtherModelError: 409,
    SessionLostError: 410,
    LimitError: 413,
    GraphError: 422,
    ModelNotReadyError: 503,
    ServerError: 500,
}
"""Others are 422: the request was understood, and what it asks for is refused."""


FULL_SECONDS = 30
"""What Retry-After says of a full disk, which somebody has to make room on."""


class Refused(Exception):
    """An answer that is an error. `missing` lists digests of constants that are not there; `param`
    is the field that is to blame, for the routes in OpenAI's form; `limit` is the setting that
    was met.
    """

    def __init__(
        self,
        error: WeftError,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        missing: tuple[str, ...] = (),
        param: str | None = None,
        limit: str = "",
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.status = status_of(error) if status is None else status
        self.headers = dict(headers or {})
        self.missing = missing
        self.param = param
        self.limit = limit

    def report(self, request_id: str) -> ErrorReport:
        return replace(report_of(self.error, request_id), missing=self.missing)


def status_of(error: WeftError) -> int:
    """The status of the nearest class that the table has."""
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 422)


@contextmanager
def trusted() -> Iterator[None]:
    """Around reading what the service itself wrote: if it is broken, no client is to blame."""
    try:
        yield
    except MessageError as error:
        raise RuntimeError("the store holds something that cannot be read") from error


def mistake() -> ServerError:
    """What a client reads of an exception that nobody foresaw."""
    return ServerError(
        "the server made a mistake", fix="tell its operator the request id; its log has more"
    )


def no_room() -> Refused:
    """What a client reads where the disk of the server is full."""
    error = ServerError(
        "the server has no room on its disk", fix="try again later, and tell its operator"
    )
    return Refused(error, 503, {"Retry-After": str(FULL_SECONDS)})
