"""The family of any plain `nn.Module`: what the user gives is what the module gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from weft.families.call import ModelCall


def prepare_any(
    args: tuple[object, ...], kwargs: Mapping[str, object], batch_dim: int = 0
) -> ModelCall:
    """Positional and keyword arguments as they are, none copied and none looked into.

    `batch` is the size of dimension `batch_dim` of the first tensor among them, or None. There are
    no tokens, hence no `length`, `lengths` or `mask`: whether a model's second dimension is a
    position, nobody knows.
    """
    first = _first_tensor((*args, *kwargs.values()))
    batch = first.shape[batch_dim] if first is not None and first.ndim > batch_dim else None
    return ModelCall(args=tuple(args), kwargs=dict(kwargs), batch=batch)


def _first_tensor(values: Iterable[object]) -> Tensor | None:
    """Depth first, through tuples, lists and dicts."""
    for value in values:
        inside = value.values() if isinstance(value, dict) else value
        found = value if isinstance(value, Tensor) else None
        if isinstance(value, (tuple, list, dict)):
            found = _first_tensor(inside)  # type: ignore[arg-type]
        if found is not None:
            return found
    return None
