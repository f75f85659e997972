"""A process of the server puts walls around itself, in two steps.

    confined = Confined("auto", Places(...), memory=True)
    confined.begin()        # at birth, while it has one thread: files
    ...                     # loads its model, follows the fleet
    confined.finish()       # before a stranger's first message: calls, limits, environment
    str(confined.walls)     # what is up

The first step leaves what loading needs (`Places.loading`), the second takes it away from the main
thread and those it starts; where nothing is listed there, the first is all there is to say of
files. Neither can be undone.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from weft.errors import ServerError

from . import environment, landlock, limits, seccomp
from .kernel import give_up_capabilities, threads
from .means import Walls, means

LOG = logging.getLogger("weft.sandbox")

OPEN_FILES = 1024
"""Files that a confined process may open beyond those it has."""


@dataclass(frozen=True)
class Places:
    """What a process may do with files: rights of `landlock` by path.

    `always`: as long as it lives. `loading`: besides, until it has its model; None: nothing more is
    needed, and no network either.
    """

    always: Mapping[Path, int]
    loading: Mapping[Path, int] | None = None


@dataclass
class Confined:
    """See the module's text. `memory`: it may be bounded by the memory of the machine."""

    mode: str
    places: Places
    file_bytes: int = 1 << 36
    memory: bool = True
    walls: Walls = field(default_factory=Walls)

    def begin(self) -> None:
        """Keeps this process to its files, and to what it needs until it has loaded.

        Raises `ServerError` with `require`, where that cannot be done.
        """
        if self.mode == "off":
            return
        possible = means()
        loading = self.places.loading
        if sys.platform == "linux":
            self._try(give_up_capabilities, self.walls)
        if possible.landlock >= landlock.NEEDED:
            self._try(
                lambda: landlock.restrict(
                    {**self.places.always, **(loading or {})}, network=loading is not None
                ),
                replace(self.walls, landlock=possible.landlock, alone=threads() == 1),
            )
        self._complain(replace(self.walls, seccomp=possible.seccomp))

    def finish(self) -> None:
        """From now on nothing but what drawing graphs needs. Raises as `begin` does."""
        if self.mode == "off":
            return
        if self.walls.landlock and self.places.loading is not None:
            landlock.restrict(self.places.always, network=False)
        environment.scrub()
        limits.bound(files=OPEN_FILES, file_bytes=self.file_bytes, memory=self.memory)
        if means().seccomp:
            self._try(seccomp.install, replace(self.walls, seccomp=True))
        self._complain(self.walls)
        LOG.info("sandbox of process %d: %s", os.getpid(), self.walls)

    def _try(self, act: Callable[[], None], then: Walls) -> None:
        try:
            act()
        except OSError as error:
            LOG.warning("a wall of the sandbox does not stand: %s", error)
        else:
            self.walls = then

    def _complain(self, walls: Walls) -> None:
        if self.mode == "require" and walls.missing:
            raise ServerError(
                f"the sandbox is required, but lacks {', '.join(walls.missing)}",
                fix="sandbox = 'auto' serves without",
            )
