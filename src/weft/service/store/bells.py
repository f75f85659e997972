"""Bells: how one process wakes another that waits. A lost ring costs a poll, never a job.

A bell is a pipe. Who waits has its reading end, who rings its writing end; one byte is one ring,
and rings that nobody has heard yet are one ring. What there is to do stands in the store.

    bells = Bells.of_models(["tiny"])
    bells.ring("worker", "tiny")
    bells.worker("tiny").wait(0.5)         # True: rung since the last time

    child = Popen([..., bells.spelled()], pass_fds=bells.fds())
    bells = Bells.spelled_so(text)         # in the child
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterable, Mapping
from types import TracebackType

import msgspec


class Bell:
    """One bell, with one end or both. Any thread may ring; one waits."""

    def __init__(self, read_fd: int | None, write_fd: int | None) -> None:
        self._read = read_fd
        self._write = write_fd
        self._lock = threading.Lock()  # nobody writes to a number that was closed meanwhile
        for fd in self.fds():
            os.set_blocking(fd, False)

    @classmethod
    def pair(cls, *, inheritable: bool = False) -> Bell:
        """A new bell with both ends, which children get only if `inheritable`."""
        read_fd, write_fd = os.pipe()
        for fd in (read_fd, write_fd):
            os.set_inheritable(fd, inheritable)
        return cls(read_fd, write_fd)

    @classmethod
    def of(cls, read_fd: int | None, write_fd: int | None) -> Bell:
        """A bell of ends that were inherited; it owns them from now on."""
        return cls(read_fd, write_fd)

    def fds(self) -> tuple[int, ...]:
        """The numbers of its ends, for `pass_fds`."""
        return tuple(fd for fd in (self._read, self._write) if fd is not None)

    def ends(self) -> tuple[int | None, int | None]:
        return self._read, self._write

    def fileno(self) -> int:
        """The reading end, for `select` and `loop.add_reader(bell, bell.drain)`."""
        if self._read is None:
            raise ValueError("this bell has no reading end here, or is closed")
        return self._read

    def ring(self) -> None:
        """Never blocks and never fails: a full pipe is loud enough, nobody there is no matter."""
        with self._lock:
            if self._write is None:
                return
            try:
                os.write(self._write, b"\0")
            except (BlockingIOError, BrokenPipeError):
                return

    def wait(self, timeout: float) -> bool:
        """Waits for a ring, for at most so many seconds. True: there was one, now heard."""
        deadline = time.monotonic() + timeout
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        if not poll.poll(timeout * 1000):
            return False
        if self.drain():
            return True
        # The other end is closed: that is ready at once and for ever, and must not spin.
        time.sleep(max(0.0, deadline - time.monotonic()))
        return False

    def drain(self) -> bool:
        """Takes the rings so far. True: there were some."""
        rung = False
        while True:
            try:
                data = os.read(self.fileno(), 4096)
            except BlockingIOError:
                return rung
            if not data:
                return rung
            rung = True

    def only_ring(self) -> None:
        """Nobody waits for it here: gives up the reading end."""
        with self._lock:
            fd, self._read = self._read, None
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        with self._lock:
            fds, self._read, self._write = self.fds(), None, None
        for fd in fds:
            os.close(fd)

    def __enter__(self) -> Bell:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()


class Bells:
    """The bells of one server: of its gateway, its checker, and one of each model's worker."""

    def __init__(self, gateway: Bell, checker: Bell, workers: Mapping[str, Bell]) -> None:
        self.gateway = gateway
        self.checker = checker
        self.workers = dict(workers)

    @classmethod
    def of_models(cls, models: Iterable[str] = (), *, inheritable: bool = False) -> Bells:
        """New bells, both ends of each."""

        def new() -> Bell:
            return Bell.pair(inheritable=inheritable)

        return cls(new(), new(), {model: new() for model in models})

    def worker(self, model: str) -> Bell:
        """Raises KeyError."""
        return self.workers[model]

    def ring(self, who: str, model: str | None = None) -> None:
        """Rings for `gateway`, `checker` or the `worker` of a model; a model that is not here has
        nobody to wake."""
        if who == "worker":
            if model in self.workers:
                self.workers[model].ring()
        else:
            {"gateway": self.gateway, "checker": self.checker}[who].ring()

    def only(self, who: str, model: str | None = None) -> None:
        """Gives up what `checker` or the `worker` of a model has no use for: to hear others."""
        for other in [self.gateway, self.checker] if who == "worker" else [self.gateway]:
            other.only_ring()
        for id, bell in list(self.workers.items()):
            if who == "checker":
                bell.only_ring()
            elif id != model:
                self.workers.pop(id).close()

    def fds(self) -> tuple[int, ...]:
        """All ends, for `pass_fds`."""
        return tuple(fd for bell in self._all() for fd in bell.fds())

    def spelled(self) -> str:
        """The numbers of all ends, for a child that inherits them."""
        ends = {model: bell.ends() for model, bell in self.workers.items()}
        numbers = _Numbers(self.gateway.ends(), self.checker.ends(), ends)
        return msgspec.json.encode(numbers).decode()

    @classmethod
    def spelled_so(cls, text: str) -> Bells:
        """The bells that `spelled` gave the numbers of, in a child."""
        numbers = msgspec.json.decode(text, type=_Numbers)
        workers = {model: Bell.of(*ends) for model, ends in numbers.workers.items()}
        return cls(Bell.of(*numbers.gateway), Bell.of(*numbers.checker), workers)

    def close(self) -> None:
        for bell in self._all():
            bell.close()

    def _all(self) -> list[Bell]:
        return [self.gateway, self.checker, *self.workers.values()]

    def __enter__(self) -> Bells:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Numbers(msgspec.Struct, forbid_unknown_fields=True):
    gateway: tuple[int | None, int | None]
    checker: tuple[int | None, int | None]
    workers: dict[str, tuple[int | None, int | None]] = {}
