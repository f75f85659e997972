"""One tensor inside a call of a module of the user's own, as a block reads and edits it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from weft.errors import StaleHandleError, WriteMismatchError
from weft.graph.node import Ref
from weft.graph.passes import roots
from weft.graph.site import Leaf, leaf_text

from .called import SOURCES, Run
from .containers import flatten
from .lines import where
from .value import Family, Owner, Value, make, short

if TYPE_CHECKING:
    from .insides import Insides, Port


class Inner(Owner):
    """One tensor at a port: stands where a `LeafState` does for a site of the model."""

    __slots__ = ("_insides", "_port", "edited", "leaf", "name", "version")

    def __init__(self, insides: Insides, port: Port, leaf: Leaf, name: str) -> None:
        self._insides = insides
        self._port = port
        self.leaf = leaf
        self.name = f"{name}{leaf_text(leaf)}" if port.port == "output" else name
        self.version = 0
        self.edited = 0

    @property
    def run(self) -> Run:
        return self._insides.seen[self._port].run

    def read(self, value: Value) -> Value:
        """A fresh handle."""
        recorder = self._insides.recorder
        self.run.read.add(value._ref)
        at = recorder.here()
        time = max(value._time, value._family.time)
        family = Family(value._ref, time, at)
        family.leaf = self
        family.version = self.version
        family.readonly = value._family.readonly
        return make(recorder, value._ref, value._aval, family, time, at)

    def write(self, value: Any) -> None:
        """Another tensor in its place."""
        recorder = self._insides.recorder
        now: Any = dict(flatten(self._insides.seen[self._port].structure))[self.leaf]
        if isinstance(value, Value):
            value = recorder.own(value)
        if isinstance(value, Value) and self._is_current(value):
            return  # `part.output += x` ends in this
        if not isinstance(value, torch.Tensor):
            raise self._mismatch(now, f"a {type(value).__name__}")
        floats = value.dtype.is_floating_point and now.dtype.is_floating_point
        if _sizes(value) != _sizes(now) or (value.dtype != now.dtype and not floats):
            raise self._mismatch(now, f"{str(value.dtype)[6:]}{_sizes(value)}")
        if not isinstance(value, Value):
            value = self._constant(value)
        self._change(False, value.to(now.dtype))

    def _constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """A client tensor, so that what the module makes of it is recorded."""
        recorder = self._insides.recorder
        client, at = recorder.clients.use(tensor), recorder.here()
        family = Family(client._ref, client._time, at)
        handle = make(recorder, client._ref, client._aval, family, client._time, at)
        return handle.clone()  # the module may change it

    def _change(self, in_place: bool, value: Any) -> None:
        before = self.run.changes.get(self._port, {}).get(self.leaf)
        self.run.again(self._port, self.leaf, in_place and (before is None or before[0]), value)
        self.version += 1
        self.edited = self._insides.recorder.here()

    def _is_current(self, value: Value) -> bool:
        family = value._family
        whole = value._ref == family.root
        return family.leaf is self and family.version == self.version and whole

    def _mismatch(self, now: Any, got: str) -> WriteMismatchError:
        held = short(now._aval) if isinstance(now, Value) else f"{_sizes(now)}"
        return WriteMismatchError(
            f"{self.name} holds {held}, but {got} is written to it",
            line=where(self._insides.recorder.line()),
            fix="give a tensor of its shape; to change a part of it use [...] = value",
        )

    # What `Sites` asks of what stands in a family

    def check_writable(self, family: Family) -> None:
        recorder = self._insides.recorder
        if family.version != self.version:
            raise StaleHandleError(
                f"this handle on {self.name} was read at {where(recorder.line_of(family.made))}, "
                f"before the edit at {where(recorder.line_of(self.edited))}",
                line=where(recorder.line()),
                fix="read it again after the edit and change that handle",
            )
        if self._is_lent(family.root):
            raise recorder.refusal(
                f"{self.name} is not made inside the call: it is a tensor that was there before, "
                "or a part of one, and an edit in place would change it elsewhere too",
                f"assign a new tensor: {self.name} = ...; or edit it before the call",
            )

    def _is_lent(self, ref: Ref | None) -> bool:
        """Whether a result is, or is a view of, something that the call has not made."""
        assert ref is not None
        nodes = tuple(self._insides.recorder.nodes)
        root = roots(nodes).get(ref) or ref
        return not self.run.owns(root) or isinstance(nodes[root.node], SOURCES)

    def filled(self, family: Family, at: int) -> None:
        recorder, ref = self._insides.recorder, family.root
        assert ref is not None
        whole = dict(flatten(self._insides.seen[self._port].structure))[self.leaf]
        edited = make(recorder, ref, whole._aval, Family(ref, family.time, at), family.time, at)
        self._change(True, edited)
        family.version = self.version


def _sizes(tensor: torch.Tensor) -> list[int]:
    """The sizes, of a value without binding the graph to them."""
    return list(tensor._aval.shape if isinstance(tensor, Value) else tensor.shape)
