"""Errors as data: `report_of` where one happens, `error_of` where it is raised again.

Errors of Weft keep class, message, line and fix. Any other exception is PyTorch's or the model's
own: its class is told by name, of its text the first line, without paths and addresses. No
traceback ever travels. What comes from a server is text of a stranger: `escaped` makes it safe for
a terminal.

    report = report_of(error, request_id)
    raise error_of(report)     # a RunError that is an IndexError too, if that is what happened
"""

from __future__ import annotations

import re
from typing import Any

from weft import errors
from weft.errors import RemoteError, RunError, WeftError

from .messages import ErrorReport

MAX_TEXT = 10_000
MAX_FOREIGN = 1_000

CLASSES: dict[str, type[WeftError]] = {
    found.code: found
    for found in vars(errors).values()
    if isinstance(found, type) and issubclass(found, WeftError)
}
"""Every class of error, by its code."""


def report_of(error: BaseException, request_id: str | None = None) -> ErrorReport:
    """What an error says, as data that may leave the process."""
    if not isinstance(error, WeftError):
        error = run_error(error)
    return ErrorReport(
        code=_code(type(error)),
        message=_short(error.message, MAX_TEXT),
        line=None if error.line is None else _short(error.line, MAX_TEXT),
        fix=None if error.fix is None else _short(error.fix, MAX_TEXT),
        kind=error.kind if isinstance(error, RunError) else "",
        request_id=request_id,
    )


def run_error(error: BaseException, *, line: object = None, fix: str | None = None) -> RunError:
    """An exception that is not ours as one that is: its class by name, its text without paths."""
    kind = type(error).__name__
    return RunError(scrubbed(error) or kind, line=line, fix=fix, kind=kind)


def error_of(report: ErrorReport) -> WeftError:
    """The error that a report tells of, to be raised; its text is safe for a terminal."""
    said: dict[str, Any] = {
        "line": None if report.line is None else escaped(report.line, keep=""),
        "fix": None if report.fix is None else escaped(report.fix),
    }
    kind = CLASSES.get(report.code, RemoteError)
    if issubclass(kind, RunError):
        kind = _KINDS.get(report.kind, RunError)
        said["kind"] = escaped(report.kind, keep="")
    error = kind(escaped(report.message), **said)
    if report.request_id:
        error.add_note(f"the server's log has it under {escaped(report.request_id, keep='')}")
    return error


def escaped(text: str, keep: str = "\n") -> str:
    """`text` with all that could act on a terminal written out (`\\x1b`), `keep` apart."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


# -- exceptions that are not ours ----------------------------------------------------------------

_SECRETS = [
    (re.compile(pattern), put)
    for pattern, put in (
        (r"""\b[A-Za-z][\w+.-]*://[^\s'"]*""", "<address>"),
        (r"""(['"])(?:/|~|\\\\|[A-Za-z]:[\\/])[^'"]*\1""", r"\1<path>\1"),
        (r"""(?<![A-Za-z])[A-Za-z]:[\\/][^\s'"<>|,;]*|\\\\[^\s'"<>|,;]+""", "<path>"),
        (r"""(?<![\w/<])~?/[^\s'"<>|,;:()]+""", "<path>"),
        (r"""[^\s'"(/]*/[^\s'"]*\.[A-Za-z]\w*(?::\d+)?""", "<path>"),
        (r"0x[0-9A-Fa-f]{6,}", "0x..."),
    )
]
"""What tells of the machine: addresses; paths in quotes, bare, relative with an ending; memory."""


def scrubbed(error: BaseException) -> str:
    """The first line of an exception's text, without what tells of the machine it happened on."""
    line = next((line.strip() for line in _text(error).splitlines() if line.strip()), "")
    line = _short(escaped(line, keep=""), MAX_FOREIGN)
    for pattern, put in _SECRETS:
        line = pattern.sub(put, line)
    return line


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # the rest is the name of a file
    if isinstance(error, KeyError) and len(error.args) == 1:
        return str(error.args[0])  # its own text is the key in quotes, all on one line
    return str(error)


def _short(text: str, size: int) -> str:
    return text if len(text) <= size else text[:size] + "..."


def _code(kind: type[WeftError]) -> str:
    """The code that others know: that of the nearest class in `weft.errors`."""
    return next(base.code for base in kind.__mro__ if base in _KNOWN)  # type: ignore[union-attr]


_KNOWN = frozenset(CLASSES.values())


def _also(builtin: type[Exception]) -> type[RunError]:
    """A `RunError` that is one of Python's own exceptions too."""
    name = f"Run{builtin.__name__}"
    # KeyError would show its text as a quoted key
    body = {"__module__": __name__, "__doc__": RunError.__doc__, "__str__": Exception.__str__}
    return type(name, (RunError, builtin), body)


_KINDS: dict[str, type[RunError]] = {
    builtin.__name__: _also(builtin)
    for builtin in (
        IndexError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ZeroDivisionError,
        NotImplementedError,
        MemoryError,
        OverflowError,
        AssertionError,
        OSError,
        FileNotFoundError,
        PermissionError,
        TimeoutError,
        LookupError,
        ArithmeticError,
        FloatingPointError,
        RecursionError,
        NameError,
        ImportError,
        ModuleNotFoundError,
        EOFError,
        BufferError,
    )
}
"""A `RuntimeError` every `RunError` is."""
