"""Forwards that take turns: one runs, the others stand at a site or have not begun.

Where an edit waits for a value of another invoke's forward, its own forward stands still and the
other one goes on, until that value is there. Each forward has a thread of its own, because only a
thread can be left in the middle of a module's forward and be taken up again; never do two of them
run at once, and all are gone when `run` returns or raises.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextvars import copy_context
from functools import partial
from typing import Any

import torch

from weft.graph.site import Site

from .hooks import Stop, normal_mode


class Loom:
    """Runs the forwards of several invokes (`invokes.Part`) that need each other."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._threads = [_Thread(self, part) for part in parts]
        self._done = threading.Semaphore(0)
        self._grad = torch.is_grad_enabled()
        self.error: BaseException | None = None
        self.torn = False
        """Whether all forwards are to be left as soon as they can."""

    def run(self) -> None:
        """Returns when every forward is over. Raises what the first failing one raised."""
        first = self._threads[0]
        first.begin()
        try:
            self._done.acquire()
        except BaseException:  # Ctrl-C: whoever runs now leaves at its next site
            self.torn = True
            self._done.acquire()
            raise
        finally:
            for one in self._threads:
                one.join()
        if self.error is not None:
            try:
                raise self.error
            finally:
                self.error = None

    def ended(self, thread: _Thread, error: BaseException | None) -> None:
        """A forward is over, or has failed: another one goes on."""
        if error is not None:
            self.torn = True
            self.error = self.error or error
        begun = [one for one in self._threads if one.is_standing()]
        waiting = [] if self.torn else [one for one in self._threads if not one.begun]
        free = [one for one in begun if one.is_free()]
        # Where nobody is free, somebody waits for what will never come, and says so.
        following = [*free, *waiting, *begun]
        if following:
            following[0].go_on()
        else:
            self._done.release()

    def other(self, thread: _Thread) -> _Thread | None:
        """Who can go on instead of a forward that waits."""
        for one in self._threads:
            if one is not thread and (not one.begun or (one.is_standing() and one.is_free())):
                return one
        return None

    @property
    def grad(self) -> bool:
        return self._grad


class _Thread:
    """One forward and its thread."""

    def __init__(self, loom: Loom, part: Any) -> None:
        self._loom = loom
        self._part: Any = part
        self._thread: threading.Thread | None = None
        self._turn = threading.Semaphore(0)
        self._site: Site | None = None  # where it stands
        self.begun = False
        part.pause = self._pause

    def begin(self) -> None:
        self.begun = True
        run = partial(copy_context().run, self._run)
        self._thread = threading.Thread(target=run, name="weft forward", daemon=True)
        self._thread.start()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def go_on(self) -> None:
        """It is this forward's turn."""
        if self.begun:
            self._turn.release()
        else:
            self.begin()

    def is_standing(self) -> bool:
        return self._site is not None

    def is_free(self) -> bool:
        """Whether what it waited for is there, or it is to leave."""
        assert self._site is not None
        return self._loom.torn or not self._part.interpreter.is_blocked(self._site)

    def _pause(self, site: Site) -> None:
        """In the forward, at a site: waits until its edits can act, or finds that they never can;
        then the interpreter says so."""
        loom = self._loom
        while not loom.torn and self._part.interpreter.is_blocked(site):
            other = loom.other(self)
            if other is None:
                return
            self._site = site
            other.go_on()
            self._turn.acquire()
            self._site = None
        if loom.torn:
            raise Stop

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            with torch.set_grad_enabled(self._loom.grad), normal_mode():
                self._part.call()
        except BaseException as failure:  # noqa: BLE001 (it is raised again by `Loom.run`)
            error = failure
        part, self._part = self._part, None
        part.pause = None
        self._loom.ended(self, error)
