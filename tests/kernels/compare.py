"""Compares what `evaluate` says of a call with what the real function does."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from weft.errors import UnsupportedOperationError
from weft.graph.ops import OPS
from weft.kernels.abstract import MAKERS, Outcome, evaluate, flatten
from weft.kernels.aval import Aval, aval_of
from weft.kernels.forms import refuse
from weft.kernels.table import FUNCTIONS

from .opdb import Sample, tensors_in


def abstract(arg: Any) -> Any:
    """The arguments with an `Aval` in place of each tensor."""
    if isinstance(arg, Tensor):
        return aval_of(arg)
    if type(arg) in (tuple, list):
        return type(arg)(abstract(item) for item in arg)
    if isinstance(arg, dict):
        return {key: abstract(value) for key, value in arg.items()}
    if isinstance(arg, slice):
        return slice(abstract(arg.start), abstract(arg.stop), abstract(arg.step))
    return arg


def foreseen(sample: Sample) -> Outcome:
    """What `evaluate` says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return evaluate(sample.name, abstract(sample.args), abstract(sample.kwargs))


def real(sample: Sample, device: str = "cpu") -> tuple[Any, Sample, tuple[int, ...]]:
    """The result of the call, its arguments afterwards, and which of these it changed."""
    sample = sample.copy(device)
    tensors = tensors_in((sample.args, sample.kwargs))
    before = [tensor._version for tensor in tensors]
    maker = OPS[sample.name].kind in MAKERS or not tensors
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        kwargs = {**sample.kwargs, "device": device} if maker else sample.kwargs
        result = FUNCTIONS[sample.name](*sample.args, **kwargs)
    return result, sample, tuple(i for i, t in enumerate(tensors) if t._version != before[i])


def differences(outcome: Outcome, result: Any, sample: Sample, writes: tuple[int, ...]) -> list:
    """How an outcome differs from the real result of the same call, in words."""
    tensors = tensors_in((sample.args, sample.kwargs))
    leaves = flatten(result)
    if len(leaves) != len(outcome.leaves):
        return [f"{len(outcome.leaves)} tensors foreseen, {len(leaves)} returned"]
    said = {"writes": outcome.writes}
    seen: dict[str, Any] = {"writes": writes}
    for i, (leaf, foretold) in enumerate(zip(leaves, outcome.leaves, strict=True)):
        said |= {f"layout {i}": layout(foretold.aval), f"alias {i}": foretold.alias}
        seen |= {f"layout {i}": layout(leaf), f"alias {i}": _storage(leaf, tensors)}
        said[f"same {i}"] = foretold.same
        seen[f"same {i}"] = next((j for j, t in enumerate(tensors) if t is leaf), None)
    return [f"{key}: said {said[key]}, is {seen[key]}" for key in said if said[key] != seen[key]]


def layout(tensor: Tensor | Aval) -> tuple[Any, ...]:
    """Shape, dtype, and the strides that matter."""
    strides = tensor.stride if isinstance(tensor, Aval) else tensor.stride()
    shape = tuple(tensor.shape)
    if 0 in shape:
        return shape, tensor.dtype
    return shape, tensor.dtype, tuple(s for n, s in zip(shape, strides, strict=True) if n > 1)


def distinct(samples: Iterable[Sample]) -> list[Sample]:
    """The plain calls; of those that differ in their numbers only, one."""
    return list({signature(sample): sample for sample in samples if plain(sample)}.values())


def signature(sample: Sample) -> str:
    """The call without its numbers, as text."""
    tensors = tensors_in((sample.args, sample.kwargs))
    layouts = [(layout(tensor), tensor.storage_offset()) for tensor in tensors]
    return f"{sample.name} {abstract((sample.args, sample.kwargs))} {layouts}"


def _storage(leaf: Tensor, tensors: list[Tensor]) -> int | None:
    """The last argument whose storage the leaf shares."""
    storage = leaf.untyped_storage()._cdata
    shared = [i for i, t in enumerate(tensors) if t.untyped_storage()._cdata == storage]
    return shared[-1] if shared else None


def plain(sample: Sample) -> bool:
    """Whether the call has only plain dense tensors, and no kind that is answered elsewhere."""
    tensors = tensors_in((sample.args, sample.kwargs))
    lazy = any(t.is_conj() or t.is_neg() for t in tensors)
    return not lazy and OPS[sample.name].kind not in ("asked", "look", "hint")


def allowed(sample: Sample) -> bool:
    """Whether the form of the call is in the table."""
    try:
        refuse(sample.name, abstract(sample.args), abstract(sample.kwargs))
    except UnsupportedOperationError:
        return False
    return True
