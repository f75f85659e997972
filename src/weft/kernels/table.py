"""Names and functions: the closed table of `graph.ops`, resolved on the torch that is installed.

    FUNCTIONS["softmax"]           # what the name does: the builtin torch.softmax
    NAMES[torch.Tensor.softmax]    # "softmax": what __torch_function__ hands over, by name
    reason(torch.Tensor.data_ptr)  # "it reaches the memory behind a tensor"

A name that this version of torch lacks is in neither dict. Nothing else is looked up by name: a
graph can reach the functions of this table and no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import resolve_name

from ..graph.ops import ALIASES, EXCLUDED, OPS
from .own import own


def _resolve(name: str) -> Callable[..., Any] | None:
    """The function of a dotted name below torch, or None."""
    found: Any = torch
    for part in name.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    return found


def _function(name: str) -> Callable[..., Any] | None:
    """What a name of the table does; None where this torch lacks it."""
    found = _resolve(name)
    return None if found is None else own(name, OPS[name].kind, found)


def _functions() -> dict[str, Callable[..., Any]]:
    found = {name: _function(name) for name in OPS}
    return {name: function for name, function in found.items() if function is not None}


def _spellings() -> Iterator[tuple[str, str]]:
    """Every dotted name that means an operation, with the operation's own name."""
    yield from ((name, name) for name in FUNCTIONS)
    yield from ((alias, name) for alias, name in ALIASES.items() if name in FUNCTIONS)
    for method, function in _plain_methods():
        name = ALIASES.get(function, function)
        if name in FUNCTIONS:
            yield method, name


def _plain_methods() -> Iterator[tuple[str, str]]:
    """`(Tensor.x, x)` for each method that the table does not mention."""
    for name in dir(torch.Tensor):
        method = f"Tensor.{name}"
        listed = any(method in table for table in (OPS, ALIASES, EXCLUDED))
        if callable(getattr(torch.Tensor, name)) and not listed:
            yield method, name


def _names() -> dict[Callable[..., Any], str]:
    found = ((_resolve(spelling), name) for spelling, name in _spellings())
    return {function: name for function, name in found if function is not None}


def _reasons() -> dict[Callable[..., Any], str]:
    rows = [*EXCLUDED.items()]
    rows += [(method, EXCLUDED[name]) for method, name in _plain_methods() if name in EXCLUDED]
    found = ((_resolve(name), text) for name, text in rows)
    return {f: text for f, text in found if f is not None and f not in NAMES}


FUNCTIONS: dict[str, Callable[..., Any]] = _functions()
NAMES: dict[Callable[..., Any], str] = _names()
REASONS: dict[Callable[..., Any], str] = _reasons()


def reason(function: Callable[..., Any]) -> str | None:
    """Why a function is not in the table, or None where it is."""
    if function in NAMES:
        return None
    return REASONS.get(function, "it is not in the operation table")


def spelled(function: Callable[..., Any]) -> str:
    """How a function is written in user code, for messages: `torch.Tensor.data_ptr`."""
    return resolve_name(function) or getattr(function, "__qualname__", repr(function))
