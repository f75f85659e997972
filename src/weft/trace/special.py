"""Torch calls that need more than a table entry, and small walks over arguments."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .arguments import TensorBound
from .away import filled
from .lines import user_line
from .value import Sizes, Value

if TYPE_CHECKING:
    from .recorder import Recorder

HINTS = frozenset(("device", "non_blocking", "pin_memory", "requires_grad"))
"""Keywords about placement: they do not reach a graph."""

SIZE_READS = frozenset(
    (
        "Tensor.size",
        "Tensor.__len__",
        "Tensor.nelement",
        "Tensor.nbytes.__get__",
        "Tensor.shape.__get__",
        "Tensor.stride",
        "is_same_size",
        "numel",
    )
)
"""Answers that bind a graph to the sizes it was recorded with."""

_WARNED: dict[Any, Any] = {}
"""Lines that were warned, so that each is once."""

HOLDS_LISTS = frozenset((torch.tensor, torch.as_tensor, torch.asarray))


def _to(recorder: Recorder, func: Any, args: tuple, kwargs: dict) -> Any:
    """`x.to(...)`: devices are hints; a dtype, or another tensor's dtype, is recorded."""
    value, *rest = args
    dtype = kwargs.get("dtype")
    other = kwargs.get("other")
    for arg in (*rest, other):
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, torch.Tensor):
            dtype = arg.dtype
    copy = kwargs.get("copy", False) or (len(rest) > 2 and rest[-1] is True)
    if dtype is None or dtype == value.dtype:
        return value.clone() if copy else value
    return recorder.operations.record("Tensor.to", func, (value, dtype), {})


def _tensor(recorder: Recorder, func: Any, args: tuple, kwargs: dict) -> Any:
    """`torch.tensor` and its kin on values: a copy, a stack, or the value itself."""
    data = args[0] if args else kwargs["data"]
    dtype = kwargs.get("dtype")
    value = _stacked(data)
    if func is torch.tensor and value is data:
        value = value.clone()
    return value if dtype is None else value.to(dtype)


def _stacked(data: Any) -> Any:
    if isinstance(data, torch.Tensor):
        return data
    if isinstance(data, (list, tuple)):
        return torch.stack([torch.as_tensor(_stacked(item)) for item in data])
    return torch.tensor(data)


def _numbers(recorder: Recorder, index: Any) -> Any:
    """An index whose slice bounds are numbers; a value there is looked at, as PyTorch would."""
    if isinstance(index, slice):
        bounds = (index.start, index.stop, index.step)
        return slice(*[_number(recorder, bound) for bound in bounds])
    if isinstance(index, tuple) and any(isinstance(item, slice) for item in index):
        return tuple([_numbers(recorder, item) for item in index])
    return index


def _number(recorder: Recorder, bound: Any) -> Any:
    return int(recorder.number(bound)) if isinstance(bound, torch.Tensor) else bound


def _getitem(recorder: Recorder, func: Any, args: tuple, kwargs: dict) -> Any:
    value, index = args
    if isinstance(value, Value) and value._bare is not None and type(index) is int and index == 0:
        warnings.warn_explicit(
            f"{value._bare}.output is a tensor, so [0] takes its first batch row. In older "
            f"versions of transformers this layer returned a tuple: write .output for the hidden "
            f"states, .output[:1] for the first row",
            FutureWarning,
            *user_line(),
            registry=_WARNED,
        )
    try:
        part = recorder.operations.record("Tensor.__getitem__", func, args, kwargs)
    except TensorBound:
        index = _numbers(recorder, index)
        part = recorder.operations.record("Tensor.__getitem__", func, (value, index), kwargs)
    if type(part) is Value and type(value) is Value and part._family is value._family:
        part._part = (value._ref, index)
    return part


def _setitem(recorder: Recorder, func: Any, args: tuple, kwargs: dict) -> Any:
    """`x[i] = v`; the second half of `x[i] += v` stores a view into itself: nothing to do."""
    target, index, value = args
    if type(value) is Value and type(target) is Value and value._part is not None:
        whole, own = value._part
        both = value._rec is recorder and target._rec is recorder
        if both and whole == target._ref and _same_index(own, index):
            return None
    try:
        return recorder.operations.record("Tensor.__setitem__", func, args, kwargs)
    except TensorBound:
        args = (target, _numbers(recorder, index), value)
        return recorder.operations.record("Tensor.__setitem__", func, args, kwargs)


