"""`trace=False`: the model's own result, and no block.

out = model.trace(prompt, trace=False)                 # what its forward returns
ids = model.generate(prompt, max_new_tokens=3, trace=False)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft.errors import InputError, UnknownOptionError
from weft.trace.lines import user_line, where

from .options import split
from .save import save

if TYPE_CHECKING:
    from .handle import Handle
    from .language import LanguageModel


def outright(handle: Handle, given: Any, inputs: tuple, options: dict[str, Any]) -> Any:
    """What the model returns: as a block that saves `model.output` would bring it back."""
    _check(given, options, "trace")
    if not handle._takes_nothing and handle._is_empty(inputs, split(options)[1]):
        raise InputError(
            "trace=False: the model was given nothing",
            line=where(user_line()),
            fix="model.trace(prompt, trace=False)",
        )
    with handle._open(inputs, options, runs=True):
        found = save(handle.output)
    return found


def generated(handle: LanguageModel, given: Any, inputs: tuple, options: dict[str, Any]) -> Any:
    """The ids of prompt and answer, `[batch, pos]`."""
    _check(given, options, "generate")
    with handle.generate(*inputs, **options) as tracer:
        ids = tracer.result.save()
    return ids


def _check(given: Any, options: dict[str, Any], method: str) -> None:
    if given is not False:
        raise UnknownOptionError(
            f"trace is True or False, not {given!r}",
            line=where(user_line()),
            fix="trace=False for the result alone",
        )
    if options.get("blocking") is False:
        raise UnknownOptionError(
            "blocking=False: trace=False returns the result itself, which has to be waited for",
            line=where(user_line()),
            fix=f"open a block: `with model.{method}(..., blocking=False) as tracer:`",
        )
