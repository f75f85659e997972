"""One backward of a block, and the gradients that flow in it, as recording sees them.

A `Flow` is to a gradient what a `LeafState` is to a site's tensor: it knows its version, hands out
handles, and makes nodes of assignments and edits in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from weft.errors import StaleHandleError, WriteMismatchError
from weft.graph.node import Grad, Ref, Regrad
from weft.kernels.aval import Aval, contiguous

from .lines import where
from .value import Family, Owner, Value, make, short

if TYPE_CHECKING:
    from .grads import Gradients


class Pass:
    """One backward. `node` is None until it is recorded; `only`: the client tensors it is for."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.node: int | None = None
        self.time = -1
        self.at = 0
        self.adds_up = True  # whether what it gives is added to `.grad`, as `loss.backward()` does
        self.only: tuple[torch.Tensor, ...] | None = None
        self.flows: dict[Any, Flow] = {}


class Flow(Owner):
    """The gradient of one value in one backward; stands where a `LeafState` does in a `Family`."""

    __slots__ = ("_grads", "aval", "edited", "of", "run", "time", "version")

    def __init__(self, grads: Gradients, run: Pass, of: Any) -> None:
        self._grads = grads
        self.run = run
        self.of: Ref = of._ref
        self.aval: Aval = contiguous(tuple(of._aval.shape), of._aval.dtype)
        self.time = max(of._time, of._family.time)
        self.version = 0
        self.edited = 0

    def read(self, zeros: bool = False) -> Value:
        """A fresh handle on it."""
        recorder = self._grads.recorder
        at = recorder.here()
        ref = recorder.append(Grad(backward=self.run.number, of=self.of, zeros=zeros, at=at))
        self._grads.nodes[ref.node] = self
        time = max(self.time, self.run.time)
        family = Family(ref, time, at)
        family.leaf = self
        family.version = self.version
        return make(recorder, ref, self.aval, family, time, at)

    def write(self, value: Any) -> None:
        """Another one flows on in its place."""
        recorder = self._grads.recorder
        if isinstance(value, Value):
            value = recorder.own(value)
        if isinstance(value, Value) and self._is_current(value):
            return  # `h.grad *= 2` ends in this
        if not isinstance(value, torch.Tensor):
            raise recorder.refusal(
                f"a {type(value).__name__} cannot be a gradient", "give a tensor of its shape"
            )
        source = value if isinstance(value, Value) else recorder.clients.use(value)
        aval = source._aval
        if aval.shape != self.aval.shape or not aval.dtype.is_floating_point:
            raise WriteMismatchError(
                f"the gradient is {short(self.aval)}, but {short(aval)} is put in its place",
                line=where(recorder.line()),
                fix=f"give a tensor of shape {list(self.aval.shape)}",
            )
        self.put(source._ref, recorder.here())

    def _is_current(self, value: Value) -> bool:
        family = value._family
        mine = family.leaf is self and family.version == self.version
        return mine and value._ref == family.root

    def put(self, ref: Ref, at: int) -> None:
        recorder = self._grads.recorder
        node = Regrad(backward=self.run.number, of=self.of, value=ref, at=at)
        self._grads.nodes[recorder.append(node).node] = self
        self.version += 1
        self.edited = at

    # What `Sites` asks of what stands in a family

    def check_writable(self, family: Family) -> None:
        recorder = self._grads.recorder
        if self.run not in self._grads.open_passes():
            return  # it has flowed; from here on it is a tensor as any other
        if family.version != self.version:
            raise StaleHandleError(
                "this gradient was read before another one was put in its place, at "
                f"{where(recorder.line_of(self.edited))}",
                line=where(recorder.line()),
                fix="read .grad again and change that",
            )

    def filled(self, family: Family, at: int) -> None:
        if self.run in self._grads.open_passes() and family.root is not None:
            self.put(family.root, at)
            family.version = self.version


class Block:
    """What `loss.backward()` gives: in `with`, `.grad` is that of this backward as it flows."""

    def __init__(self, grads: Gradients, run: Pass) -> None:
        self._grads = grads
        self._run = run

    def __enter__(self) -> None:
        self._grads.inside.append(self._run)

    def __exit__(self, *exc: object) -> None:
        self._grads.inside.remove(self._run)
