"""What a conversation with a server may want: each step yields one of these and gets its answer.

    def greet() -> Steps[bytes]:
        answer = yield HttpCall("GET", "/api/hello")
        return answer.body

Nothing here opens a socket or knows a clock. `sync` and `aio` carry the steps out; where the
connection broke they throw `Broken` into the generator. A call with `stream` answers before its
body is there: `More` then asks for the next bytes (none: it is over) and `Shut` leaves the rest.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")

READ_SECONDS = 60.0
"""How long an answer may be silent. Event streams say something every 10 s."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """A large body, sent piece by piece; `told` hears of the bytes of each."""

    data: bytes | memoryview
    told: Any = None
    size: int = 1 << 20

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[bytes]:
        view = memoryview(self.data)
        for start in range(0, len(view), self.size):
            piece = bytes(view[start : start + self.size])
            yield piece
            if self.told is not None:
                self.told(len(piece))


@dataclass(frozen=True, slots=True)
class HttpCall:
    """One request."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Pieces = b""
    stream: bool = False
    seconds: float = READ_SECONDS


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. Names of headers are in lower case; a stream that went well has no body."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class More:
    """The next bytes of the open stream; `b""` at its end."""


@dataclass(frozen=True, slots=True)
class Shut:
    """Leaves the open stream, wherever it is."""


@dataclass(frozen=True, slots=True)
class Sleep:
    seconds: float


@dataclass(frozen=True, slots=True)
class Give:
    """Hands `value` to whoever iterates."""

    value: Any


class Broken(Exception):
    """The connection could not be made, broke, or stayed silent."""


Effect = HttpCall | More | Shut | Sleep | Give
Steps = Generator[Effect, Any, T]


class Turns(Generic[T]):
    """Steps under way: `wants` is what they want now, until they are `over` and have a `value`."""

    wants: Any
    value: T

    def __init__(self, steps: Steps[T]) -> None:
        self._steps = steps
        self.over = False
        self.go_on()

    def go_on(self, answer: Any = None, error: BaseException | None = None) -> None:
        """With the answer to what was wanted, or with why there is none."""
        if error is None:
            self._advance(self._steps.send, answer)
        else:
            self._advance(self._steps.throw, error)

    def leave(self) -> None:
        self._steps.close()

    def _advance(self, how: Any, what: Any) -> None:
        try:
            self.wants = how(what)
        except StopIteration as end:
            self.over, self.value = True, end.value
