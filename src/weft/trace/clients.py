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

from .away import away_of, stand_in
from .lines import where
from .trained import trained_here
from .value import Family
from .views import Layout, same_part

if TYPE_CHECKING:
    from .recorder import Recorder


class Client:
    """A client tensor in a graph; has what the recorder wants of a `Value`."""

    __slots__ = ("_at", "_aval", "_family", "_ref", "_time", "line", "tensor", "version")

    def __init__(self, tensor: torch.Tensor, ref: Ref, aval: Aval, family: Family) -> None:
        self.tensor = tensor
        self.version = _version(tensor)
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
        with _plainly():
            base = self.dirty.get(_storage(tensor)) if self.dirty and _strided(tensor) else None
            if base is None:
                return self._constant(tensor)
            if tensor is base.tensor:
                return base
            same = tensor.dtype == base.tensor.dtype
            layouts = Layout.of(base.tensor), Layout.of(tensor)
        return self._view(base, tensor, *layouts, same)

    def is_dirty(self, tensor: torch.Tensor) -> bool:
        return bool(self.dirty) and _strided(tensor) and _storage(tensor) in self.dirty

    def soil(self, tensor: torch.Tensor) -> None:
        """Makes `tensor`, which a recorded operation is about to write, a recorded one.

        With it all that shares its storage: the graph holds the storage, and views of it. The
        constant is a copy, and so is what was taken from here before: after the run it changes.
        """
        trained = trained_here()
        if trained is not None and away_of(tensor) is None:
            trained.home(tensor)
        base = _whole(tensor)
        where = _storage(base)
        self.dirty[where] = self._take(base)
        self._detach(len(self.recorder.nodes) - 1)
        for key, client in list(self.taken.items()):
            if _strided(client.tensor) and _storage(client.tensor) == where:
                self._detach(self.taken.pop(key)._ref.node)

    def _detach(self, node: int) -> None:
        """Makes the constant of a node a copy."""
        key = self.recorder.nodes[node].key  # type: ignore[union-attr]
        if away_of(self.constants[key]) is None:  # what is away nobody changes
            self.constants[key] = self.constants[key].clone()

    def forget(self, first: int) -> None:
        """Undoes what was taken by nodes from `first` on, which the recorder drops."""
        for key, client in list(self.taken.items()):
            if client._ref.node >= first:
                del self.taken[key]
                self.constants.popitem()

    def check(self) -> None:
        """Raises if a constant was changed after it was taken."""
        with _plainly():
            for client in (*self.taken.values(), *self.dirty.values()):
                if client.version != _version(client.tensor):
                    raise self._changed(client)

    def give_back(self, client: Client, content: torch.Tensor) -> None:
        """Copies what the run made of a dirty tensor into it."""
        with torch.no_grad():
            client.tensor.copy_(content)
        client.version = _version(client.tensor)

    def settle(self) -> None:
        """After the run: written tensors are the user's again, to change as he likes."""
        self.dirty.clear()

    def leave(self) -> None:
        """The block was sent, and nobody asks for its constants any more: values that are away
        must not be kept there for their sake."""
        self.constants = {}
        self.taken.clear()
        self.dirty.clear()

    def _constant(self, tensor: torch.Tensor) -> Client:
        found = self.taken.get(id(tensor))
        if found is None:
            found = self.taken[id(tensor)] = self._take(tensor)
        elif found.version != _version(tensor):
            raise self._changed(found)
        return found

    def _take(self, tensor: torch.Tensor) -> Client:
        away = self.recorder.away(tensor)
        if away is None:
            self._accept(tensor)
        key = f"c{len(self.constants)}"
        aval = contiguous(tuple(tensor.shape), tensor.dtype)
        if away is not None:
            self.constants[key] = stand_in(away)
        else:
            self.constants[key] = (tensor if self.recorder.grad else tensor.detach()).contiguous()
        at = self.recorder.here()
        node = Const(key=key, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype), at=at)
        ref = self.recorder.append(node)
        return Client(tensor, ref, aval, Family(ref, -1, at))

    def _view(
        self, base: Client, tensor: torch.Tensor, whole: Layout, part: Layout, same: bool
    ) -> Client:
        """A dirty tensor's view: the same part of the recorded tensor."""
        if not same or 0 in part.stride:
            raise self.recorder.refusal(
                "the block writes into the memory of this client tensor, which is seen here as "
                "another dtype or expanded",
                "use a .clone() of it, made before the block",
            )
        value = same_part(self.recorder.handle(base), whole, part)  # type: ignore[arg-type]
        return Client(tensor, value._ref, value._aval, base._family)

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


def _plainly() -> Any:
    """Inside, nobody is told of what is done with tensors."""
    return torch._C.DisableTorchFunction()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` if it is all of its storage, in order; else its storage as one row."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    if tensor.is_contiguous() and tensor.numel() == size:
        return tensor
    return tensor.detach().as_strided((size,), (1,), 0)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _strided(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
