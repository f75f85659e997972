"""Keeps the store clean: what a server does when it starts, and from time to time.

    recover(ledger, objects, now)              # at the start, with `lock_folder`, before all else
    sweep(ledger, objects, now, settings)      # every minute or so, in one process

Rows go before the objects they name, and objects come before rows: so whoever is killed when, what
is left is an object that no row names, and that is what both remove.
"""

from __future__ import annotations

from msgspec import Struct

from weft.service.jobs.life import FINAL, Job
from weft.service.store.interface import Ledger, Objects
from weft.settings import Settings

YOUNG = 60.0
"""Seconds for which an object may be there before the row that names it."""

UNSENT = 3600.0
"""Seconds for which a constant is kept for the job that is to come, however short jobs are kept."""

UNANSWERED = 300.0
"""Seconds after which nobody waits for an answer any more."""


REMEMBERED = 90 * 24 * 3600.0
"""Seconds for which it is known of a job that it was there and expired."""


class Swept(Struct, frozen=True, kw_only=True):
    """What was removed, for the server's log; `lost` jobs were taken back from the last run."""

    lost: int = 0
    jobs: int = 0
    objects: int = 0


def recover(ledger: Ledger, objects: Objects, now: float) -> Swept:
    """Takes back the claims of the last run, and removes what it left half done."""
    lost = ledger.release(None, now)
    ledger.drop_questions(now)
    return Swept(lost=len(lost), objects=_sweep_orphans(ledger, objects, now))


def sweep(ledger: Ledger, objects: Objects, now: float, settings: Settings) -> Swept:
    """Removes jobs that were kept long enough with all that is theirs, and what nobody needs."""
    old = ledger.forget(now, settings.keep_seconds)
    ledger.drop_gone(now - REMEMBERED)
    for job in old:
        forget_objects(objects, job.id)
    ledger.drop_questions(now - UNANSWERED)
    ledger.forget_sessions(now - settings.keep_seconds)
    gone = _sweep_orphans(ledger, objects, now)
    gone += _sweep_constants(ledger, objects, now - max(settings.keep_seconds, UNSENT))
    return Swept(jobs=len(old), objects=gone)


def forget_objects(objects: Objects, id: str) -> None:
    """Removes the objects of a job whose row is gone (`forget`, `remove`)."""
    objects.delete(f"submits/{id}")
    objects.delete(f"results/{id}")


def _sweep_orphans(ledger: Ledger, objects: Objects, now: float) -> int:
    """Requests of jobs that are over or were never acknowledged; results of jobs that are gone, or
    that ended in another way after a worker had died of them with the result written."""
    needless = [
        name for name in objects.names("submits/") if _done_with(ledger, _job(ledger, name), now)
    ]
    needless += [name for name in objects.names("results/") if _brings_none(_job(ledger, name))]
    needless += [name for name in objects.names("rooms/") if _is_over(ledger, name, now)]
    old = [name for name in needless if _untouched_since(objects, name, now - YOUNG)]
    return _delete(objects, old)


def _sweep_constants(ledger: Ledger, objects: Objects, before: float) -> int:
    old = [name for name in objects.names("constants/") if _untouched_since(objects, name, before)]
    needed = {f"constants/{j.owner}/{d}" for j in ledger.unfinished() for d in j.constants}
    return _delete(objects, [name for name in old if name not in needed])


def _job(ledger: Ledger, name: str) -> Job | None:
    return ledger.job(name.rpartition("/")[2])


def _done_with(ledger: Ledger, job: Job | None, now: float) -> bool:
    """Whether nobody needs a request any more. An open session may have to run its own again."""
    if job is None or job.state not in FINAL:
        return job is None
    return not job.session or _session_over(ledger, job.session, now)


def _session_over(ledger: Ledger, id: str, now: float) -> bool:
    session = ledger.session(id)
    return session is None or session.over(now)


def _is_over(ledger: Ledger, name: str, now: float) -> bool:
    """Whether an object `rooms/<session>/<number>` is of a session that is over."""
    return _session_over(ledger, name.split("/")[1], now)


def _brings_none(job: Job | None) -> bool:
    return job is None or job.state in FINAL - {"done"}


def _untouched_since(objects: Objects, name: str, before: float) -> bool:
    touched = objects.touched(name)
    return touched is not None and touched < before


def _delete(objects: Objects, names: list[str]) -> int:
    for name in names:
        objects.delete(name)
    return len(names)
