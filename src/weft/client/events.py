"""Server-sent events: bytes in, messages out.

    parser = Parser()
    parser.feed(b'id: 3\\nevent: state\\ndata: {"type": "state", ...}\\n\\n')   # [Message(...)]

It knows lines and fields (https://html.spec.whatwg.org/multipage/server-sent-events.html), and
nothing of connections: see `jobs.events` for what happens when one breaks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from weft.errors import MessageError

LONGEST = 64 << 20
"""Bytes of one line, and of one event: the end of a job says what it saved, by name."""

_NUMBER = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class Message:
    """One event. `id` is its number among the events of its job, where it has one."""

    event: str
    data: str
    id: int | None = None


class Parser:
    """Reads a stream piece by piece, wherever it is cut."""

    def __init__(self) -> None:
        self._left = b""
        self._event = ""
        self._id: int | None = None
        self._data: list[str] = []
        self._size = 0

    def feed(self, piece: bytes) -> list[Message]:
        """The messages that are whole now."""
        *lines, self._left = _lines(self._left + piece)
        if len(self._left) > LONGEST:
            raise MessageError("an event of the server is too long")
        messages = [self._line(line) for line in lines]
        return [message for message in messages if message is not None]

    def _line(self, line: bytes) -> Message | None:
        if not line:
            return self._whole()
        name, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._size += len(line)
            if self._size > LONGEST:
                raise MessageError("an event of the server is too long")
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and _NUMBER.fullmatch(value):
            self._id = int(value)
        return None

    def _whole(self) -> Message | None:
        event, data, number = self._event or "message", self._data, self._id
        self._event, self._data, self._id, self._size = "", [], None, 0
        return Message(event, "\n".join(data), number) if data else None


def _lines(data: bytes) -> list[bytes]:
    """Lines that end with LF, CR LF or CR; the last one has not ended yet."""
    held = b""
    if data.endswith(b"\r"):  # its LF may be still to come
        data, held = data[:-1], b"\r"
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    lines[-1] += held
    return lines
