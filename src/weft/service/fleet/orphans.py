"""Jobs whose model is not of this server: nobody will run them, so they are not left waiting.

    dismiss(ledger, served, removed, now, keep_seconds)

Those of a model that was put away end at once; those of one that this server was started without
may be waiting for a server that has it, as long as a finished job would be kept.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from weft.errors import WrongModelError
from weft.service.jobs.life import Cancel, IllegalStepError, Job
from weft.service.store.interface import Ledger
from weft.wire.messages import encode
from weft.wire.reports import report_of

LOG = logging.getLogger("weft.fleet")


def dismiss(
    ledger: Ledger,
    served: Collection[str],
    removed: Collection[str],
    now: float,
    keep_seconds: float,
) -> list[Job]:
    """Ends such jobs by name; those that were ended."""
    if all(model in served for model, _ in ledger.counts()):
        return []
    ended = []
    for job in ledger.unfinished():
        if job.model in served or job.cancelling:
            continue
        if job.model in removed or job.created < now - keep_seconds:
            ended += _end(ledger, job, now)
    return ended


def _end(ledger: Ledger, job: Job, now: float) -> list[Job]:
    error = WrongModelError(
        f"this server has no model {job.model!r} any more",
        fix="weft.models() shows the models that it has",
    )
    try:
        return [ledger.step(job.id, Cancel(encode(report_of(error, job.id), "json")), now)]
    except IllegalStepError as missed:
        LOG.info("job %s went on meanwhile: %s", job.id, missed)
        return []
