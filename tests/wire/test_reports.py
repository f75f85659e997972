"""Errors as data: the same error where it is raised again, and nothing of the server's with it."""

from __future__ import annotations

import builtins
import traceback
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft import errors
from weft.errors import MessageError, RemoteError, RunError, ServerError, WeftError
from weft.wire.messages import ErrorReport, decode, encode
from weft.wire.reports import CLASSES, error_of, escaped, report_of, run_error, scrubbed

OURS = sorted(
    (c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, WeftError)),
    key=lambda c: c.__name__,
)
KINDS = [
    *("RuntimeError", "IndexError", "ValueError", "TypeError", "KeyError", "AttributeError"),
    *("ZeroDivisionError", "NotImplementedError", "MemoryError", "OverflowError"),
    "AssertionError",
]


def sent(error: BaseException, form: str = "json") -> WeftError:
    """What arrives."""
    return error_of(decode(encode(report_of(error, "r-1"), form), ErrorReport, form))


# Errors of Weft


@pytest.mark.parametrize("form", ["json", "msgpack"])
@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_an_error_of_ours_arrives_as_itself(kind, form):
    error = kind("what happened:\n  é", line="steer.py:3: x = y", fix="do this")
    got = sent(error, form)
    assert type(got) is kind
    assert (got.code, got.message, got.line, got.fix) == (
        *(kind.code, "what happened:\n  é"),
        *("steer.py:3: x = y", "do this"),
    )
    assert str(got) == str(error)


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_an_error_of_ours_arrives_without_what_it_has_not(kind):
    got = sent(kind("what happened"))
    assert (got.message, got.line, got.fix) == ("what happened", None, None)


def test_every_code_stands_for_one_class():
    assert len({kind.code for kind in OURS}) == len(OURS) == len(CLASSES)


def test_a_class_that_only_the_server_has_arrives_as_its_base():
    class DiskFullError(ServerError):
        code = "disk-full"

    assert type(sent(DiskFullError("x"))) is ServerError


def test_a_class_that_only_the_server_knows_arrives_as_a_remote_error():
    got = error_of(ErrorReport(code="brand-new", message="x", fix="y"))
    assert type(got) is RemoteError
    assert (got.message, got.fix) == ("x", "y")


def test_a_mistake_of_the_servers_names_the_request():
    got = error_of(report_of(ServerError("x"), "r-17"))
    assert "r-17" in "".join(traceback.format_exception(got))
    assert str(got) == "x"


# Exceptions of PyTorch and of models


@pytest.mark.parametrize("name", KINDS)
def test_an_exception_of_pythons_own_is_one_where_it_is_raised_again(name):
    kind = getattr(builtins, name)
    got = sent(kind("it is wrong"))
    assert isinstance(got, RunError) and isinstance(got, kind)
    assert (got.kind, got.code) == (name, "run")
    assert "it is wrong" in str(got)
    with pytest.raises(kind, match="it is wrong"):
        raise got


@pytest.mark.parametrize("name", KINDS)
def test_it_keeps_the_line_and_the_way_out(name):
    error = run_error(getattr(builtins, name)("wrong"), line="a.py:3: h[9]", fix="do this")
    got = sent(error)
    assert isinstance(got, getattr(builtins, name))
    assert str(got) == str(error)
    assert (got.line, got.fix) == ("a.py:3: h[9]", "do this")


def test_what_pytorch_says_arrives():
    with pytest.raises(IndexError) as caught:
        torch.zeros(3)[5]
    got = sent(caught.value)
    assert isinstance(got, IndexError)
    assert (
        got.message == str(caught.value) == "index 5 is out of bounds for dimension 0 with size 3"
    )


UNKNOWN = ["SystemExit", "KeyboardInterrupt", "BaseException", "WeftError", "eval", "os.system", ""]


@pytest.mark.parametrize("kind", [*UNKNOWN, "LinAlgError", "BlockingIOError", "Exception"])
def test_a_kind_outside_the_table_is_a_plain_run_error(kind):
    got = error_of(ErrorReport(code="run", message="x", kind=kind))
    assert type(got) is RunError
    assert got.kind == kind


def test_a_kind_counts_only_for_a_run_error():
    got = error_of(ErrorReport(code="message", message="x", kind="KeyError"))
    assert type(got) is MessageError


def test_an_exception_without_a_text_has_its_name():
    assert sent(AssertionError()).message == "AssertionError"


# What must not leave the server

