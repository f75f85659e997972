"""`Job`: an experiment under way on a server, or over; `AsyncJob`: the same for asyncio.

with model.trace(prompt, remote=True, blocking=False) as tracer:
    h = model.transformer.h[5].output.save("h")
tracer.job.id                        # write it down: the job goes on without this process
tracer.job.result()["h"]             # waits; h itself is the tensor now, too

weft.Job.get("the id", remote=True).result("h")       # in another process
"""

from __future__ import annotations

import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterator,
    Sequence,
)
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch

from weft.errors import CancelledError, NoSuchError, NotFinishedError, WeftError
from weft.wire.messages import (
    FINAL,
    EndEvent,
    Event,
    JobInfo,
    LogEvent,
    ResultInfo,
    ValueEvent,
)
from weft.wire.reports import error_of, escaped

from . import aio, files, jobs, results, sync
from .backend import Reply
from .core import Talk
from .effects import Steps
from .progress import LoadBar
from .servers import Server, server_at
from .values import Listen, heard, opened_value, single

Deliver = Callable[[Reply], dict[str, Any]]


class _Asked:
    """What both kinds of job know, and the steps that they take."""

    def __init__(
        self,
        server: Server,
        id: str,
        *,
        info: JobInfo | None = None,
        device: torch.device | None = None,
        listen: Listen | None = None,
    ) -> None:
        self.id = id
        self._server = server
        self._info = info
        self._device = device
        self._listen = listen
        self._log: list[str] = []
        self._last = 0  # the number of the last event that was heard
        self._ended = False  # whether it was the last one
        self._saved: dict[str, Any] | None = None
        self._deliver: Deliver | None = None
        self._failed: Callable[[BaseException], None] | None = None
        self._load = LoadBar(server.settings)
        self._lock = threading.Lock()

    @property
    def log(self) -> tuple[str, ...]:
        """Lines of `tracer.log` that have come so far, by `events()` and `result()`."""
        return tuple(self._log)

    def fills(self, deliver: Deliver, failed: Callable[[BaseException], None]) -> None:
        """Says who hears what the job brings, in the process that recorded it."""
        self._deliver, self._failed = deliver, failed

    def __repr__(self) -> str:
        state = "" if self._info is None else f" {escaped(self._info.state)}"
        return f"<{type(self).__name__} {self.id}{state} at {self._server.url}>"

    # -- steps -------------------------------------------------------------------------------

    def _talk(self) -> Talk:
        return Talk(self._server)

    def _noted(self, steps: Steps[JobInfo]) -> Steps[JobInfo]:
        self._info = yield from steps
        if self._info.state in FINAL and self._info.result is None:
            self._fail(failure_of(self._info))
        return self._info

    def _get(self) -> Steps[Any]:
        talk = self._talk()
        yield from talk.hello()
        yield from self._noted(jobs.info(talk, self.id))
        return self

    def _status(self) -> Steps[JobInfo]:
        return self._noted(jobs.info(self._talk(), self.id))

    def _keep_for(self, seconds: float) -> Steps[JobInfo]:
        return self._noted(jobs.keep(self._talk(), self.id, seconds))

    def _fetch(self, path: Path, names: Sequence[str]) -> Steps[int]:
        """Writes the result to a file; its size."""
        info = yield from self._rest()
        told = finished(info)
        return (yield from files.fetch_to(self._talk(), self.id, told, path, names))

    def _cancel(self) -> Steps[JobInfo]:
        return self._noted(jobs.cancel(self._talk(), self.id))

    def _delete(self) -> Steps[None]:
        return jobs.delete(self._talk(), self.id)

    def _events(self, after: int) -> Steps[JobInfo]:
        return self._noted(jobs.events(self._talk(), self.id, after))

    def _rest(self) -> Steps[JobInfo]:
        """The events that were not heard yet."""
        if self._ended and self._info is not None:
            return self._info
        return (yield from self._events(self._last))

    def _wait(self, timeout: float | None) -> Steps[JobInfo]:
        if timeout is None:
            return (yield from self._rest())
        info = yield from self._noted(jobs.wait(self._talk(), self.id, timeout))
        if info.state not in FINAL:
            raise NotFinishedError(
                f"job {self.id} is {escaped(info.state)} after {timeout:g} s",
                fix="wait longer, or job.cancel()",
            )
        return info

    def _result(self, name: str | None) -> Steps[Any]:
        if self._saved is None:
            info = yield from self._rest()
            told = finished(info)
            if name is not None and self._deliver is None and told.bytes >= results.LARGE:
                found = yield from results.fetch_named(self._talk(), self.id, [name])
                return results.moved(found[name], self._device)
            talk = self._talk()
            manifest, saved = yield from results.fetch(talk, self.id, told)
            saved = results.moved(saved, self._device)
            up, down = talk.traffic.up, talk.traffic.down
            self._keep(Reply(saved, manifest.ended, info.stages, up, down, self.id))
        return self._named(name)

    # -- what comes back ---------------------------------------------------------------------

    def _keep(self, reply: Reply) -> None:
        """Fills the handles of the block, once."""
        with self._lock:
            if self._saved is not None:
                return
            deliver, self._deliver, self._failed = self._deliver, None, None
            own = {name: value for name, value in reply.saved.items() if name[0] != "<"}
            self._saved = own if deliver is None else deliver(reply)

    def _named(self, name: str | None) -> Any:
        saved = self._saved or {}
        if name is None:
            return saved
        if name not in saved:
            raise NoSuchError(
                f"the job saved nothing under the name {name!r}",
                fix=f"it saved: {', '.join(map(escaped, saved)) or 'nothing'}",
            )
        return saved[name]

    def _fail(self, error: BaseException) -> None:
        failed, self._failed = self._failed, None
        if failed is not None:
            failed(error)

    def _hear(self, given: tuple[int, Event]) -> Event:
        """Notes an event; each is heard once."""
        number, event = given
        self._load.hear(event)
        if isinstance(event, LogEvent) and number > self._last:
            self._log.append(escaped(event.text, keep="\n\t"))
        if isinstance(event, ValueEvent) and number > self._last:
            self._last = number
            heard(event, self._listen, self._device)
        if isinstance(event, EndEvent):
            self._info, self._ended, self._listen = event.job, True, None
        self._last = max(self._last, number)
        return event

    def _value(self, event: Event, given: int) -> tuple[Any, ...] | None:
        """The value of an event, where it is one of number `given` or later."""
        if not isinstance(event, ValueEvent) or event.number < given:
            return None  # of a job that was begun anew
        return opened_value(event, self._device)

    def _finished(self) -> None:
        if self._info is not None:
            finished(self._info)

    def _hear_aloud(self, given: tuple[int, Event]) -> None:
        if isinstance(self._hear(given), LogEvent):
            print(self._log[-1], flush=True)


