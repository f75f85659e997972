"""What a ledger says about a job in messages: to its followers, and when its worker is lost.

Every ledger uses these, so that all say the same.

    info_of(job, ahead=2)                  # JobInfo, as its owner sees it
    entries_of(job, commands, keep)        # [("state", b'{"type":"state",...}')]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from msgspec.structs import replace

from weft.errors import NoSuchError, NotFinishedError, WorkerMemoryError
from weft.service.jobs.life import FINAL, Command, Job, Lost, Note
from weft.service.store.interface import Ledger, LostClaimError, QueueFullError
from weft.service.store.usage import Space
from weft.wire.messages import (
    EndEvent,
    ErrorReport,
    JobInfo,
    PriceInfo,
    ResultInfo,
    StateEvent,
    decode,
    encode,
)


def info_of(
    job: Job,
    *,
    ahead: int | None = None,
    keep_seconds: float | None = None,
    estimate: float | None = None,
    model_state: str | None = None,
) -> JobInfo:
    """The job as its owner sees it. `keep_seconds` is how long one that is over is kept; the rest
    is what is known of one that waits."""
    over = job.state in FINAL
    return JobInfo(
        id=job.id,
        state=job.state,
        model=job.model,
        created=job.created,
        look=job.look,
        attempts=job.attempts,
        ahead=ahead,
        estimate=estimate,
        model_state=model_state,
        price=None if job.price is None else decode(job.price, PriceInfo, "json"),
        result=_result_of(job),
        error=_error_of(job) if over else None,
        stages=job.stages,
        merged=job.batch > 1,
        expires=None if keep_seconds is None or job.ended is None else expires(job, keep_seconds),
    )


def expires(job: Job, keep_seconds: float) -> float:
    """Until when a job that is over is kept: as long as it was asked for, else `keep_seconds`."""
    return (job.ended or 0.0) + (keep_seconds if job.keep is None else job.keep)


def _error_of(job: Job) -> ErrorReport | None:
    """With the request under which the log has the job, where nothing else is said."""
    if job.error is None:
        return None
    found = decode(job.error, ErrorReport, "json")
    if not job.asked or found.request_id not in (None, job.id):
        return found
    return replace(found, request_id=job.asked)


def _result_of(job: Job) -> ResultInfo | None:
    if job.result_bytes is None or job.result_sha256 is None:
        return None
    return ResultInfo(bytes=job.result_bytes, sha256=job.result_sha256, names=job.names)


def entries_of(
    job: Job, commands: Iterable[Command], keep_seconds: float
) -> list[tuple[str, bytes]]:
    """The notes that a step commands, as kind and JSON."""
    kinds = [command.kind for command in commands if isinstance(command, Note)]
    return [(kind, _entry(job, kind, keep_seconds)) for kind in kinds]


def _entry(job: Job, kind: str, keep_seconds: float) -> bytes:
    if kind == "end":
        return encode(EndEvent(job=info_of(job, keep_seconds=keep_seconds)), "json")
    return encode(StateEvent(state=job.state, attempts=job.attempts), "json")


def lost(job: Job, attempts: int) -> Lost:
    """The event for a job whose holder died or fell silent."""
    who, begun = ("worker", job.attempts) if job.state == "running" else ("checker", job.pricings)
    report = ErrorReport(
        code="worker-lost",
        message=f"the {who} that had job {job.id} died or fell silent, {begun} times",
        fix="if it asks for much memory, ask for less; else ask whoever runs the server",
    )
    return Lost(attempts, encode(report, "json"))


def check_claim(job: Job | None, id: str, token: str | None) -> Job:
    """The job, if it is there and under this token. Raises `NoSuchError`, `LostClaimError`."""
    if job is None:
        raise LostClaimError(f"job {id} is gone") if token else NoSuchError(f"no job {id} is here")
    if token is not None and job.token != token:
        raise LostClaimError(f"job {id} is {job.state}, and no longer this holder's")
    return job


def still_held(ledger: Ledger, job: Job) -> bool:
    """Whether whoever claimed it still has it."""
    now = ledger.job(job.id)
    return now is not None and now.token == job.token


def check_over(job: Job) -> None:
    """Raises `NotFinishedError`."""
    if job.state not in FINAL:
        raise NotFinishedError(f"job {job.id} is {job.state}", fix="cancel it, or wait for its end")


class Asked(NamedTuple):
    """What somebody claims: jobs in a stage, of these models, of this lane if one is named, that
    fit. `running_jobs` and `run_seconds` (of a day) are limits of those whose key has none of its
    own."""

    stage: str
    models: tuple[str, ...]
    lane: str | None = None
    tokens: int | None = None
    peak: int | None = None
    beyond: int | None = None
    running_jobs: int = 0
    run_seconds: float = 0.0

    @property
    def is_choosy(self) -> bool:
        return self[2:6] != (None,) * 4

    def fits(self, job: Job) -> bool:
        return (
            (self.lane is None or job.lane == self.lane)
            and (self.tokens is None or job.tokens <= self.tokens)
            and (self.peak is None or job.peak <= self.peak)
            and (self.beyond is None or job.peak > self.beyond)
        )

    def without(self, job: Job) -> Asked | None:
        """What may be claimed besides; None: nothing, as the room is used up."""
        tokens = None if self.tokens is None else self.tokens - job.tokens
        peak = None if self.peak is None else self.peak - job.peak
        used_up = (tokens is not None and tokens <= 0) or (peak is not None and peak <= 0)
        return None if used_up else self._replace(tokens=tokens, peak=peak)

    def most_running(self, job: Job) -> int:
        """How many jobs of its owner may run at once; 0: any number."""
        return int(job.limits.get("running_jobs", self.running_jobs))

    def most_seconds(self, job: Job) -> float:
        """How many seconds a day jobs of its key may run; 0: any number."""
        return job.limits.get("run_seconds_per_day", self.run_seconds)


def was_lost(job: Job) -> bool:
    """Whether whoever had it before came to an end over it, or beside it."""
    return job.attempts > 0 if job.state == "queued" else job.pricings > 0


def check_space(space: Space, peak: int) -> None:
    """Raises `WorkerMemoryError` where so many bytes are more than the worker can ever have."""
    if peak > space.most:
        raise WorkerMemoryError(
            f"the block holds {peak} bytes at once, and beside {space.model} the worker has "
            f"{space.most} at most, as measured",
            fix="save and keep less at once, or work on slices",
        )


def full(limit: int) -> QueueFullError:
    return QueueFullError(
        f"{limit} jobs of this key wait already, which is the limit (queued_jobs)",
        fix="wait until some are done, or cancel some",
    )
