"""Sessions: opening one, keeping it, closing it."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace
from starlette.responses import Response

from weft.errors import CancelledError, NoSuchError
from weft.service.jobs.life import FINAL, Cancel, IllegalStepError
from weft.service.store.ids import new_id
from weft.service.store.interface import Key
from weft.service.store.said import info_of
from weft.service.store.sessions import Session, SessionsFullError
from weft.wire.messages import JobInfo, OpenSession, SessionInfo, encode
from weft.wire.reports import report_of

from .accept import check_model
from .bodies import answer, read, taken
from .limits import over
from .models import not_ready
from .seats import find, refuse_over, request_id
from .state import Gateway, Visit, limits_for

RETRY_SECONDS = 5
"""What Retry-After says where as many sessions are open as may be."""
TOLD = 100
"""At most so many failed requests are told of."""


# -- routes ---------------------------------------------------------------------------------------


async def opened(gateway: Gateway, visit: Visit) -> Response:
    if gateway.draining:
        raise not_ready("the server is about to stop and opens no sessions")
    session = await taken(gateway, visit, _open, visit.key)
    place = {"Location": f"/api/sessions/{session.id}"}
    return answer(visit.request, info(gateway, session), 201, place)


def _open(gateway: Gateway, owner: str, data: bytes, form: str, key: Key) -> Session:
    asked: OpenSession = read(data, OpenSession, form)
    check_model(gateway, key, asked.model, asked.fingerprint)
    now = gateway.clock()
    session = Session(
        id=new_id(now),
        owner=owner,
        request_id=asked.request_id,
        model=asked.model,
        created=now,
        until=now + gateway.settings.session_seconds,
    )
    most = limits_for(gateway, key).sessions
    try:
        return gateway.ledger.open_session(session, most)
    except SessionsFullError:
        raise over(
            "sessions",
            most,
            f"{most} sessions of this key are open already",
            seconds=RETRY_SECONDS,
            fix="close one: leave its `with` block; one that was left behind ends by itself",
            sure=False,
        ) from None


def shown(gateway: Gateway, visit: Visit) -> Response:
    return answer(visit.request, info(gateway, own(gateway, visit)))


def renewed(gateway: Gateway, visit: Visit) -> Response:
    session = own(gateway, visit)
    refuse_over(gateway, session)
    until = gateway.clock() + gateway.settings.session_seconds
    gateway.ledger.seat(session.id, 0, "", until)
    return answer(visit.request, info(gateway, replace(session, until=until)))


def closed(gateway: Gateway, visit: Visit) -> Response:
    """Ends it: nothing of it runs any more, and what it keeps is dropped."""
    session = own(gateway, visit)
    now = gateway.clock()
    before = tuple(failed(gateway, session))
    gateway.ledger.end_session(session.id, now)
    for job in gateway.ledger.unfinished():
        if job.session == session.id:
            _cancel(gateway, job.id, visit.id)
    ended = session if session.over(now) else replace(session, ended=now)
    gateway.bells.ring("worker", session.model)
    return answer(visit.request, info(gateway, ended, before))


def _cancel(gateway: Gateway, job: str, request: str) -> None:
    error = report_of(CancelledError(f"job {job} was cancelled: its session has ended"), request)
    try:
        gateway.ledger.step(job, Cancel(encode(error, "json")), gateway.clock())
    except (IllegalStepError, NoSuchError):
        return  # it was over already


def own(gateway: Gateway, visit: Visit) -> Session:
    """The session in the path, if it is the caller's; to anybody else it is not there."""
    return find(gateway, visit.owner, visit.request.path_params["id"])


def info(
    gateway: Gateway, session: Session, failed: tuple[tuple[int, JobInfo], ...] = ()
) -> SessionInfo:
    over = session.over(gateway.clock())
    state = "closed" if session.ended is not None else "expired" if over else "open"
    return SessionInfo(
        id=session.id,
        state=state,
        model=session.model,
        created=session.created,
        until=session.until if session.ended is None else session.ended,
        seconds=gateway.settings.session_seconds,
        last=session.last,
        failed=failed,
    )


def failed(gateway: Gateway, session: Session) -> Iterator[tuple[int, JobInfo]]:
    """The requests of a session that brought nothing, the first ones."""
    told = 0
    for number in range(1, session.last + 1):
        job = gateway.ledger.find(session.owner, request_id(session.id, number))
        if job is not None and job.state in FINAL and job.state != "done" and told < TOLD:
            told += 1
            yield number, info_of(job)
