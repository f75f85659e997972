"""The family of any plain `nn.Module`: what the user gives is what the module gets."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from weft.families.call import ModelCall


def prepare_any(args: tuple[object, ...], kwargs: Mapping[str, object]) -> ModelCall:
    """Positional and keyword arguments as they are, none copied and none looked into.

    `batch` is the first dimension of the first tensor among them, or None. There are no tokens,
    hence no `length`, `lengths` or `mask`: whether a model's second dimension is a position, nobody
    knows.
    """
    return ModelCall(args=tuple(args), kwargs=dict(kwargs), batch=_batch(args, kwargs))


def _batch(args: tuple[object, ...], kwargs: Mapping[str, object]) -> int | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.shape[0] if value.ndim else None
    return None
