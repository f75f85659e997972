"""The user's own line: the innermost frame that is neither ours nor PyTorch's."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TypeVar, cast

import torch

from weft.errors import RunError, WeftError
from weft.graph.check import ACTING, MAX_TEXT
from weft.graph.site import Where

_OURS = str(Path(__file__).parent.parent)
_TORCH = str(Path(torch.__file__).parent)
_USERS = (str(Path(_OURS) / "testing"), str(Path(_OURS) / "demo.py"))  # they use the public API
_PARTS = (f"{Path('/einops/')}/", f"{Path('/transformers/')}/", "/functools.py", "/contextlib.py")
_F = TypeVar("_F", bound=Callable[..., Any])
_IS_INTERNAL: dict[CodeType, bool] = {}


def _internal(code: CodeType) -> bool:
    found = _IS_INTERNAL.get(code)
    if found is None:
        file = code.co_filename
        inside = file.startswith((_OURS, _TORCH)) and not file.startswith(_USERS)
        found = inside or any(part in file for part in _PARTS) or file.startswith("<frozen")
        if len(_IS_INTERNAL) > 50_000:
            _IS_INTERNAL.clear()  # `exec` in a loop makes code objects without end
        _IS_INTERNAL[code] = found
    return found


def user_line() -> tuple[str, int]:
    """`(file, line)` of the user's innermost frame."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        known = _IS_INTERNAL.get(code)
        if known is False or (known is None and not _internal(code)):
            return code.co_filename, frame.f_lineno
        frame = frame.f_back
    return "<unknown>", 0


def line_of_error(error: BaseException) -> tuple[str, int] | None:
    """`(file, line)` of the user's innermost frame that an exception came through."""
    found, trace = None, error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not _internal(code):
            found = code.co_filename, trace.tb_lineno
        trace = trace.tb_next
    return found


def at_line(failure: BaseException, line: tuple[str, int], what: str) -> None:
    """Adds the user's line to an error that names none; `what` says what was done there."""
    if isinstance(failure, WeftError) and not isinstance(failure, RunError):
        failure.at(where(line))
    elif not isinstance(failure, RunError) or failure.line is None:
        failure.add_note(f"{what} {where(line)}")


def lined(function: _F) -> _F:
    """A function that users call: errors of ours that name no line get that of the call."""

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except WeftError as error:
            raise error.at(where(user_line()))  # noqa: B904 (it is the same error)

    return cast("_F", called)


def frames_within(file_ending: str) -> bool:
    """Whether any frame of the current stack lies in a file with this ending."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(file_ending):
            return True
        frame = frame.f_back
    return False


@lru_cache(maxsize=4096)
def where(line: tuple[str, int] | Where) -> Where:
    """The line with its text, where the source can be had."""
    if isinstance(line, Where):
        return line
    file, number = line
    return Where(_shown(file), number, _shown(linecache.getline(file, number).strip()))


def _shown(text: str) -> str:
    """What a graph may say of a line: no control characters, and not without end."""
    return ACTING.sub(" ", text)[:MAX_TEXT]
