"""Abstract results by operation and arguments, remembered: the same call comes many times."""

from __future__ import annotations

from typing import Any

from weft.kernels.abstract import Outcome, OutcomeCache
from weft.kernels.aval import Aval
from weft.kernels.quick import outcome

_KNOWN: OutcomeCache[Outcome] = OutcomeCache(2**14)
_LONG, _MANY = 256, 64
"""What is larger is not remembered: strangers choose what comes here."""
_PLAIN = frozenset((bool, int, str, type(None)))


def outcome_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
    """What `kernels.quick.outcome` says. Raises the same."""
    key: list[Any] = [name]
    if not _add(args, key) or not _add(kwargs, key):
        return outcome(name, args, kwargs)
    whole = tuple(key)
    found = _KNOWN.get(whole)
    if found is None:
        found = outcome(name, args, kwargs)
        if len(whole) <= _LONG and len(found.leaves) <= _MANY:
            _KNOWN.put(whole, found)
    return found


def _add(arg: Any, key: list[Any]) -> bool:
    """Adds all that says which argument this is, types included; False where it cannot be said."""
    kind = type(arg)
    if kind is Aval:
        key.append(arg)
    elif kind in _PLAIN:
        key += (kind, arg)
    elif kind is float:
        key += (kind, arg.hex())  # -0.0 is not 0.0, and nan is nan
    elif kind is tuple or kind is list:
        key += (kind, len(arg))
        return len(arg) <= 64 and all(_add(item, key) for item in arg)
    elif kind is dict:
        key += (kind, len(arg), *arg)
        return all(_add(item, key) for item in arg.values())
    elif kind is slice:
        key.append(kind)
        return all(_add(part, key) for part in (arg.start, arg.stop, arg.step))
    else:
        key += (kind, str(arg))  # a dtype, an ellipsis, a size
    return True
