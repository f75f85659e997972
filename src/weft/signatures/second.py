"""What the second of two forwards looks like, where the first one leaves it a cache.

table = learn_second(module, lambda net: Rehearsal(net, ...), device)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from .learn import (
    Table,
    _draws_kept,
    _quiet,
    _state_kept,
    _table,
    _unseen,
    _values_kept,
    _Watch,
    weights_of,
)
from .shapes import Shapes
from .structure import take_apart
from .telling import Telling


class Pair(Protocol):
    """Two calls of a module, one after the other."""

    def begin(self) -> tuple[tuple, Mapping[str, Any]]: ...
    def next(self, output: Any) -> tuple[tuple, Mapping[str, Any]] | None: ...
    def close(self) -> None: ...


@_unseen
def learn_second(
    module: nn.Module,
    pair: Callable[[nn.Module], Pair],
    device: torch.device,
    integers: bool = True,
    telling: Telling | None = None,
) -> Table:
    """A fake pass of the second call. `integers` is that of `Shapes`, `telling` of `learn`."""
    mode = Shapes(weights_of(module), device, integers)
    with _quiet(), ExitStack() as stack:
        stack.enter_context(_state_kept(module))
        stack.enter_context(mode)
        return _second(module, pair, mode, telling)


@_unseen
def learn_second_by_running(
    module: nn.Module, pair: Callable[[nn.Module], Pair], telling: Telling | None = None
) -> Table:
    """A real pass of the second call."""
    with _quiet(), _draws_kept(module), _values_kept(module), _state_kept(module):
        return _second(module, pair, None, telling)


def _second(
    module: nn.Module,
    pair: Callable[[nn.Module], Pair],
    mode: Shapes | None,
    telling: Telling | None,
) -> Table:
    calls = pair(module)
    try:
        args, kwargs = calls.begin()
        following = calls.next(module(*args, **kwargs))
        assert following is not None  # there are two
        args, kwargs = following
        watch = _Watch(module)
        with (
            watch.installed(),
            nullcontext() if telling is None else telling.heard(module, watch.told),
        ):
            module(*args, **kwargs)
        given = [leaf for leaf in take_apart(following)[2] if isinstance(leaf, torch.Tensor)]
        origin = {} if mode is None else mode.origin
        return _table(module, watch.events, [*weights_of(module), *given], origin, [])
    finally:
        calls.close()
