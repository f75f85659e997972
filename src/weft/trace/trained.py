"""Client tensors of a session on a server: their gradients, and after a step they, are there.

    trained = Trained()
    with trained.watching():                   # on this thread, as long as the session is open
        trained.gave(p, handle)                # the gradient of `p` is a value of the session
        trained.moved(p, away)                 # so is `p` itself: here it has its old numbers
        p.norm()                               # brings it home first

While somebody watches, every torch call that meets a tensor whose numbers are elsewhere brings them
home, and so does `p.grad`, but in `zero_grad`. What cannot be seen: memory that is shared with
such a tensor past PyTorch (`p.numpy()` before it went), and other threads.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from . import special
from .away import Away
from .value import Value

_TRAINED: ContextVar[Trained | None] = ContextVar("weft_trained", default=None)
_NOTHING = object()
_GRAD = torch.Tensor.grad.__get__  # type: ignore[attr-defined]
_SET_GRAD = torch.Tensor.grad.__set__  # type: ignore[attr-defined]

_ABOUT = """
    shape dtype device layout requires_grad is_leaf ndim grad_fn is_cuda is_cpu is_meta
    is_sparse is_sparse_csr is_mkldnn is_quantized is_mps is_xpu is_xla itemsize nbytes _version
    _backward_hooks _post_accumulate_grad_hooks retains_grad
"""
_METHODS = """
    size dim numel nelement stride ndimension is_floating_point is_complex is_contiguous
    element_size storage_offset get_device __len__ __hash__ is_inference requires_grad_
    register_hook
"""
ABOUT = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in _ABOUT.split()]
    + [getattr(torch.Tensor, name) for name in _METHODS.split()]
    + [torch.is_floating_point, torch.is_complex, torch.numel]
)
"""What a tensor tells of itself without its numbers."""
CLEARING = frozenset(
    [inspect.unwrap(one).__code__ for one in (torch.optim.Optimizer.zero_grad, Module.zero_grad)]
)
"""Code that asks for gradients in order to clear them."""


class Trained:
    """See the module's text."""

    def __init__(self) -> None:
        self._there: dict[int, tuple[torch.Tensor, Away]] = {}  # by storage
        self._grads: dict[int, tuple[torch.Tensor, Value]] = {}
        self._hidden: frozenset[int] = frozenset()

    # -- what is there -----------------------------------------------------------------------

    def gave(self, tensor: torch.Tensor, handle: Value) -> None:
        """Its gradient is a value of the session, with what it had before in it."""
        with torch._C.DisableTorchFunction():
            tensor.grad = None
        self._grads[id(tensor)] = tensor, handle

    def moved(self, tensor: torch.Tensor, away: Away) -> None:
        """Its numbers are there; here it has old ones."""
        self._there[_storage(tensor)] = tensor, away

    def grad_of(self, tensor: torch.Tensor) -> Any:
        """Its gradient so far: a handle, or the tensor's own."""
        found = self._grads.get(id(tensor))
        if found is not None:
            return found[1]
        with torch._C.DisableTorchFunction():
            return tensor.grad

    def has_grad(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._grads

    def away_of(self, tensor: torch.Tensor) -> Away | None:
        """Where the numbers of a tensor are; None: here. A view of one that is away is brought
        home with it."""
        if not self._there or tensor.layout is not torch.strided:
            return None
        found = self._there.get(_storage(tensor))
        if found is None:
            return None
        if found[0] is tensor:
            return found[1]
        self.home(found[0])
        return None

    # -- bringing it home --------------------------------------------------------------------

    def home(self, *tensors: torch.Tensor) -> None:
        """Gives tensors the numbers that they have there."""
        keys = [_storage(tensor) for tensor in tensors if tensor.layout is torch.strided]
        found = {key: self._there[key] for key in keys if key in self._there}
        for space in {away.space for _, away in found.values()}:
            mine = {key: one for key, one in found.items() if one[1].space is space}
            fetched = space.fetch(*[away for _, away in mine.values()])
            for (key, (tensor, _)), real in zip(mine.items(), fetched, strict=True):
                with torch._C.DisableTorchFunction(), torch.no_grad():
                    tensor.data.copy_(real)  # nobody counts that as a change
                self._there.pop(key, None)

    def grads_home(self, *tensors: torch.Tensor) -> None:
        """Gives tensors (none: all) their gradients as their own."""
        wanted = {id(tensor) for tensor in tensors} if tensors else self._grads.keys()
        found = [one for key, one in self._grads.items() if key in wanted]
        grads = [one for one in found if one[1]._away is not None]
        for space in {handle._away.space for _, handle in grads if handle._away is not None}:
            mine = [one for one in grads if one[1]._away.space is space]  # type: ignore[union-attr]
            fetched = space.fetch(*[handle._away for _, handle in mine])  # type: ignore[misc]
            for (tensor, _), real in zip(mine, fetched, strict=True):
                del self._grads[id(tensor)]
                with torch._C.DisableTorchFunction():
                    tensor.grad = real.detach().to(tensor.device)

    def all_home(self) -> None:
        """Brings everything home; tries all of it."""
        self.home(*[tensor for tensor, _ in self._there.values()])
        self.grads_home()

    def __len__(self) -> int:
        return len(self._there)

    # -- watching ----------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Every torch call of this thread is looked at."""
        token = _TRAINED.set(self)
        try:
            with _Watch(self):
                yield
        finally:
            _TRAINED.reset(token)

    @contextmanager
    def hiding(self, *tensors: torch.Tensor) -> Iterator[None]:
        """Inside, these have no gradient: their step is taken there."""
        self.hide(*tensors)
        try:
            yield
        finally:
            self.hide()

    def hide(self, *tensors: torch.Tensor) -> None:
        self._hidden = frozenset([id(tensor) for tensor in tensors])

    def seen(self, func: Any, args: tuple, kwargs: dict, caller: FrameType) -> Any:
        """What a call gives; `_NOTHING` where it is to be made as it is."""
        if func == _GRAD and id(args[0]) in self._grads:
            if id(args[0]) in self._hidden:
                return None
            if caller.f_code in CLEARING and caller.f_locals.get("set_to_none"):
                return self._grads[id(args[0])][1]  # it only asks whether there is one
            self.grads_home()
            return _NOTHING
        if func == _SET_GRAD:
            self._grads.pop(id(args[0]), None)
        elif self._there and func != _GRAD and func not in ABOUT:
            found: list[torch.Tensor] = []
            special.tensors_in((args, kwargs), found)
            plain = [one for one in found if not isinstance(one, Value)]
            met = [one for one in plain if one.layout is torch.strided and not one.is_meta]
            keys = {_storage(one) for one in met} & self._there.keys()
            if keys:
                self.home(*[self._there[key][0] for key in keys])
        return _NOTHING


class _Watch(TorchFunctionMode):
    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self._trained = trained

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        trained, kwargs = self._trained, kwargs or {}
        if (trained._there or trained._grads) and _TRAINED.get() is trained:
            found = trained.seen(func, args, kwargs, sys._getframe(1))
            if found is not _NOTHING:
                return found
        return func(*args, **kwargs)


def trained_here() -> Trained | None:
    """Who watches on this thread and task."""
    return _TRAINED.get()


def _storage(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()._cdata
