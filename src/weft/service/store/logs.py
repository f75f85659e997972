"""Lines of the log, of every process of a server: as JSON for programs, or as text for people.

One line for each request (`request`, the id that the client has in `Weft-Request-Id`), and one
for each state of a job, with the id of the request that submitted it. They name owners of keys,
jobs and models; never a key, or anything that a user wrote or computed.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

import msgspec

from weft.service.jobs.life import STAGES, Command, Job, Note

JOBS = logging.getLogger("weft.jobs")
BEFORE = {"queued": "price", "running": "queue"}
"""The stage that a job has left when it comes into a state."""
FIELDS = (
    *("request", "owner", "method", "path", "status", "ms"),
    *("job", "model", "state", "seconds", "attempts"),
)
"""What a line may have besides its time, its level, its part and its message."""


def fields_of(record: logging.LogRecord, part: str = "") -> dict[str, Any]:
    """A record as data."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    found: dict[str, Any] = {
        "time": f"{moment}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        **({"part": part} if part else {}),
        "message": record.getMessage(),
    }
    return found | {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}


def _json(found: dict[str, Any]) -> str:
    """ASCII only: a line goes through whatever reads it."""
    text = msgspec.json.encode(found).decode()
    return text if text.isascii() else json.dumps(found)


class JsonLines(logging.Formatter):
    """A log record as one line of JSON: nothing in a path or a name can forge a line."""

    def __init__(self, part: str = "") -> None:
        super().__init__()
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        found = fields_of(record, self._part)
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        return _json(found)


class TextLines(logging.Formatter):
    """The same as text: `12:30:01 info request 1a2b ... status=200`."""

    def format(self, record: logging.LogRecord) -> str:
        found = fields_of(record)
        head = f"{found.pop('time')[11:19]} {found.pop('level')} {found.pop('message')}"
        rest = " ".join(f"{name}={_quoted(value)}" for name, value in found.items() if value != "")
        line = f"{head} {rest}".rstrip()
        trace = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return line + trace


def _quoted(value: Any) -> str:
    """A value without what could forge a line, or another field."""
    text = str(value)
    plain = text.isascii() and text.isprintable() and " " not in text and '"' not in text
    return text if plain else json.dumps(text)


def log_to_stderr(form: str, part: str, *names: tuple[str, int]) -> None:
    """The logs of these names, from these levels on, as lines on stderr, and nowhere else."""
    logging._srcfile = None  # type: ignore[attr-defined]  # no line of ours is looked for
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextLines() if form == "text" else JsonLines(part))
    for name, level in names:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def tell(job: Job, commands: tuple[Command, ...]) -> None:
    """A line for the state that a step has led to; `seconds` are those of the stage before it."""
    if not any(isinstance(command, Note) for command in commands):
        return
    stage = BEFORE.get(job.state)
    if stage is None and job.stages:
        stage = next((one for one in reversed(STAGES.values()) if one in job.stages), None)
    told = {"job": job.id, "owner": job.owner, "model": job.model, "state": job.state}
    if stage in job.stages:
        told["seconds"] = round(job.stages[stage], 4)  # type: ignore[assignment]
    if job.asked:
        told["request"] = job.asked
    if job.attempts > 1:
        told["attempts"] = job.attempts  # type: ignore[assignment]
    JOBS.info("job", extra=told)
