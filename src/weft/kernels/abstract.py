"""What a call would return, without its numbers: shapes, dtypes, shared storage, writes.

    outcome = evaluate("topk", (intern_of_h, 2), {})
    outcome.leaves[0].aval          # float32[1, 9, 2]
    rebuild(outcome.tree, values)   # torch.return_types.topk(values[0], values[1])

The real function runs on meta tensors, so errors of shape and dtype are those of torch. Tensor
arguments are numbered in flattening order: args, then kwargs, depth first.

Not here: which forms of a call are allowed (`forms`), what a call costs (`cost`), and the numbers
(`execute`).
"""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import GraphError, UnsupportedOperationError
from ..graph.ops import EFFECTS, OPS
from .aval import Aval, aval_of, filled
from .fitting import refuse_cast
from .forms import avals_in, needs_numbers, refuse, without_masks
from .own import MAX_ELEMENTS
from .results import Plain, Tree, flatten, rebuild, tree_of
from .shapes import SHAPES
from .table import FUNCTIONS

__all__ = [
    "OUTCOMES",
    "DataDependentError",
    "MAX_ELEMENTS",
    "LeafOut",
    "Outcome",
    "OutcomeCache",
    "Plain",
    "evaluate",
    "flatten",
    "rebuild",
]

MAX_LEAVES = 2**16
MAKERS = frozenset({"factory", "random_factory"})


class DataDependentError(Exception):
    """The result's shape, or the result itself, depends on numbers that are not known yet."""


class LeafOut(NamedTuple):
    """One tensor of a result.

    `alias` is the tensor argument whose storage it shares, `same` the one that it is.
    """

    aval: Aval
    alias: int | None
    same: int | None


class Outcome(NamedTuple):
    """A result: its structure (see `rebuild`), its tensors, the arguments changed in place."""

    tree: Tree
    leaves: tuple[LeafOut, ...]
    writes: tuple[int, ...]


# Evaluation


def evaluate(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], limit: int = MAX_ELEMENTS
) -> Outcome:
    """What calling `name` gives, where `Aval`s stand for tensors (in containers and slices too).

    Raises what torch raises for arguments that do not fit, `UnsupportedOperationError` for a form
    of the call that is not in the table, `WriteMismatchError` for a result that does not go into a
    tensor in place, `DataDependentError` where numbers must be known first,
    and `GraphError` for a result of more than `limit` elements.
    """
    if name not in FUNCTIONS:
        raise UnsupportedOperationError(f"torch.{name} is not in the operation table")
    refuse(name, args, kwargs)
    refuse_cast(name, args, kwargs)
    if needs_numbers(name, args, kwargs):
        raise DataDependentError(f"torch.{name} needs numbers that are not known yet")
    if OPS[name].kind in MAKERS or (name == "normal" and not avals_in((args, kwargs))):
        kwargs = {**kwargs, "device": "meta"}
    errors: list[Exception] = []
    for choice in without_masks(name, args):
        try:
            return _outcome(name, choice, kwargs, limit)
        except (RuntimeError, IndexError, AssertionError) as error:
            errors.append(_read(error, name))
    raise errors[0]


def _read(error: Exception, name: str) -> Exception:
    """The error to raise for one that torch raised on meta tensors."""
    text = str(error)
    if "cannot be called on meta" in text or "Cannot copy out of meta" in text:
        return DataDependentError(f"torch.{name} needs numbers that are not known yet")
    return TypeError(f"torch.{name}: {text}") if isinstance(error, AssertionError) else error


def _outcome(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], limit: int) -> Outcome:
    tensors: list[Tensor] = []

    def fresh(aval: Aval) -> Tensor:
        tensors.append(aval.fresh())
        return tensors[-1]

    with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
        args, kwargs = filled((args, kwargs), fresh)
        before = [tensor._version for tensor in tensors]
        result = SHAPES.get(name, FUNCTIONS[name])(*args, **kwargs)
    if result is NotImplemented:
        raise TypeError(f"torch.{name} does not take these arguments")
    writes = tuple(i for i, tensor in enumerate(tensors) if tensor._version != before[i])
    if writes and OPS[name].kind not in EFFECTS:
        raise UnsupportedOperationError(
            f"torch.{name} would change an argument when called like this",
            fix="leave out inplace=True (or max_norm), or use the in-place method on the value",
        )
    results = flatten(result)
    _check(name, results, limit)
    storages = {tensor.untyped_storage()._cdata: i for i, tensor in enumerate(tensors)}
    objects = {id(tensor): i for i, tensor in enumerate(tensors)}
    leaves = tuple(
        LeafOut(aval_of(leaf), storages.get(leaf.untyped_storage()._cdata), objects.get(id(leaf)))
        for leaf in results
    )
    return Outcome(tree_of(result), leaves, writes)


def _check(name: str, results: list[Tensor], limit: int) -> None:
    """Refuses results that are too large or not plain dense tensors."""
    if len(results) > MAX_LEAVES:
        raise GraphError(f"torch.{name} would return {len(results)} tensors; {MAX_LEAVES} at most")
    for leaf in results:
        if leaf.numel() > limit:
            raise GraphError(
                f"torch.{name} would make {leaf.numel()} elements; {limit} at most",
                fix="work on a slice of the tensor",
            )
        if leaf.layout is not torch.strided or leaf.device.type != "meta":
            raise UnsupportedOperationError(f"torch.{name} would not return a dense tensor")
        if leaf.is_conj() or leaf.is_neg():
            raise UnsupportedOperationError(
                f"torch.{name} gives a lazily conjugated view", fix="use torch.conj_physical first"
            )


T = TypeVar("T")


class OutcomeCache(Generic[T]):
    """Outcomes by the caller's own keys; forgets the older half when full.

    Safe to share between threads: each step is one operation of a dict.
    """

    def __init__(self, bound: int = 2**16) -> None:
        self._bound = bound
        self._found: dict[Any, T] = {}
        self.get = self._found.get

    def put(self, key: Any, outcome: T) -> None:
        if len(self._found) >= self._bound:
            for old in list(self._found)[: self._bound // 2]:
                self._found.pop(old, None)
        self._found[key] = outcome

    def __len__(self) -> int:
        return len(self._found)


OUTCOMES: OutcomeCache[Outcome] = OutcomeCache()
