"""Progress bars: on a terminal, for what is large or takes long, if the user wants them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from weft.settings import Settings
from weft.wire.messages import ProgressEvent

LARGE = 32 << 20
"""Bytes from which it takes long enough to be told."""

LONG = 1.0
"""Seconds after which something counted is told."""


@contextmanager
def bar(settings: Settings, what: str, size: int) -> Iterator[Callable[[int], object]]:
    """Inside, what it gives is to be told how many bytes more have moved."""
    if not _wanted(settings, size):
        yield lambda moved: None
        return
    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # no thread that stays for ever to watch over bars

    with Bar(total=size, desc=what, unit="B", unit_scale=True, leave=False) as shown:
        yield shown.update


class LoadBar:
    """Shows how far the load of a model has come, while a job waits for it; on a terminal only.

    It is told every event of the job, and goes away with the first that is of another kind.
    """

    def __init__(self, settings: Settings) -> None:
        self._shows = _can_show(settings)
        self._bar: Any = None

    def hear(self, event: object) -> None:
        if not isinstance(event, ProgressEvent) or event.kind != "load":
            self.close()
        elif self._shows and event.total:
            if self._bar is None:
                self._bar = self._new(event.total)
            self._bar.n = max(self._bar.n, event.done)
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _new(self, total: int) -> Any:
        from tqdm import tqdm

        class Bar(tqdm):
            monitor_interval = 0

        how: Any = {"desc": "loading the model", "unit": "B", "unit_scale": True, "leave": False}
        return Bar(total=total, **how)


@contextmanager
def counted(settings: Settings, what: str, count: int) -> Iterator[Callable[[int], object]]:
    """As `bar`, for `count` points of something that may take long; it shows when it does."""
    if not _can_show(settings):
        yield lambda done: None
        return
    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0

    with Bar(total=count, desc=what, unit="point", leave=False, delay=LONG) as shown:
        yield shown.update


def _wanted(settings: Settings, size: int) -> bool:
    return size >= LARGE and _can_show(settings)


def _can_show(settings: Settings) -> bool:
    if not settings.progress or not sys.stderr.isatty():
        return False
    return importlib.util.find_spec("tqdm") is not None
