"""The words of refusals: limits by name, and errors that get the user's line on their way."""

from __future__ import annotations

from weft.errors import GraphError, LimitError, WeftError
from weft.settings import TEXTS
from weft.wire.reports import scrubbed

_SHORT = 200


def over(
    name: str,
    limit: str,
    asked: str,
    *,
    line: object = None,
    fix: str | None = None,
    kind: type[LimitError] = LimitError,
) -> LimitError:
    """The error for a limit of `weft.settings`."""
    return kind(f"{asked}; the server's {name} is {limit} ({TEXTS[name]})", line=line, fix=fix)


def at_line(error: WeftError, line: object) -> WeftError:
    """The same error with the user's line, where it has none."""
    if error.line is not None or line is None:
        return error
    return type(error)(error.message, line=line, fix=error.fix)


def foreign(what: str, error: Exception, line: object) -> GraphError:
    """An exception of torch's, or of a module's own code, as a refusal."""
    said = (scrubbed(error) or type(error).__name__)[:_SHORT]
    return GraphError(f"{what} cannot take these arguments: {said}", line=line)


def text_of(name: str) -> str:
    """A name from a graph, for messages."""
    return repr(name if len(name) <= _SHORT else f"{name[:_SHORT]}...")
