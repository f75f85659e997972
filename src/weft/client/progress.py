"""Progress bars: on a terminal, for what is large or takes long, if the user wants them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from weft.settings import Settings

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
