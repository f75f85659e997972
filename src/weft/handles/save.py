"""`weft.save`: several values at once."""

from __future__ import annotations

from typing import Any

from weft.errors import OutsideTraceError
from weft.trace.current import current
from weft.trace.lines import user_line, where
from weft.trace.value import Value


def save(values: Any, name: str | None = None) -> Any:
    """Brings back every value in a list, tuple or dict (or one value), frozen as of this line.

    A list or dict may still grow in the block: what it holds when the block ends comes back too.
    Returns its argument; the values in it become plain tensors when the block has run.
    Raises `OutsideTraceError` outside a block.
    """
    recorder = current()
    if recorder is None:
        raise OutsideTraceError(
            "weft.save was called outside a block",
            line=where(user_line()),
            fix="call it inside `with model.trace(...):`",
        )
    if isinstance(values, Value):
        return values.save(name)
    return recorder.saves.tree(values, name)
