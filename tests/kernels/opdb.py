"""Valid calls of the operations, drawn from PyTorch's own operator tests.

`calls(n)` runs the first `n` samples of each entry of `op_db` (as function, method and operator,
in place too) and gives every call of an operation of the table that was made: `Sample`s.
"""

from __future__ import annotations

import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from weft.kernels.table import NAMES

_STRIPPED = ("device", "requires_grad", "pin_memory")  # the recorder leaves these out, too
REFUSALS = (RuntimeError, TypeError, ValueError, IndexError, AssertionError, AttributeError)
DTYPES = (torch.float32, torch.complex64, torch.int64, torch.bool)


@dataclass(frozen=True)
class Sample:
    """One call of an operation; `name` is its name in the table."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: str

    def copy(self, device: str = "cpu") -> Sample:
        """The same call on tensors of its own, with the same strides."""
        return Sample(self.name, fresh(self.args, device), fresh(self.kwargs, device), self.source)


def fresh(arg: Any, device: str = "cpu") -> Any:
    """A structure with copies of its tensors."""
    if isinstance(arg, Tensor):
        return _clone(arg, device)
    if type(arg) in (tuple, list):
        return type(arg)(fresh(item, device) for item in arg)
    if isinstance(arg, dict):
        return {key: fresh(value, device) for key, value in arg.items()}
    if isinstance(arg, slice):
        return slice(*(fresh(part, device) for part in (arg.start, arg.stop, arg.step)))
    return arg


def tensors_in(arg: Any) -> list[Tensor]:
    """The tensors of an argument structure, in flattening order."""
    if isinstance(arg, Tensor):
        return [arg]
    if isinstance(arg, dict):
        arg = tuple(arg.values())
    elif isinstance(arg, slice):
        arg = (arg.start, arg.stop, arg.step)
    elif not isinstance(arg, (tuple, list)):
        return []
    return [tensor for item in arg for tensor in tensors_in(item)]


def _clone(tensor: Tensor, device: str) -> Tensor:
    """A copy with the same strides and offset, in a storage of its own."""
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        return tensor
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
    base = torch.zeros(tensor.storage_offset() + span + 1, dtype=tensor.dtype, device=device)
    copy = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    if 0 not in tensor.stride():
        return copy.copy_(tensor)
    source = tensor.as_strided((span + 1,), (1,), tensor.storage_offset())
    base[tensor.storage_offset() :].copy_(source)
    return copy


class _Witness(TorchFunctionMode):
    """Notes every outermost call of an operation of the table."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.seen: list[Sample] = []

    def __torch_function__(
        self, func: Callable[..., Any], _: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = NAMES.get(func)
        dense = all(t.layout is torch.strided for t in tensors_in((args, kwargs or {})))
        if name is not None and dense:
            named = {k: v for k, v in (kwargs or {}).items() if k not in _STRIPPED}
            self.seen.append(Sample(name, args, named, self.source).copy())
        return func(*args, **(kwargs or {}))


def calls(samples: int) -> Iterator[Sample]:
    """The calls that the first `samples` samples of each entry make, for each of `DTYPES`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        for entry in _op_db():
            for dtype in DTYPES:
                if dtype in entry.dtypes:
                    yield from _entry_calls(entry, dtype, samples)


def _entry_calls(entry: Any, dtype: torch.dtype, samples: int) -> Iterator[Sample]:
    # Not `entry.sample_inputs`, which walks the whole Python stack each time.
    drawn = entry.sample_inputs_func(entry, "cpu", dtype, False)
    for sample in islice(drawn, samples):
        for variant in _variants(entry):
            witness = _Witness(entry.full_name)
            arguments = fresh((sample.input, *sample.args))
            try:
                with witness:
                    variant(*arguments, **fresh(sample.kwargs))
            except REFUSALS:
                continue
            yield from witness.seen


def errors() -> Iterator[Sample]:
    """Calls that raise, from the lists of errors that torch's tests expect."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for entry in _op_db():
            wrong = entry.error_inputs_func(entry, "cpu") if entry.error_inputs_func else ()
            for sample in (error.sample_input for error in wrong):
                witness = _Witness(entry.full_name)
                try:
                    with witness:
                        entry.op(sample.input, *sample.args, **sample.kwargs)
                except REFUSALS:
                    yield from witness.seen[-1:]


def _variants(entry: Any) -> list[Callable[..., Any]]:
    own = [entry.op, entry.method_variant, entry.operator_variant]
    own += [entry.inplace_variant, entry.inplace_operator_variant]
    own += [alias.op for alias in entry.aliases]
    return [variant for variant in own if variant is not None]


def _op_db() -> list[Any]:
    """PyTorch's list. It wants the package `expecttest`, of which a base class is enough."""
    stub = types.ModuleType("expecttest")
    stub.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    sys.modules.setdefault("expecttest", stub)
    from torch.testing._internal.common_methods_invocations import op_db

    return op_db
