"""Client tensors: constants, and tensors that a block writes into.

A client tensor used with a `Value` becomes a constant, taken by value at its first use; changing
it later in the block is an error. A client tensor that a recorded operation *writes*
(`acts[i] = model.h[i].output`) is *dirty*: from then on operations on it, and on anything that
shares its storage, are recorded, and after the run its final content is copied back into it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from weft.errors import ChangedConstantError
from weft.graph.node import Const, Ref
from weft.kernels.aval import Aval, contiguous, dtype_name

from .lines import where
from .value import Family
from .views import find

if TYPE_CHECKING:
    from .recorder import Recorder


class Client:
    """A client tensor in a graph; has what the recorder wants of a `Value`."""

    __slots__ = ("_at", "_aval", "_family", "_ref", "_time", "line", "tensor", "version")

    def __init__(self, tensor: torch.Tensor, ref: Ref, aval: Aval, family: Family) -> None:
        self.tensor = tensor
        self.version = tensor._version
        self._ref = ref
        self._aval = aval
        self._family = family
        self._time = family.time
        self._at = family.made


class Clients:
    """The client tensors of one recording."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.constants: dict[str, torch.Tensor] = {}
        self.taken: dict[int, Client] = {}
        self.dirty: dict[int, Client] = {}

    def use(self, tensor: torch.Tensor) -> Client:
        """The constant that stands for `tensor`, or the recorded state of a dirty one."""
        if self.dirty and (base := self.dirty.get(_storage(tensor))) is not None:
            return base if tensor is base.tensor else self._view(base, tensor)
        found = self.taken.get(id(tensor))
        if found is None:
            found = self.taken[id(tensor)] = self._take(tensor)
        elif found.version != tensor._version:
            raise self._changed(found)
        return found

    def is_dirty(self, tensor: torch.Tensor) -> bool:
        return bool(self.dirty) and _strided(tensor) and _storage(tensor) in self.dirty

    def soil(self, tensor: torch.Tensor) -> None:
        """Makes `tensor`, which a recorded operation is about to write, a recorded one."""
        base = tensor._base if tensor._is_view() and tensor._base is not None else tensor
        if not base.is_contiguous():
            raise self.recorder.refusal(
                "a value is written into a client tensor that is not contiguous",
                "call .contiguous() on the tensor before the block",
            )
        client = self.dirty[_storage(base)] = self._take(base)
        key = next(reversed(self.constants))
        self.constants[key] = self.constants[key].clone()  # the tensor itself changes after the run
        client.version = base._version

    def forget(self, first: int) -> None:
        """Undoes what was taken by nodes from `first` on, which the recorder drops."""
        for key, client in list(self.taken.items()):
            if client._ref.node >= first:
                del self.taken[key]
                self.constants.popitem()

    def check(self) -> None:
        """Raises if a constant was changed after it was taken."""
        for client in (*self.taken.values(), *self.dirty.values()):
            if client.version != client.tensor._version:
                raise self._changed(client)

    def _take(self, tensor: torch.Tensor) -> Client:
        self._accept(tensor)
        key = f"c{len(self.constants)}"
        aval = contiguous(tuple(tensor.shape), tensor.dtype)
        self.constants[key] = tensor.detach().contiguous()
        at = self.recorder.here()
        node = Const(key=key, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype), at=at)
        ref = self.recorder.append(node)
        return Client(tensor, ref, aval, Family(ref, -1, at))

    def _view(self, base: Client, tensor: torch.Tensor) -> Client:
        """A dirty tensor's view: the same part of the recorded tensor."""
        found = find(base.tensor, tensor)
        if found is None:
            raise self.recorder.refusal(
                f"a view of shape {list(tensor.shape)} of a client tensor that the block writes "
                f"into (shape {list(base.tensor.shape)}) cannot be recorded",
                "index the tensor itself: acts[i, j] = value",
            )
        index, order = found
        value = self.recorder.handle(base)[index].permute(order).view(tensor.shape)  # type: ignore[arg-type]
        return Client(tensor, value._ref, value._aval, base._family)  # type: ignore[attr-defined]

    def _accept(self, tensor: torch.Tensor) -> None:
        kind = type(tensor)
        plain = kind is torch.Tensor or isinstance(tensor, torch.nn.Parameter)
        if plain and _strided(tensor) and not tensor.is_meta:
            return
        what = "a meta tensor" if tensor.is_meta else f"a tensor of type {kind.__name__}"
        raise self.recorder.refusal(
            f"{what} ({list(tensor.shape)}) was used in a block; it has no numbers to send",
            "use a plain dense tensor; a tensor on the device of a value is made with "
            "torch.zeros(value.shape)",
        )

    def _changed(self, client: Client) -> Any:
        return ChangedConstantError(
            "a client tensor was changed after the block had taken its value at "
            f"{where(self.recorder.line_of(client._at))}",
            line=where(self.recorder.line()),
            fix="change it before its first use in the block, or use a .clone()",
        )


def _strided(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