def _same_index(one: Any, other: Any) -> bool:
    """Whether two indices are the same, tensors in them by identity."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same_index, one, other))
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return one is other
    return type(one) is type(other) and one == other


def _iter(recorder: Recorder, func: Any, args: tuple, kwargs: dict) -> Any:
    value = args[0]
    if value.ndim == 0:
        raise TypeError("iteration over a 0-d tensor")
    if isinstance(value, Value):
        recorder.bind(value, (0,))
    return iter(value.unbind(0))


_NUMBERS = (torch.Tensor, int, float, complex, np.ndarray, np.generic)


def _compare(recorder: Recorder, func: Any, args: tuple, kwargs: dict) -> Any:
    """`x == y`; what is no number leaves the answer to Python, as in PyTorch (`x == None`)."""
    if not isinstance(args[1], _NUMBERS):
        return NotImplemented
    name = "eq" if func is torch.Tensor.__eq__ else "ne"
    return recorder.operations.record(name, func, args, kwargs)


def _gradients(recorder: Recorder, func: Any, args: tuple, kwargs: dict) -> Any:
    """`torch.autograd.grad` and `Tensor.backward` on values."""
    gradients = recorder.gradients
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if func is torch.autograd.grad:
        return gradients.autograd_grad(*args, **kwargs)
    return gradients.backward(*args, **kwargs)


def _wanted(recorder: Recorder, func: Any, args: tuple, kwargs: dict) -> Any:
    """`requires_grad_()` and `retain_grad()`: every value has a gradient for who asks."""
    if not isinstance(args[0], Value):
        return func(*args, **kwargs)
    return args[0] if func is torch.Tensor.requires_grad_ else None


Handler = Callable[["Recorder", Any, tuple, dict], Any]

HANDLERS: dict[Any, Handler] = {
    torch.Tensor.to: _to,
    torch.tensor: _tensor,
    torch.as_tensor: _tensor,
    torch.asarray: _tensor,
    torch.Tensor.__getitem__: _getitem,
    torch.Tensor.__setitem__: _setitem,
    torch.Tensor.__iter__: _iter,
    torch.Tensor.__eq__: _compare,
    torch.Tensor.__ne__: _compare,
    torch.autograd.grad: _gradients,
    torch.Tensor.backward: _gradients,
    torch.Tensor.requires_grad_: _wanted,
    torch.Tensor.retain_grad: _wanted,
    torch.Tensor.requires_grad.__set__: _wanted,  # type: ignore[attr-defined]
}


_CHECKPOINTING = torch._C._autograd._top_saved_tensors_default_hooks  # type: ignore[attr-defined]


def _is_on(kind: str) -> Callable[[torch.device], bool]:
    return lambda device: device.type == kind


ASKED: dict[str, Callable[[torch.device], Any]] = {
    "get_device": lambda device: -1 if device.type == "cpu" else device.index or 0,
    "Tensor.device.__get__": lambda device: device,
    "Tensor.is_leaf.__get__": lambda device: True,
    "Tensor.is_pinned": lambda device: False,
    "Tensor.requires_grad.__get__": lambda device: False,
    **{
        f"Tensor.is_{kind}.__get__": _is_on(kind)
        for kind in ("cpu", "cuda", "ipu", "maia", "meta", "mps", "mtia", "vulkan", "xla", "xpu")
    },
}
"""What a value answers about itself that is not in its numbers."""


TRANSFORMS = "torch.func (vmap, grad, ...)"


def active_transform() -> str | None:
    """The name of an active PyTorch transform that a recorder cannot see through."""
    if torch._C._functorch.maybe_current_level() is not None:  # type: ignore[attr-defined]
        return TRANSFORMS
    if torch._C._is_any_autocast_enabled():
        return "torch.autocast"
    if _CHECKPOINTING(True) is not None:
        return "torch.utils.checkpoint"
    if torch.compiler.is_compiling():
        return "torch.compile"
    return None


def tensors_in(item: Any, found: list[torch.Tensor]) -> None:
    """Collects every tensor among (nested) arguments, in the order of `arguments.abstract`."""
    if isinstance(item, torch.Tensor):
        found.append(item)
    elif isinstance(item, Sizes):
        return
    elif isinstance(item, (tuple, list)):
        for one in item:
            tensors_in(one, found)
    elif isinstance(item, dict):
        for one in item.values():
            tensors_in(one, found)


def forward(item: Any) -> Any:
    """`item` with forwarding handles replaced by their real tensors."""
    if isinstance(item, Value) and (real := filled(item)) is not None:
        return real
    if isinstance(item, (tuple, list)):
        made = [forward(one) for one in item]
        return made if isinstance(item, list) else tuple(made)
    if isinstance(item, dict):
        return {key: forward(one) for key, one in item.items()}
    return item


def find_unreal(item: Any) -> Value | None:
    """The first handle without numbers in a structure."""
    found: list[torch.Tensor] = []
    tensors_in(item, found)
    return next((one for one in found if isinstance(one, Value)), None)
