"""`Mate`: a job that is drawn together with others, and what came of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from torch import nn

from weft.engine.draw import Drawn, overwritten_by
from weft.engine.known import Known
from weft.engine.merging import merger_of
from weft.engine.opened import Opened
from weft.engine.party import Entry, draw_together
from weft.errors import WeftError
from weft.service.jobs.life import Job
from weft.service.store.requests import limits_of
from weft.settings import Settings
from weft.wire.messages import Limits
from weft.wire.reports import run_error

from .batch import groups
from .pulse import Pulse

LOG = logging.getLogger("weft.worker")


class Mate:
    """One of several jobs. `came` is what came of it: its result, or its error; None, where it has
    to run by itself. `batch` is how many shared its forward, `seconds` its part of the time.
    """

    def __init__(self, job: Job, pulse: Pulse) -> None:
        self.job = job
        self.pulse = pulse
        self.entry: Entry | None = None
        self.came: Drawn | BaseException | None = None
        self.batch = 1
        self.seconds = 0.0

    def open(
        self, open_: Callable[[Job], tuple[Opened, bool]], known: Known, limits: Limits
    ) -> None:
        """Reads its request. What is wrong with it comes out when it runs by itself."""
        pulse = self.pulse
        try:
            opened, strict = open_(self.job)
            told = overwritten_by(known, *opened.calls, graph=opened.graph)
        except Exception as error:  # noqa: BLE001 - see above
            LOG.info("job %s cannot share a forward: %s", self.job.id, type(error).__name__)
            return
        self.entry = Entry(
            opened,
            limits,
            told,
            strict,
            on_log=pulse.log,
            on_value=pulse.value,
            on_progress=pulse.progress,
            cancelled=pulse.cancelled,
        )

    @property
    def width(self) -> int:
        assert self.entry is not None
        return max([call.length or 1 for call in self.entry.opened.calls])

    @property
    def rows(self) -> int:
        assert self.entry is not None
        return sum([call.batch or 1 for call in self.entry.opened.calls])


def draw_mates(
    net: nn.Module,
    mates: Sequence[Mate],
    open_: Callable[[Job], tuple[Opened, bool]],
    known: Known,
    settings: Settings,
) -> None:
    """Draws jobs of one lane. Raises what ends the use of the model; then none has come to an
    end."""
    merger = merger_of(known)
    for mate in mates:
        mate.open(open_, known, limits_of(settings, mate.job))
    ready = [mate for mate in mates if mate.entry is not None]
    if merger is None:
        return
    for group in groups(ready, lambda m: m.width, lambda m: m.rows, settings.merge_tokens):
        begun = time.perf_counter()
        found = draw_together(net, [mate.entry for mate in group if mate.entry], merger)
        spent, tokens = time.perf_counter() - begun, sum([mate.job.tokens for mate in group]) or 1
        shared = sum([one is not None for one in found])
        for mate, one in zip(group, found, strict=True):
            mate.entry = None  # its tensors are not needed any more
            if one is not None:
                mate.batch, mate.seconds = shared, spent * mate.job.tokens / tokens
                mate.came = one if isinstance(one, Drawn) else said(one)


def said(error: BaseException) -> BaseException:
    """What torch or the model raised is a `RunError`."""
    if isinstance(error, WeftError) or not isinstance(error, Exception):
        return error
    told = run_error(error, line=getattr(error, "weft_line", None))
    told.__cause__ = error
    return told
