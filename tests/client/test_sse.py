"""Server-sent events, wherever they are cut."""

from __future__ import annotations

import pytest

from weft.client.events import LONGEST, Message, Parser
from weft.errors import MessageError

TEXT = (
    ": a comment\n\n"
    'event: state\nid: 1\ndata: {"a": 1}\n\n'
    "id:2\r\nevent:log\r\ndata:zwei\r\ndata: Zeilen é\r\n\r\n"
    "data: without\rid: x\r\r"
    "retry: 5\nevent: nothing\n\n"
    "id: 3\ndata\n\n"
    "data: never ended\n"
).encode()

MESSAGES = [
    Message("state", '{"a": 1}', 1),
    Message("log", "zwei\nZeilen é", 2),
    Message("message", "without", None),
    Message("message", "", 3),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_messages_are_the_same_however_they_are_cut(size: int) -> None:
    parser, found = Parser(), []
    for start in range(0, len(TEXT), size):
        found += parser.feed(TEXT[start : start + size])
    assert found == MESSAGES


def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.client.events.LONGEST", 100)
    assert LONGEST > 1 << 20
    with pytest.raises(MessageError, match="too long"):
        Parser().feed(b"x" * 101)