PLACES = {
    "posix": "/srv/weights/secret/model.bin",
    "in quotes": "'/srv/my weights/secret.bin'",
    "in double quotes": '"/srv/my weights/secret.bin"',
    "with a line": "/srv/secret/model.py:113",
    "after a colon": "error:/srv/secret",
    "in brackets": "(/srv/secret/x)",
    "home": "~/secret/x",
    "root": "/secret",
    "relative": "secret/torch/nn/modules/linear.py",
    "upwards": "../../secret/model.safetensors",
    "windows": "C:\\Users\\secret\\model.bin",
    "windows in quotes": "'C:\\Program Files\\secret\\model.bin'",
    "windows with slashes": "D:/secret/model.bin",
    "a share": "\\\\host\\secret\\x",
    "a file address": "file:///srv/secret",
    "an address": "http://10.0.0.7:8000/secret",
    "memory": "<Thing object at 0x7f5ec2e75ec2>",
    "a second line": "\n  File x, line 3\nsecret",
    "a traceback": "\nTraceback (most recent call last):\n  File '/srv/secret.py'",
    "a carriage return": "\rsecret",
    "a line separator": "\u2028secret",
}


SECRETS = ["secret", "srv", "Users", "Traceback", "10.0.0.7", "7f5ec2e75ec2", "my weights"]


@pytest.mark.parametrize("place", PLACES)
def test_a_place_on_the_server_stays_there(place):
    text = f"cannot open {PLACES[place]}"
    for error in (RuntimeError(text), ValueError(text), KeyError(text)):
        data = encode(report_of(error), "json").decode()
        for part in SECRETS:
            assert part not in data, data
        assert "cannot open" in data


def test_the_file_of_an_error_of_the_system_is_not_told():
    with pytest.raises(OSError) as caught:
        Path("/srv/secret place/x").read_bytes()
    got = report_of(caught.value)
    assert (got.kind, got.message) == ("FileNotFoundError", "No such file or directory")


def test_no_traceback_and_no_cause_is_told():
    def fail():
        try:
            raise ValueError("the secret cause")
        except ValueError as cause:
            raise RuntimeError("it failed") from cause

    with pytest.raises(RuntimeError) as caught:
        fail()
    caught.value.add_note("a secret note")
    data = encode(report_of(caught.value), "json").decode()
    assert "secret" not in data and __file__ not in data and "fail()" not in data
    got = error_of(report_of(caught.value))
    assert got.__cause__ is None and got.__traceback__ is None


KEPT = [
    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
    "The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 1",
    "expected scalar type Float but found BFloat16 and/or Half",
    "probability tensor contains either `inf`, `nan` or element < 0",
    "einsum(): subscript i has size 3 for operand 1 which does not broadcast: 'ij,jk->ik'",
    "a ratio of 3/4, 1.5/2.5 and n / m",
]


@pytest.mark.parametrize("text", KEPT)
def test_what_tells_of_no_place_is_kept(text):
    assert scrubbed(RuntimeError(text)) == text


def test_a_long_text_is_cut():
    assert len(report_of(RuntimeError("x" * 10**6)).message) < 2000
    assert len(report_of(MessageError("x" * 10**6)).message) < 20_000


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_can_be_told(text):
    got = error_of(report_of(RuntimeError(text)))
    assert got.message.isprintable()
    assert scrubbed(RuntimeError(got.message)) is not None


# What must not reach a terminal

ATTACKS = {
    "colours": "\x1b[31mred",
    "a title": "\x1b]0;title\x07",
    "a link": "\x1b]8;;http://x\x1b\\x\x1b]8;;\x1b\\",
    "a C1 control": "\x9b31m",
    "a backspace": "ok\b\bno",
    "a carriage return": "ok\rno",
    "a bell": "\a",
    "nothing": "\0",
    "delete": "\x7f",
    "text from right to left": "\u202egnp.exe",
    "an isolate": "\u2066x",
    "a line separator": "a\u2028b",
    "an invisible space": "a\u200bb",
    "half a character": "\ud800",
    "a tab": "a\tb",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_acts_on_a_terminal_is_written_out(attack):
    text = ATTACKS[attack]
    report = ErrorReport(code="run", message=text, line=text, fix=text, kind=text, request_id=text)
    got = error_of(report)
    for shown in (str(got), got.message, got.line, got.fix, got.kind, repr(got)):
        assert all(c.isprintable() or c == "\n" for c in str(shown)), repr(shown)
        assert str(shown).isascii()


def test_a_line_and_a_kind_have_no_second_line():
    got = error_of(ErrorReport(code="run", message="a\nb", line="a\nb", fix="a\nb", kind="a\nb"))
    assert isinstance(got, RunError)
    assert (got.message, got.fix) == ("a\nb", "a\nb")
    assert (got.line, got.kind) == ("a\\nb", "a\\nb")


def test_a_note_is_written_out_too():
    got = error_of(ErrorReport(code="server", message="x", request_id="\x1b[31m"))
    assert "\x1b" not in "".join(traceback.format_exception(got))


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_escaped_text_is_printable_and_plain_text_stays(text):
    assert escaped(text, keep="").isprintable()
    if text.isprintable():
        assert escaped(text) == text
