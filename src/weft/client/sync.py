"""The driver for threads: carries out the steps of a conversation with `httpx.Client`.

info = run(server, jobs.info(talk, "some-id"))
info = run(server, jobs.events(talk, "some-id"), hear=print)
for event in each(server, jobs.events(talk, "some-id")): ...
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from .effects import Answer, Broken, Give, HttpCall, More, Pieces, Shut, Sleep, Steps, Turns
from .servers import Server
from .transport import httpx, timeout

T = TypeVar("T")


def run(server: Server, steps: Steps[T], hear: Callable[[Any], object] | None = None) -> T:
    """Carries out all steps; `hear` is told what they give on the way."""
    turns = each(server, steps, hear or (lambda value: None))
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return end.value


def each(
    server: Server, steps: Steps[T], hear: Callable[[Any], object] | None = None
) -> Generator[Any, None, T]:
    """Carries out the steps, and gives what they give (unless `hear` is told)."""
    turns = Turns(steps)
    hands = _Hands(server, hear)
    try:
        while not turns.over:
            if type(turns.wants) is Give and hear is None:
                yield turns.wants.value
                turns.go_on()
                continue
            answer, error = hands.try_to(turns.wants)
            turns.go_on(answer, error)
            del answer, error  # an error leads to all frames that it passed
        return turns.value
    finally:
        hands.shut()
        turns.leave()


class _Hands:
    """Carries out single steps; holds the stream that is open."""

    def __init__(self, server: Server, hear: Any) -> None:
        self.server = server
        self.hear = hear
        self.stream: Any = None
        self.pieces: Any = None

    def try_to(self, effect: Any) -> tuple[Any, BaseException | None]:
        try:
            return self.do(effect), None
        except BaseException as error:  # noqa: BLE001, also Ctrl-C: the steps decide
            return None, error

    def do(self, effect: Any) -> Any:
        try:
            match effect:
                case HttpCall():
                    return self.call(effect)
                case More():
                    return next(self.pieces, b"")
                case Sleep():
                    return time.sleep(effect.seconds)
                case Shut():
                    return self.shut()
                case Give():
                    return self.hear(effect.value)
        except httpx().TransportError as error:
            self.shut()
            raise Broken(f"{type(error).__name__}: {error}") from None
        raise AssertionError(f"no step is a {type(effect).__name__}")

    def call(self, call: HttpCall) -> Answer:
        client = self.server.client()
        request = client.build_request(
            call.method,
            call.path,
            headers=call.headers,
            content=iter(call.body) if isinstance(call.body, Pieces) else call.body,
            timeout=timeout(self.server.settings, call.seconds),
        )
        response = client.send(request, stream=call.stream)
        headers = dict(response.headers)
        if not call.stream:
            return Answer(response.status_code, headers, response.content)
        self.stream = response
        if response.status_code < 300:
            self.pieces = response.iter_raw()
            return Answer(response.status_code, headers)
        body = response.read()
        self.shut()
        return Answer(response.status_code, headers, body)

    def shut(self) -> None:
        stream, self.stream, self.pieces = self.stream, None, None
        if stream is not None:
            stream.close()
