"""`Talk`: one conversation with a server: calls, their retries, and what they carried.

    talk = Talk(server)
    hello = sync.run(server, talk.hello())

Every call may be made again without harm (a job is named by its request id, a constant by its
digest), so a broken connection is only a delay, until `retry_seconds` have passed. A server that
says when to come back (429, 503 with `Retry-After`) is asked again then, within the same time.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NoReturn

from weft.errors import RemoteError, ServerAwayError, VersionMismatchError, WeftError
from weft.wire.messages import PROTOCOL, ErrorReport, Hello, decode, encode
from weft.wire.reports import error_of

from .effects import Answer, Broken, HttpCall, Pieces, Sleep, Steps
from .find import WAY_OUT
from .servers import Server

MSGPACK = "application/msgpack"
EVENTS = "text/event-stream"
_BACK_SOON = (502, 504)
"""A proxy found nobody behind it."""


@dataclass
class Traffic:
    """What one block sent and got: bytes of bodies, and how many requests."""

    up: int = 0
    down: int = 0
    requests: int = 0


class MissingError(WeftError):
    """The server has not got these constants (any more). Met within the client only."""

    def __init__(self, digests: tuple[str, ...]) -> None:
        super().__init__(f"{len(digests)} constants are missing on the server")
        self.digests = digests


class Patience:
    """How long one call may go on being tried."""

    def __init__(self, talk: Talk) -> None:
        self.server = talk.server
        self.seconds = talk.seconds
        self.until: float | None = None
        self.pause = 0.05

    def broken(self, why: Broken, job: str | None = None) -> Steps[None]:
        """Waits before another try. Raises `ServerAwayError` when the time is over."""
        pause = self.pause * random.uniform(0.5, 1.0)  # not all clients at once
        self.pause = min(2 * self.pause, 2.0)
        if not self.lasts(pause):
            _away(self.server, why, job)
        yield Sleep(pause)

    def reset(self) -> None:
        """It goes on: what breaks next is another matter."""
        self.until, self.pause = None, 0.05

    def lasts(self, pause: float) -> bool:
        """Whether there is time for a pause."""
        now = self.server.clock()
        if self.until is None:
            self.until = now + self.seconds
        return now + pause <= self.until


class Talk:
    """One conversation. `seconds` is how long a call is tried; the settings say, if it does not."""

    def __init__(
        self, server: Server, traffic: Traffic | None = None, seconds: float | None = None
    ) -> None:
        self.server = server
        self.traffic = traffic or Traffic()
        self._seconds = seconds

    @property
    def seconds(self) -> float:
        if self._seconds is not None:
            return self._seconds
        settings = self.server.settings
        if self.server.hello is not None:
            return settings.retry_seconds
        return min(settings.retry_seconds, settings.connect_seconds)  # perhaps it never was there

    # -- the handshake -----------------------------------------------------------------------

    def hello(self) -> Steps[Hello]:
        """The server's handshake, made once. Raises `VersionMismatchError`."""
        found = self.server.hello
        if found is None:
            found = yield from self.ask("GET", "/api/hello", Hello)
            if PROTOCOL not in found.protocols:
                self._refuse(found)
            self.server.hello = found
        return found

    def _refuse(self, hello: Hello) -> NoReturn:
        theirs = ", ".join(map(str, hello.protocols))
        newer = max(hello.protocols, default=0) > PROTOCOL
        raise VersionMismatchError(
            f"this is weft {version('weft')}, which speaks protocol {PROTOCOL}; the server at "
            f"{self.server.url} is weft {hello.version}, which speaks {theirs}",
            fix="update weft here" if newer else "ask for a newer server, or install its version",
        )

    # -- calls -------------------------------------------------------------------------------

    def ask(self, method: str, path: str, kind: Any, message: Any = None) -> Steps[Any]:
        """Sends a message, if there is one (or its bytes), and reads the answer as `kind`."""
        body = message if isinstance(message, bytes) else encode(message) if message else b""
        answer = yield from self.call(method, path, body, {"content-type": MSGPACK} if body else {})
        return decode(answer.body, kind, _form(answer))

    def call(
        self,
        method: str,
        path: str,
        body: bytes | Pieces = b"",
        headers: dict[str, str] | None = None,
        *,
        job: str | None = None,
        **how: Any,
    ) -> Steps[Answer]:
        """One call, tried until it is answered. Raises the error that the server reports.

        `job` is what it is about: where the server stays away, it can be fetched later.
        """
        patience = Patience(self)
        while True:
            try:
                answer = yield from self.once(method, path, body, headers, **how)
            except Broken as why:
                yield from patience.broken(why, job)
                continue
            if answer.status == 401 and self.server.finds_key():
                continue
            pause = _pause(answer)
            if pause is None or not patience.lasts(pause):
                return self.checked(answer, f"{method} {path.partition('?')[0]}")
            yield Sleep(pause)

    def once(
        self,
        method: str,
        path: str,
        body: bytes | Pieces = b"",
        headers: dict[str, str] | None = None,
        **how: Any,
    ) -> Generator[Any, Any, Answer]:
        """One call, tried once."""
        call = HttpCall(method, path, {**self._headers(body), **(headers or {})}, body, **how)
        self.traffic.requests += 1
        self.traffic.up += len(body)
        answer: Answer = yield call
        self.traffic.down += len(answer.body)
        if answer.status in _BACK_SOON:
            raise Broken(f"status {answer.status}")
        return answer

    def _headers(self, body: bytes | Pieces) -> dict[str, str]:
        headers = {
            "accept": MSGPACK,
            "accept-encoding": "identity",
            "weft-protocol": str(PROTOCOL),
        }
        if isinstance(body, Pieces):
            headers["content-length"] = str(len(body))
        if self.server.place.key is not None:
            headers["authorization"] = f"Bearer {self.server.place.key}"
        return headers

    def checked(self, answer: Answer, what: str) -> Answer:
        """The answer, if it is a good one."""
        if answer.status < 300:
            return answer
        try:
            report = decode(answer.body, ErrorReport, _form(answer))
        except RemoteError:
            raise RemoteError(
                f"{self.server.url} answered {what} with status {answer.status}, and no reason",
                fix="is it the address of a Weft server?",
            ) from None
        if report.missing:
            raise MissingError(report.missing)
        raise error_of(report)


def _form(answer: Answer) -> str:
    return "json" if "json" in answer.headers.get("content-type", "") else "msgpack"


def _pause(answer: Answer) -> float | None:
    """Seconds after which the server wants to be asked again; None where it does not say."""
    after = answer.headers.get("retry-after")
    if answer.status not in (429, 503) or after is None:
        return None
    try:
        return max(0.05, float(after))
    except ValueError:
        return 1.0  # a date


def _away(server: Server, why: Broken, job: str | None) -> NoReturn:
    way_out = WAY_OUT
    if job is not None:
        way_out = f"the job goes on there: weft.Job.get({job!r}, remote={server.url!r})"
    raise ServerAwayError(f"no server answers at {server.url} ({why})", fix=way_out) from None
