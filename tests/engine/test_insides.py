"""Sources between a server and its clients: what is told is text, and stays text."""

from __future__ import annotations

import msgspec
import pytest

from tests.families import zoo
from weft.engine.insides import listing_of, source_text
from weft.engine.publish import know
from weft.errors import MessageError, SourceError, UnknownPathError
from weft.wire.messages import SourceQuery, SourceText, decode, encode

EVIL = "\x1b]0;mine\x07def f():\r\n\tpass\u202e\n!! no Python at all: __import__('os').abort()"


def told(*operations: tuple[str, int, str], text: str = EVIL) -> SourceText:
    return SourceText(digest="0" * 64, text=text, operations=operations)


def test_a_text_is_shown_and_never_read():
    """It need be no Python. Nothing in it reaches a terminal but what can be printed."""
    listing = listing_of(told(("a_0", 1, "")))
    shown = listing.shown()
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert "__import__('os').abort()" in shown
    assert "\\x1b]0;mine\\x07def f():\\r" in shown
    assert "\\u202e" in shown


@pytest.mark.parametrize(
    "operation",
    [
        ("a.b", 0, ""),
        ("a\x1b", 0, ""),
        ("a_0\n", 0, ""),
        ("", 0, ""),
        ("a" * 300, 0, ""),
        ("a_0", 3, ""),
        ("a_0", -1, ""),
        ("a_0", 0, "b()"),
    ],
)
def test_odd_operations_are_refused(operation):
    with pytest.raises(MessageError):
        listing_of(told(operation))


@pytest.fixture(scope="module")
def known():
    return know(zoo.build("gpt2"))


def query(known, path, *inside, **more):
    fields = {"model": "m", "fingerprint": known.fingerprint, "path": path, "inside": inside}
    return SourceQuery(**{**fields, **more})


def test_names_are_looked_up_and_nothing_else(known):
    answer = source_text(known, query(known, "transformer.h.0.mlp"))
    assert [name for name, *_ in answer.operations][:2] == ["self_c_fc_0", "self_act_0"]
    assert set(answer.kin) == {f"transformer.h.{n}.mlp" for n in range(zoo.LAYERS)}
    for path in ("transformer.h.9", "transformer.h.0.mlp.forward", "__class__", "\x1b"):
        with pytest.raises(UnknownPathError):
            source_text(known, query(known, path))
    for name in ("__class__", "forward", "self_c_fc_1"):
        with pytest.raises(UnknownPathError):
            source_text(known, query(known, "transformer.h.0.mlp", name))
    with pytest.raises(SourceError, match="known for a call only"):
        source_text(known, query(known, "transformer.h.0.mlp", sites=True))


@pytest.mark.parametrize("name", ["os.abort()", "a b", "", "a\n", "a" * 300])
def test_what_is_no_name_does_not_arrive(known, name):
    data = encode(query(known, "transformer.h.0.mlp", name))
    with pytest.raises((MessageError, msgspec.ValidationError)):
        decode(data, SourceQuery)
