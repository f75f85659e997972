"""Tensors with a history: how autograd is made to follow what happens to a tensor of the model.

    follow(h)         # from here on h has a grad_fn; it is the same tensor with the same bits

Weights ask for no gradients during a run (`still`), so without this nothing has a history. A tensor
that asked for gradients itself could not be changed in place any more, by the model or by an edit;
and one that was handed on before would have left no trace. So a tensor is followed from its making
on, or before (`Backward.since`), and what is followed first has minus zero added in place: no bit
changes, and it is the result of an operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import Function

from weft.errors import GradientError


def can_be_followed(tensor: torch.Tensor) -> bool:
    """Whether there are gradients of such a tensor."""
    return tensor.is_floating_point() or tensor.is_complex()


def follow(tensor: torch.Tensor) -> None:
    """Gives a tensor a history, if it has none."""
    if tensor.requires_grad or not can_be_followed(tensor):
        return
    nothing = torch.full((), -0.0, dtype=tensor.dtype, device=tensor.device, requires_grad=True)
    try:
        with torch.autograd._unsafe_preserve_version_counter(tensor):
            tensor.add_(nothing)
    except RuntimeError:  # a view of several, an expanded tensor, a dtype without addition
        tensor.requires_grad_()


def forget(tensors: list[torch.Tensor]) -> None:
    """After a run: what the model keeps of its tensors has no history any more."""
    for tensor in tensors:
        if tensor.is_leaf:
            tensor.requires_grad_(False)
        elif not tensor._is_view():
            tensor.detach_()


def edge_of(tensor: torch.Tensor) -> Any:
    """Where gradients of this version of a tensor arrive; None where none do."""
    return torch.autograd.graph.get_gradient_edge(tensor) if tensor.requires_grad else None


class _Wall(Function):
    """Lets values through, and no gradients: asking for one raises."""

    @staticmethod
    def forward(ctx: Any, refusal: Callable[[], Exception], value: Any, *_: Any) -> Any:
        ctx.refusal = refusal
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise ctx.refusal()


def walled(
    value: torch.Tensor, sources: list[torch.Tensor], refusal: Callable[[], GradientError]
) -> torch.Tensor:
    """`value`, through which no gradient can be had of `sources`, on which it depends."""
    found: Any = _Wall.apply(refusal, value, *sources)
    return found
