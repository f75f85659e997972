"""What is told of a job that waits: its place, when it may begin, how its model is.

    waiting = Waiting(gateway)             # for one answer: what it asks the store it asks once
    waiting.info(job)                      # JobInfo
    waiting.load(job)                      # how far the load of its model has come, as an event

The estimate is the number of jobs ahead times the seconds that one takes, as measured on the last
ones of this model that were done (`jobs.pace`), and the rest of a load, as long as the last load
took. Where there is nothing to measure yet there is no estimate.
"""

from __future__ import annotations

import time
from functools import cached_property

from weft.service.jobs.life import Job
from weft.service.jobs.pace import seconds_each
from weft.service.store.models import WorkerMemory
from weft.service.store.said import info_of
from weft.wire.messages import JobInfo, ProgressEvent

from .models import state_by_row
from .state import Gateway

WAITS = ("received", "queued")
LAST = 50
"""So many of the last jobs say how fast a model is."""
PACE_SECONDS = 1.0
"""For so long it is not asked again."""


class Waiting:
    """See the module's text. All of it blocks."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def info(self, job: Job) -> JobInfo:
        """A job as its owner sees it."""
        keep = self._gateway.settings.keep_seconds
        if job.state not in WAITS:
            return info_of(job, keep_seconds=keep)
        ahead = self._gateway.ledger.ahead(job.id)
        state = self._state(job.model)
        return info_of(
            job,
            ahead=ahead,
            keep_seconds=keep,
            estimate=self._estimate(job.model, ahead, state),
            model_state=None if state == "ready" else state,
        )

    def load(self, job: Job) -> ProgressEvent | None:
        """How many bytes of the model's weights are there; None where a job waits for none."""
        row = self._gateway.ledger.memory(job.model) if job.state in WAITS else None
        if row is None or row.state not in ("cold", "loading"):
            return None
        return ProgressEvent(done=row.loaded, total=row.weights, kind="load")

    @cached_property
    def _rows(self) -> dict[str, WorkerMemory]:
        return {row.model: row for row in self._gateway.ledger.memories()}

    def _state(self, model: str) -> str:
        """By the rows of memory: cards are large."""
        row = self._rows.get(model)
        return "ready" if row is None else state_by_row(row.state, row)

    def _estimate(self, model: str, ahead: int, state: str) -> float | None:
        pace = self._pace(model) if ahead else 0.0
        load = self._load_seconds(model) if state != "ready" else 0.0
        return None if pace is None or load is None else ahead * pace + load

    def _pace(self, model: str) -> float | None:
        """As it was a moment ago: it is an estimate."""
        now, paces = time.monotonic(), self._gateway.paces
        until, pace = paces.get(model, (-1e9, None))
        if until < now:
            pace = seconds_each(self._gateway.ledger.recent(model, LAST))
            if pace is not None:
                paces[model] = now + PACE_SECONDS, pace
        return pace

    def _load_seconds(self, model: str) -> float | None:
        row = self._rows.get(model)
        if row is None or not row.load_seconds:
            return None
        left = 1 - row.loaded / row.weights if row.weights and row.state == "loading" else 1.0
        return row.load_seconds * left
