"""What an operation makes of layouts, remembered: the layers of a model ask the same many times.

    asked = asked_of(func, args, kwargs, faked)        # None: of this call nothing is remembered
    made = REMEMBERED.get(asked.key)                   # None: not yet
    result = made.anew(asked.tensors, mode)

`FakeTensorMode` takes 0.15 ms for an operation, and most of it goes into finding out that it has
seen the call before; its memory of them grows without end. Here a call is looked up in a tenth of
that, in a table that forgets.

A key says all that a result on layouts may hang on: the operation, every argument that is no tensor
with its type, and of each tensor sizes, strides, offset, dtype, device, the bytes of its storage,
its dispatch keys, whether it requires gradients, and which of the others share its storage or are
itself. A result is layouts again, and which argument's storage each shares. So nothing of any
tensor's numbers is held or looked at, and where a result hangs on numbers PyTorch raises, which is
not remembered.

Not remembered: operations of others than PyTorch, whose fakes may do as they like, calls that
change the sizes of an argument (`torch.add(x, y, out=torch.empty(0))`), and results that are no
plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from weft.kernels.abstract import OutcomeCache

_PLAIN = frozenset(
    (
        bool,
        complex,
        float,
        int,
        str,
        torch.device,
        torch.dtype,
        torch.layout,
        torch.memory_format,
        type(None),
    )
)
_MANY = 64
"""Calls and results with more parts are not remembered."""


class Asked(NamedTuple):
    """A call: what its result hangs on, and its tensors, all fake, in order."""

    key: tuple[Any, ...]
    tensors: list[FakeTensor]


class Part(NamedTuple):
    """One tensor of a result: argument number `same`, or a tensor on the storage of number `on`
    (None: on its own)."""

    same: int | None
    on: int | None = None
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None

    def anew(self, tensors: list[FakeTensor], mode: FakeTensorMode) -> FakeTensor:
        """Such a tensor again, for a call with these."""
        if self.same is not None:
            return tensors[self.same]
        if self.on is None:
            elem = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        else:
            storage = tensors[self.on].untyped_storage()
            elem = torch.empty(0, dtype=self.dtype, device="meta")
            elem.set_(storage, self.offset, self.shape, self.stride)  # type: ignore[call-overload]
        return FakeTensor(mode, elem, self.device)


class Made(NamedTuple):
    """A result: one part, or several in a `container`."""

    parts: tuple[Part | None, ...]
    container: type | None

    def anew(self, tensors: list[FakeTensor], mode: FakeTensorMode) -> Any:
        """The result of a call with these tensors."""
        if self.container is None:
            return self.parts[0].anew(tensors, mode)  # type: ignore[union-attr]
        return self.container(
            [None if part is None else part.anew(tensors, mode) for part in self.parts]
        )


REMEMBERED: OutcomeCache[Made] = OutcomeCache(2**13)


# -- a call ----------------------------------------------------------------------------------------


def asked_of(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    faked: Callable[[Any], Any],
) -> Asked | None:
    """A call, with `faked(leaf)` in place of each argument; None where nothing can be remembered
    of it."""
    if not _is_steady(func):
        return None
    tensors: list[FakeTensor] = []
    key: list[Any] = [func, torch.get_default_dtype(), torch._C._get_default_device()]
    if not _add(args, key, tensors, faked):
        return None
    if kwargs:
        key += kwargs
        if not _add(tuple(kwargs.values()), key, tensors, faked):
            return None
    if len(tensors) > 1:
        storages: dict[int, int] = {}
        selves: dict[int, int] = {}
        for number, tensor in enumerate(tensors):
            key.append(storages.setdefault(tensor.untyped_storage()._cdata, number))
            key.append(selves.setdefault(id(tensor), number))
    return Asked(tuple(key), tensors)


@lru_cache(4096)
def _is_steady(func: Any) -> bool:
    """Whether an operation is PyTorch's own, and not one that is there to change sizes."""
    return (
        type(func) is OpOverload
        and func.namespace in ("aten", "prims")
        and torch.Tag.inplace_view not in func.tags
    )


def _add(args: Any, key: list[Any], tensors: list[FakeTensor], faked: Callable[[Any], Any]) -> bool:
    """Adds what a result may hang on; False where it cannot be said."""
    key += (type(args), len(args))
    if len(args) > _MANY:
        return False
    for arg in args:
        kind = type(arg)
        if kind is tuple or kind is list:
            if not _add(arg, key, tensors, faked):
                return False
        elif isinstance(arg, torch.Tensor):
            fake = faked(arg)
            if not _is_plain(fake):
                return False
            tensors.append(fake)
            key += (FakeTensor, *_layout(fake))
        elif kind in _PLAIN:
            key += (kind, faked(arg))
        else:
            return False
    return True


def _is_plain(tensor: Any) -> bool:
    return type(tensor) is FakeTensor and tensor.constant is None and tensor.layout is torch.strided


def _layout(tensor: FakeTensor) -> tuple[Any, ...]:
    return (
        tensor.shape,
        tensor.stride(),
        tensor.storage_offset(),
        tensor.dtype,
        tensor.fake_device,
        tensor.untyped_storage().nbytes(),
        torch._C._dispatch_keys(tensor).raw_repr(),
        tensor.requires_grad,
    )


# -- a result --------------------------------------------------------------------------------------


def remember(asked: Asked, result: Any, mode: FakeTensorMode) -> None:
    """Notes what came of a call, if that can be made again from its layouts."""
    kinds = [kind for kind in (tuple, list) if isinstance(result, kind)]
    container = kinds[0] if kinds else None  # a named tuple's names are lost anyway
    results = result if container is not None else [result]
    if not results or len(results) > _MANY:
        return
    storages = {t.untyped_storage()._cdata: n for n, t in reversed([*enumerate(asked.tensors)])}
    own: set[int] = set()
    parts: list[Part | None] = []
    for one in results:
        if one is None and container is not None:
            parts.append(None)
            continue
        part = _part(one, asked.tensors, storages, own)
        if part is None or not _is_like(part.anew(asked.tensors, mode), one):
            return
        parts.append(part)
    REMEMBERED.put(asked.key, Made(tuple(parts), container))


def _part(
    one: Any, tensors: list[FakeTensor], storages: dict[int, int], own: set[int]
) -> Part | None:
    """How to make one tensor of a result; None where that is not known."""
    if not isinstance(one, FakeTensor) or not _is_plain(one):
        return None
    for number, tensor in enumerate(tensors):
        if one is tensor:
            return Part(number)
    storage = one.untyped_storage()._cdata
    on = storages.get(storage)
    if storage in own or (on is None and one.storage_offset()):
        return None  # two results on one new storage, or one that does not fill it
    if on is None:
        own.add(storage)
    shape, stride, offset, dtype, device, *_ = _layout(one)
    return Part(None, on, tuple(shape), stride, offset, dtype, device)


def _is_like(again: FakeTensor, one: Any) -> bool:
    return again is one or _layout(again) == _layout(one)
