"""A mark of a model's weights: equal for copies of one model, other for other numbers in it.

    mark = weights_mark(net)                  # 64 hex digits, or None for weights on meta

It is a SHA-256 over a few numbers of each parameter, so it costs little and moves few bytes; a
change of single numbers elsewhere is not seen, training and another checkpoint are. A client that
has weights of its own sends it along, and a server with others refuses: its numbers would not be
those of the model that the user has at hand.
"""

from __future__ import annotations

import hashlib
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from weft.errors import OtherModelError

PROBES = 16
"""Numbers looked at in each parameter."""

_KNOWN: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def weights_mark(net: nn.Module) -> str | None:
    """The mark; found again until a parameter was replaced or changed in place."""
    parameters = list(net.named_parameters())
    if any(tensor.is_meta for _, tensor in parameters):
        return None
    state = [(id(tensor), 0 if tensor.is_inference() else tensor._version, tensor.data_ptr())
             for _, tensor in parameters]  # fmt: skip
    known = _KNOWN.get(net)
    if known is None or known[0] != state:
        known = _KNOWN[net] = state, _mark(parameters)
    return known[1]


def refuse_other_weights(net: nn.Module, theirs: str | None) -> None:
    """Raises `OtherModelError` where the client has the model with other weights."""
    if theirs is not None and theirs != weights_mark(net):
        raise OtherModelError(
            "the server's model has other weights than the one here (it was trained, edited, or "
            "comes from another checkpoint)",
            fix="run the block here, or open the server's model by its name with remote=",
        )


def _mark(parameters: list[tuple[str, nn.Parameter]]) -> str:
    seen = hashlib.sha256()
    with torch.no_grad():
        for name, tensor in parameters:
            seen.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            seen.update(_probes(tensor))
    return seen.hexdigest()


def _probes(tensor: torch.Tensor) -> bytes:
    """The bytes of numbers spread evenly over the tensor, in its row-major order."""
    if not tensor.numel():
        return b""
    count = min(PROBES, tensor.numel())
    places = [(tensor.numel() - 1) * number // max(count - 1, 1) for number in range(count)]
    found = tensor.detach().take(torch.tensor(places, device=tensor.device)).cpu()
    return found.view(torch.uint8).numpy().tobytes()