class Job(_Asked):
    """An experiment on a server: what `tracer.job` is after `model.trace(..., blocking=False)`.

    It goes on without this process; `id` finds it again. `log` has the lines of `tracer.log` that
    were heard so far. Every method that asks the server may raise `ServerAwayError`, `AccessError`,
    and `NoSuchError` where the server does not keep the job any more (`.status().expires`).
    """

    @classmethod
    def get(cls, id: str, remote: bool | str | Server = True) -> Job:
        """A job by its id, in any process.

        remote: which server: True (the configured one) or an address, as in `model.trace`. Raises
        `NoSuchError` for one that is not there, or is somebody else's.
        """
        server = server_at(remote)
        return sync.run(server, cls(server, id)._get())

    def status(self) -> JobInfo:
        """How it is.

        `.state` is `received` (not priced yet), `queued`, `running`, `done`, `failed` or
        `cancelled`; `.price` what it costs (bytes, FLOPs), `.ahead` how many jobs come before it,
        `.estimate` in how many seconds it may begin, `.model_state` how its model is if not ready,
        `.stages` seconds by stage (`price`, `queue`, `run`), `.result` bytes and names of what it
        saved, `.error` what it failed with, `.expires` when the server forgets it (seconds since
        1970).
        """
        return sync.run(self._server, self._status())

    def result(self, name: str | None = None) -> Any:
        """What was saved: a dict by name, or one of it; waits for it, and prints what it logs.

        Tensors have the shapes they were saved with and lie on the CPU, or on `device=` of the
        block. In the process that recorded the block its handles become these tensors; elsewhere a
        large result is fetched by the names that are asked for only. Raises what the job failed
        with (a model's own exception as what it is: `IndexError`), `CancelledError`, `NoSuchError`
        for a name that was not saved, `ResultChangedError` where what arrives is not what was sent.
        """
        return sync.run(self._server, self._result(name), hear=self._hear_aloud)

    def events(self) -> Iterator[Event]:
        """What happened and happens to it, from the beginning, each once, up to its end.

        A `StateEvent` (`.state`), `LogEvent` (`.text`, of `tracer.log`), `ValueEvent` (of
        `tracer.stream`; see `stream`), `ProgressEvent` (`.done` sites of `.total`; of `.kind`
        `load` bytes of the model's weights, while the job waits for these), at last an `EndEvent`
        (`.job`, as `status` gives it). Goes on where a connection breaks.
        """
        for given in sync.each(self._server, self._events(0)):
            yield self._hear(given)

    def stream(self) -> Iterator[Any]:
        """What `tracer.stream` hands out, from the beginning, as it comes to be; each value once.

        At its end it raises what the job failed with, as `result` does.
        """
        given = 0
        for event in self.events():
            value = self._value(event, given)
            if value is not None:
                given += 1
                yield single(value)
        self._finished()

    def onward(self) -> Generator[None]:
        """Hears one event after another that was not heard yet; then as `stream`."""
        for given in sync.each(self._server, self._rest()):
            self._hear(given)
            yield
        self._finished()

    def wait(self, timeout: float | None = None) -> JobInfo:
        """Waits until it is over, however it ended, and tells how it is, as `status` does.

        timeout: seconds; after these it raises `NotFinishedError`.
        """
        return sync.run(self._server, self._wait(timeout), hear=self._hear_aloud)

    def keep(self, seconds: float) -> JobInfo:
        """Has the server keep it and its result for so many seconds after its end.

        Raises `LimitError` above the server's `longest_keep_seconds`.
        """
        return sync.run(self._server, self._keep_for(seconds))

    def fetch(self, path: str | Path, *names: str) -> int:
        """Writes what was saved to a file; waits for it. Returns the file's size in bytes.

        path: where to. What an earlier call had fetched of it before it was interrupted lies in
        `path` with `.part` behind, and is not fetched again. names: these saves only, or all. The
        file is in the safetensors format, and `Job.read(path)` gives what `result()` would. Raises
        what the job failed with, `NoSuchError` for a name that was not saved, and
        `ResultChangedError` where what arrived is not what was sent.
        """
        return sync.run(self._server, self._fetch(Path(path), names), hear=self._hear_aloud)

    @staticmethod
    def read(path: str | Path) -> dict[str, Any]:
        """What a file of `fetch` holds: a dict by name, of tensors on the CPU. Asks no server."""
        return files.read(Path(path))

    def cancel(self) -> JobInfo:
        """Wants no more of it; what is over stays as it is.

        One that runs ends at the next operation or site of its graph; `wait` for that.
        """
        return sync.run(self._server, self._cancel())

    def delete(self) -> None:
        """Removes it with its result from the server. Raises `NotFinishedError` before its end."""
        return sync.run(self._server, self._delete())


