"""Jobs: submit, look, follow, cancel, delete. What is not the asker's own is not there at all."""

from __future__ import annotations

import re
import time
from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from weft.errors import CancelledError, MessageError, NoSuchError, NotFinishedError
from weft.service.jobs.life import FINAL, Cancel, IllegalStepError, Job
from weft.service.store.interface import Key
from weft.wire.messages import Id, JobInfo, JobList, Keep, encode
from weft.wire.reports import report_of

from .accept import accept, check_keep
from .bodies import accepted, answer, read, taken
from .errors import Refused
from .events import MEDIA, follow, info, inline_bytes, message, stream
from .models import not_ready
from .state import Gateway, Visit
from .waiting import Waiting

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class ListQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`before` is the last id of the page before."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    before: Id | UnsetType = UNSET


class WaitQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`wait`: answer when the job is over, or after so many seconds."""

    wait: Annotated[float, Meta(ge=0, le=300)] = 0.0


class AfterQuery(Struct, frozen=True, forbid_unknown_fields=True):
    """`after`: the number of the last event that the client has; `Last-Event-ID` says it too."""

    after: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0


def own(gateway: Gateway, visit: Visit) -> Job:
    """The job in the path, if it is the asker's. Blocks."""
    id = visit.request.path_params["id"]
    job = gateway.ledger.job(id) if _ID.fullmatch(id) else None
    if job is None and _ID.fullmatch(id):
        _check_expired(gateway, visit.owner, id)
    if job is None or job.owner != visit.owner:
        raise NoSuchError(
            "there is no such job", fix="it may have expired; GET /api/jobs lists yours"
        )
    return job


def _check_expired(gateway: Gateway, owner: str, id: str) -> None:
    """Raises 410 for a job of the asker's that was kept as long as it was to be."""
    gone = gateway.ledger.gone(id)
    if gone is None or gone.owner != owner:
        return
    error = NoSuchError(
        f"job {id} has expired: it ended at {_when(gone.ended)}, and was kept until "
        f"{_when(gone.expired)}",
        fix="run it again; keep_seconds asks for more time when a job is sent, `weft jobs keep` "
        "later",
    )
    raise Refused(error, 410)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


async def submit(gateway: Gateway, visit: Visit) -> Response:
    if gateway.draining:
        raise not_ready("the server is about to stop and takes no new jobs")
    request = visit.request
    told, new = await taken(gateway, visit, _accepted, visit.key, visit.id)
    request.scope["weft"].job = told.id
    place = {"Location": f"/api/jobs/{told.id}"}
    if wants_events(request):
        first = message("accepted", encode(told, "json"))
        return stream(follow(gateway, told.id, 0, first, inline_bytes(request)), place)
    return answer(request, told, 201 if new else 200, place)


def _accepted(
    gateway: Gateway, owner: str, data: bytes, form: str, key: Key, asked: str
) -> tuple[JobInfo, bool]:
    job, new = accept(gateway, key, data, form, asked)
    return info(gateway, job), new


def wants_events(request: Request) -> bool:
    return any(media == MEDIA and weight for media, weight in accepted(request))


def listing(gateway: Gateway, visit: Visit) -> Response:
    query = visit.query
    assert isinstance(query, ListQuery)
    before = None if query.before is UNSET else query.before
    jobs = gateway.ledger.jobs(visit.owner, query.limit, before)
    waiting = Waiting(gateway)
    return answer(visit.request, JobList(jobs=tuple(waiting.info(job) for job in jobs)))


async def keep(gateway: Gateway, visit: Visit) -> Response:
    job = await gateway.off(own, gateway, visit)
    told = await taken(gateway, visit, _kept, job.id)
    return answer(visit.request, told)


def _kept(gateway: Gateway, owner: str, data: bytes, form: str, id: str) -> JobInfo:
    seconds = check_keep(gateway.settings, read(data, Keep, form).seconds)
    return info(gateway, gateway.ledger.keep(id, seconds))


async def status(gateway: Gateway, visit: Visit) -> Response:
    query = visit.query
    assert isinstance(query, WaitQuery)
    told = await gateway.off(_told, gateway, visit)
    if query.wait and told.state not in FINAL:
        await until_over(gateway, visit, query.wait)
        told = await gateway.off(_told, gateway, visit)
    return answer(visit.request, told)


def _told(gateway: Gateway, visit: Visit) -> JobInfo:
    return info(gateway, own(gateway, visit))


async def until_over(gateway: Gateway, visit: Visit, seconds: float) -> None:
    """Returns when the job in the path is over, or the time is."""
    end = time.monotonic() + seconds
    with gateway.watch.attend(visit.request.path_params["id"]) as waiter:
        while not gateway.closing and (left := end - time.monotonic()) > 0:
            waiter.clear()
            if (await gateway.off(own, gateway, visit)).state in FINAL:
                return
            await waiter.over(left)


async def events(gateway: Gateway, visit: Visit) -> Response:
    job = await gateway.off(own, gateway, visit)
    after, inline = resumed_after(visit), inline_bytes(visit.request)
    return stream(follow(gateway, job.id, after, inline=inline))


def resumed_after(visit: Visit) -> int:
    """The number of the last event that the client has."""
    query = visit.query
    assert isinstance(query, AfterQuery)
    given = visit.request.headers.getlist("last-event-id")
    if not given or given == [""]:
        return query.after
    if len(given) > 1 or not re.fullmatch(r"[0-9]{1,18}", given[0]):
        raise MessageError("Last-Event-ID is the number of an event")
    return max(query.after, int(given[0]))


def cancel(gateway: Gateway, visit: Visit) -> Response:
    job = own(gateway, visit)
    error = report_of(CancelledError(f"job {job.id} was cancelled by its owner"), visit.id)
    try:
        job = gateway.ledger.step(job.id, Cancel(encode(error, "json")), gateway.clock())
    except IllegalStepError:  # it was over already
        job = own(gateway, visit)
    return answer(visit.request, info(gateway, job))


def delete(gateway: Gateway, visit: Visit) -> Response:
    job = own(gateway, visit)
    if job.state not in FINAL:
        raise NotFinishedError(
            f"job {job.id} is {job.state}; only one that is over can be deleted",
            fix="cancel it first",
        )
    gateway.ledger.remove(job.id)
    for folder in ("results", "submits"):
        gateway.objects.delete(f"{folder}/{job.id}")
    return Response(status_code=204)
