"""What an operation means here, where that is not quite torch's own function.

    settled(torch.linalg.svd)(x)     # contiguous results, whatever the device's library gives
    FUNCTIONS = {name: own(name, function) ...}, in `table`

`optim.Adam` and its kin are one step of an optimiser (`optimizers`). The tables below name all
others. Everything else in the operation table is torch's function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from ..errors import GraphError
from .optimizers import stepped
from .results import flatten, rebuild, tree_of

Function = Callable[..., Any]

MAX_ELEMENTS = 2**33

_RESOLVED = frozenset({"adjoint", "Tensor.H.__get__", "Tensor.mH.__get__"})
_SETTLED = frozenset(
    {"cholesky_inverse", "cholesky_solve", "inverse", "lu_unpack", "orgqr", "ormqr", "pinverse"}
    | {"svd", "triangular_solve", "nonzero_static", "nn.functional.scaled_dot_product_attention"}
    | {f"nn.functional.max_unpool{n}d" for n in (1, 2, 3)}
)
_VIEWS = frozenset({"linalg.diagonal"})


def own(name: str, kind: str, function: Function) -> Function:
    """What `name` does in a graph, where `function` is what torch has under that name."""
    if kind == "hint":
        return itself
    if name.startswith("optim."):
        return stepped(function)
    if name in _RESOLVED:
        return resolved(function)
    if name in COUNTED:
        return bounded(function, COUNTED[name])
    algebra = name.startswith(("linalg.", "fft.")) and name not in _VIEWS
    return settled(function) if algebra or name in _SETTLED else function


def itself(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    """What a hint such as `Tensor.cuda` does in a graph: nothing."""
    return tensor


def settled(function: Function) -> Function:
    """`function` with results that are contiguous and never lazily conjugated.

    The strides of decompositions, transforms and attention differ between kernels and devices.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        leaves = [leaf.resolve_conj().resolve_neg().contiguous() for leaf in flatten(result)]
        return rebuild(tree_of(result), leaves)

    return call


def resolved(function: Function) -> Function:
    """`function`, whose one result is a view unless that would be a lazily conjugated one."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs).resolve_conj()

    return call


def bounded(function: Function, size: Callable[..., int]) -> Function:
    """`function`, refused when numbers in its arguments ask for too large a result."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        elements = size(*args, **kwargs)
        if elements > MAX_ELEMENTS:
            raise GraphError(f"{function.__name__}: {elements} elements; {MAX_ELEMENTS} at most")
        return function(*args, **kwargs)

    return call


def _bincount(input: Tensor, weights: Any = None, minlength: int = 0) -> int:
    return max(_classes(input), minlength)


def _one_hot(tensor: Tensor, num_classes: int = -1) -> int:
    return _classes(tensor) * tensor.numel() if num_classes == -1 else 0


def _classes(input: Tensor) -> int:
    return int(input.max()) + 1 if input.numel() else 0


def _repeated(
    input: Any = None, repeats: Any = None, dim: int | None = None, *, output_size: Any = None
) -> int:
    """Elements of the result; also checks `output_size`, on which torch relies unseen on a GPU."""
    given = [tensor for tensor in (input, repeats) if tensor is not None]
    repeated, counts = given[0], given[-1]  # one argument alone repeats its own positions
    if not isinstance(counts, Tensor) or counts.is_meta:
        return 0
    whole = repeated.numel()
    length = whole if dim is None else repeated.shape[dim]
    total = int(counts.sum()) * (length if counts.numel() == 1 else 1)
    if output_size not in (None, total):
        raise ValueError(f"repeat_interleave: output_size is {output_size}, repeats add to {total}")
    return total * (whole // max(length, 1))


COUNTED: dict[str, Callable[..., int]] = {
    "bincount": _bincount,
    "nn.functional.one_hot": _one_hot,
    "repeat_interleave": _repeated,
}
"""Elements of results whose size is a number in an argument."""