class AsyncJob(_Asked):
    """A `Job` for asyncio: the same methods with `await`, and `async for event in job.events()`.

    It is what `tracer.job` is after `async with model.trace(..., blocking=False)`.
    """

    @classmethod
    async def get(cls, id: str, remote: bool | str | Server = True) -> AsyncJob:
        """A job by its id, in any process. Raises `NoSuchError`."""
        server = server_at(remote)
        return await aio.run(server, cls(server, id)._get())

    async def status(self) -> JobInfo:
        """As `Job.status`."""
        return await aio.run(self._server, self._status())

    async def result(self, name: str | None = None) -> Any:
        """As `Job.result`."""
        return await aio.run(self._server, self._result(name), hear=self._hear_aloud)

    async def events(self) -> AsyncGenerator[Event]:
        """As `Job.events`."""
        async with aclosing(aio.each(self._server, self._events(0))) as stream:
            async for given in stream:
                yield self._hear(given)

    async def stream(self) -> AsyncIterator[Any]:
        """As `Job.stream`."""
        given = 0
        async with aclosing(self.events()) as events:
            async for event in events:
                value = self._value(event, given)
                if value is not None:
                    given += 1
                    yield single(value)
        self._finished()

    async def onward(self) -> AsyncGenerator[None]:
        """As `Job.onward`."""
        async with aclosing(aio.each(self._server, self._rest())) as stream:
            async for given in stream:
                self._hear(given)
                yield
        self._finished()

    async def wait(self, timeout: float | None = None) -> JobInfo:  # noqa: ASYNC109
        """As `Job.wait`."""
        return await aio.run(self._server, self._wait(timeout), hear=self._hear_aloud)

    async def keep(self, seconds: float) -> JobInfo:
        """As `Job.keep`."""
        return await aio.run(self._server, self._keep_for(seconds))

    async def fetch(self, path: str | Path, *names: str) -> int:
        """As `Job.fetch`."""
        steps = self._fetch(Path(path), names)
        return await aio.run(self._server, steps, hear=self._hear_aloud)

    async def cancel(self) -> JobInfo:
        """As `Job.cancel`."""
        return await aio.run(self._server, self._cancel())

    async def delete(self) -> None:
        """As `Job.delete`."""
        return await aio.run(self._server, self._delete())


def finished(info: JobInfo) -> ResultInfo:
    """What a job that is over brought back. Raises what it failed with."""
    if info.result is None:
        raise failure_of(info)
    return info.result


def failure_of(info: JobInfo) -> WeftError:
    """The error of a job that brought nothing back."""
    if info.error is not None:
        return error_of(info.error)
    return CancelledError(f"job {escaped(info.id)} ended as {escaped(info.state)}")
