"""One's own jobs on a server, as a list that prints as a table.

weft.jobs()                            # newest first
weft.jobs(state="running")[0].id       # for weft.Job.get(...)
"""

from __future__ import annotations

import time

from weft.errors import UnknownOptionError
from weft.wire.messages import FINAL, JobInfo, JobList
from weft.wire.reports import escaped

from . import jobs as steps
from . import sync
from .core import Talk
from .effects import Steps
from .figures import ago, seconds_of, size_of
from .servers import Server, server_at

STATES = ("received", "queued", "running", *FINAL)
PAGE = 100


class Jobs(list[JobInfo]):
    """Jobs; prints as a table."""

    def __repr__(self) -> str:
        rows = [("id", "model", "state", "sent", "result", "kept for", "")]
        rows += [_row(job) for job in self]
        cells = [[escaped(cell, keep="") for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def jobs(
    remote: bool | str | Server = True,
    *,
    limit: int = 100,
    state: str | None = None,
    model: str | None = None,
) -> Jobs:
    """The jobs on a server that were sent with your key, newest first, as a list that prints as a
    table.

    remote: which server: True (the configured one) or an address, as in `model.trace`. limit: how
    many at most. state, model: these only. Each entry is what `Job.status()` gives; its `.id` finds
    the job (`weft.Job.get`). Raises `ServerAwayError`, `AccessError` (the key), and
    `UnknownOptionError` for a state that there is not.
    """
    if state is not None and state not in STATES:
        raise UnknownOptionError(f"{state!r} is no state of a job", fix=f"one of {STATES}")
    if limit < 1:
        raise UnknownOptionError(f"limit is a number from 1, not {limit!r}", fix="limit=100")
    server = server_at(remote)
    return Jobs(sync.run(server, found(Talk(server), limit, state, model)))


def found(talk: Talk, limit: int, state: str | None, model: str | None) -> Steps[list[JobInfo]]:
    """Page after page, until there are as many as are wanted."""
    yield from talk.hello()
    kept: list[JobInfo] = []
    before: str | None = None
    while len(kept) < limit:
        page: JobList = yield from steps.listed(talk, PAGE, before)
        kept += [job for job in page.jobs if state in (None, job.state) and _is_of(job, model)]
        if len(page.jobs) < PAGE:
            break
        before = page.jobs[-1].id
    return kept[:limit]


def _is_of(job: JobInfo, model: str | None) -> bool:
    return model in (None, job.model)


def _row(job: JobInfo) -> tuple[str, ...]:
    kept = "" if job.expires is None else seconds_of(job.expires - time.time())
    result = "" if job.result is None else size_of(job.result.bytes)
    sent = f"{ago(job.created)} ago"
    return job.id, job.model, job.state, sent, result, kept, waits(job)


def waits(job: JobInfo) -> str:
    """What a waiting job waits for, why another failed: a few words."""
    if job.error is not None:
        return job.error.message.partition("\n")[0][:80]
    if job.state not in ("received", "queued"):
        return ""
    words = [f"{job.ahead} ahead"] if job.ahead else []
    words += [f"its model is {job.model_state}"] if job.model_state else []
    words += [f"may begin in {seconds_of(job.estimate)}"] if job.estimate is not None else []
    return ", ".join(words)
