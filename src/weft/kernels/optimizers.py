"""One step of an optimiser of `torch.optim`, as an operation: tensors in, tensors out.

    new = stepped(torch.optim.Adam)([p], [p.grad], [[step, mean, square]], lr=0.1)
    [p2, step2, mean2, square2]        # each parameter, then its state; nothing given is changed
    layout(torch.optim.Adam, torch.float32, {})     # ("step", False, ...), ("exp_avg", True, ...)

It runs PyTorch's own class, so its numbers are those of a step by hand. Only classes whose state is
tensors of the parameter's shape, or single numbers, are in the table (`OPTIMIZERS`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import GraphError

OPTIMIZERS = frozenset(
    ("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop")
    + ("Rprop", "SGD")
)
"""Classes of `torch.optim` of which a step is an operation."""
HOW = frozenset(("foreach", "fused", "capturable", "differentiable"))
"""Options that say how a step is computed, not what: where it runs decides."""


class Entry(NamedTuple):
    """One entry of a parameter's state: a tensor of its shape (`like`), or a single number."""

    name: str
    like: bool
    dtype: torch.dtype


def options_of(kind: Any) -> frozenset[str]:
    """The options that a step of this class takes."""
    return frozenset(inspect.signature(kind.__init__).parameters) - {"self", "params"} - HOW


def layout(kind: Any, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Entry, ...]:
    """The state that a parameter of a dtype has after a step. Raises what the class raises."""
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
    return _layout(kind, dtype, tuple(sorted(given.items())))


@lru_cache(256)
def _layout(kind: Any, dtype: torch.dtype, options: tuple[tuple[str, Any], ...]) -> Any:
    one = torch.zeros(2, dtype=dtype)  # a step on it shows the state
    optimizer = _prepared(kind, [one], [torch.ones_like(one)], [[]], dict(options))
    optimizer.step()
    return tuple(
        [Entry(name, value.ndim > 0, value.dtype) for name, value in optimizer.state[one].items()]
    )


def stepped(kind: Any) -> Callable[..., Any]:
    """A step of `kind` as a function of parameters, their gradients and states (empty: none yet).

    It gives a list: each parameter, followed by its state.
    """

    def step(
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        **options: Any,
    ) -> list[Tensor]:
        _check(kind, params, grads, states, options)
        if any(param.is_meta for param in params):
            return _foreseen(kind, params, options)
        mine = [param.detach().clone() for param in params]
        optimizer = _prepared(kind, mine, grads, states, options)
        optimizer.step()
        return [one for param in mine for one in (param, *optimizer.state[param].values())]

    return step


def _foreseen(kind: Any, params: Sequence[Tensor], options: dict[str, Any]) -> list[Tensor]:
    found = []
    for param in params:
        found.append(torch.zeros(param.shape, dtype=param.dtype, device="meta"))
        for entry in layout(kind, param.dtype, options):
            shape = param.shape if entry.like else ()
            found.append(torch.zeros(shape, dtype=entry.dtype, device="meta"))
    return found


def _prepared(
    kind: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    options: dict[str, Any],
) -> Any:
    optimizer = kind(params, **options)
    for param, grad, state in zip(params, grads, states, strict=True):
        param.grad = grad.detach().clone()
        if state:
            names = [entry.name for entry in layout(kind, param.dtype, options)]
            pairs = zip(names, state, strict=True)
            optimizer.state[param] = {name: _own(name, value) for name, value in pairs}
    return optimizer


def _own(name: str, value: Tensor) -> Tensor:
    """A state of its own, where the class has it: steps are counted on the CPU."""
    value = value.detach()
    return value.to("cpu", copy=True) if name == "step" else value.clone()


def _check(
    kind: Any,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    options: dict[str, Any],
) -> None:
    """Raises `GraphError` for what is no step of this class."""
    name = f"torch.optim.{kind.__name__}"
    lists = (params, grads, states, *states) if isinstance(states, (list, tuple)) else (states,)
    if not all(isinstance(one, (list, tuple)) for one in lists):
        raise GraphError(f"{name}: a step takes lists of parameters, gradients and states")
    if not params or not len(params) == len(grads) == len(states):
        raise GraphError(f"{name}: each parameter has one gradient and one state")
    if odd := sorted(options.keys() - options_of(kind)):
        raise GraphError(f"{name}: a step has no option {odd[0]!r}")
    if not all(_is_plain(value) for value in options.values()):
        raise GraphError(f"{name}: options of a step are numbers")
    for param, grad, state in zip(params, grads, states, strict=True):
        _check_one(name, param, grad)
        entries = layout(kind, param.dtype, options)
        types = [(param.shape if e.like else torch.Size(()), e.dtype) for e in entries]
        if state and [(one.shape, one.dtype) for one in state] != types:
            raise GraphError(f"{name}: the state is not that of a parameter {list(param.shape)}")


def _check_one(name: str, param: Any, grad: Any) -> None:
    if not (isinstance(param, Tensor) and isinstance(grad, Tensor)):
        raise GraphError(f"{name}: parameters and gradients are tensors")
    if (param.shape, param.dtype) != (grad.shape, grad.dtype) or not param.is_floating_point():
        raise GraphError(f"{name}: a gradient is like its parameter, of a floating dtype")


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(isinstance(one, (int, float)) for one in value)
    return value is None or isinstance(value, (bool, int, float))
