"""Values that a session carries from one block into another lose where they come from.

That is what a plain run means: no gradients but those of a `backward` in it. But a value that was
made from tensors which require gradients, used in the loss of a later block, would leave these
without a part of their gradient, and nobody would see it. So such a value remembers them, and the
later block is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from weft.errors import GradientError
from weft.graph.gradients import reaching
from weft.graph.node import (
    AnyNode,
    Backward,
    Call,
    Fill,
    Grad,
    Read,
    Ref,
    Regrad,
    Skip,
    Write,
    inputs_of,
)
from weft.graph.passes import roots

from .flows import Pass
from .given import inputs_that_ask
from .lines import where

if TYPE_CHECKING:
    from .grads import Gradients
    from .recorder import Recorder
    from .value import Value

_NAME = "_weft_cut"  # of a plain tensor: operations give tensors without it


class Cut(NamedTuple):
    """What a value was made from, and the line that made it."""

    tensors: tuple[torch.Tensor, ...]
    line: Any

    def concerns(self, one: Pass) -> bool:
        """Whether a backward is to give these a gradient."""
        if one.only is None or not all(tensor.is_leaf for tensor in self.tensors):
            return one.only != ()
        return any(tensor is wanted for tensor in self.tensors for wanted in one.only)


def marks(cut: Cut | None) -> dict[str, Cut]:
    """What a tensor has for it to remember that."""
    return {} if cut is None else {_NAME: cut}


def mark(tensor: torch.Tensor, cut: Cut | None) -> None:
    """Makes a tensor remember what it was made from."""
    if cut is not None:
        setattr(tensor, _NAME, cut)


def cuts_of(recorder: Recorder) -> Callable[[Value], Cut | None]:
    """At the end of a block: what its values lose when they are carried out of it."""
    tensors = [] if recorder.grad or recorder.steps is not None else _askers(recorder)
    if not tensors:
        return lambda value: None
    bits = _Origins(recorder, tensors)

    def cut(value: Value) -> Cut | None:
        own = bits.of(value._ref) if value._aval.dtype.is_floating_point else 0
        chosen = [given for n, (_, given) in enumerate(tensors) if own >> n & 1]
        found = tuple([tensor for given in chosen for tensor in given])
        return Cut(found, where(recorder.line_of(value._at))) if found else None

    return cut


def _askers(recorder: Recorder) -> list[tuple[Ref | int, tuple[torch.Tensor, ...]]]:
    """Where tensors that require gradients come in: at a constant, or the input of an invoke."""
    found: list[tuple[Ref | int, tuple[torch.Tensor, ...]]] = []
    with torch._C.DisableTorchFunction():
        for client in recorder.clients.taken.values():
            tensor = client.tensor
            if tensor.requires_grad:
                found.append((client._ref, (tensor,)))
            elif hasattr(tensor, _NAME):  # itself carried out of an earlier block
                found.append((client._ref, getattr(tensor, _NAME).tensors))
        found += [(invoke, (tensor,)) for invoke, _, tensor in inputs_that_ask(recorder.calls)]
    return found


class _Origins:
    """Of each result of a block: from which of these tensors gradients would come, a bit each."""

    def __init__(self, recorder: Recorder, tensors: Sequence[tuple[Ref | int, Any]]) -> None:
        self._recorder = recorder
        self._nodes = tuple(recorder.nodes)
        self._owner = roots(self._nodes)
        self._first = {at.node: 1 << n for n, (at, _) in enumerate(tensors) if isinstance(at, Ref)}
        self._given: dict[int, int] = {}
        for n, (at, _) in enumerate(tensors):
            if isinstance(at, int):
                self._given[at] = self._given.get(at, 0) | 1 << n
        self._put: dict[int, dict[int, tuple[int, int]]] = {}  # invoke -> write -> (time, bits)
        while self._pass():  # an edit may be recorded below the reads that it changes
            pass

    def of(self, ref: Ref) -> int:
        return self._bits[ref.node] | self._stored.get(self._owner.get(ref, ref), 0)

    def _pass(self) -> bool:
        """Goes through the nodes once; whether edits have brought something new."""
        self._bits: list[int] = []
        self._stored: dict[Ref, int] = {}  # by the owner of a storage: what was written into it
        news = False
        for number, node in enumerate(self._nodes):
            own = self._first.get(number, 0) | self._made(number, node)
            self._bits.append(own)
            if isinstance(node, Call):
                for ref in node.writes:
                    owner = self._owner.get(ref, ref)
                    self._stored[owner] = self._stored.get(owner, 0) | own
            elif isinstance(node, (Write, Fill, Skip)) and own:
                edits = self._put.setdefault(node.site.invoke, {})
                entry = self._time(node), own
                news = news or edits.get(number) != entry
                edits[number] = entry
        return news

    def _made(self, number: int, node: AnyNode) -> int:
        if isinstance(node, Read):
            time = self._time(node)
            edits = self._put.get(node.site.invoke, {}).items()
            before = [bits for n, (at, bits) in edits if at < time or (at == time and n < number)]
            return self._joined([self._given.get(node.site.invoke, 0), *before])
        if isinstance(node, (Grad, Regrad)):
            run = self._recorder.gradients.passes[node.backward].node
            return self._bits[run] if run is not None and run < number else 0
        if isinstance(node, Call) and (node.op == "detach" or not node.grad):
            return 0
        if isinstance(node, Backward) and not node.create:
            return 0
        return self._joined([self.of(ref) for ref in inputs_of(node)])

    def _time(self, node: Read | Write | Fill | Skip) -> int:
        site, invokes = node.site, self._recorder.invokes
        if invokes is not None:
            return invokes.time(site)
        return self._recorder.signature.site(site.path, site.port, site.call).index

    @staticmethod
    def _joined(bits: Iterable[int]) -> int:
        return reduce(or_, bits, 0)


def refuse_cuts(grads: Gradients) -> None:
    """Raises where a loss of this block depends on a value that remembers what it was made from."""
    recorder, passes = grads.recorder, grads.added()
    with torch._C.DisableTorchFunction():
        cut = [one for one in recorder.clients.taken.values() if hasattr(one.tensor, _NAME)]
    if not cut or not passes:
        return
    nodes = tuple(recorder.nodes)
    reached = reaching(nodes, roots(nodes))
    for client in cut:
        known: Cut = getattr(client.tensor, _NAME)
        number = client._ref.node
        mine = [one for one in passes if reached[number] >> grads.bit(one) & 1]
        if any(known.concerns(one) for one in mine) and not _is_detached(nodes, number):
            raise GradientError(
                "the loss depends on a value of an earlier block of the session, which was made "
                f"there from tensors that require gradients, at {known.line}; a carried value is "
                "a number, so they would lose this part of their gradient",
                line=where(recorder.line_of(client._at)),
                fix="keep its history with trace(..., grad=True) there, or put both into one "
                "block, as invokes; value.detach() says that it is to be a number",
            )


def _is_detached(nodes: Sequence[AnyNode], number: int) -> bool:
    """Whether all that uses a node lets no gradient through."""
    users = [node for node in nodes if any(ref.node == number for ref in inputs_of(node))]
    return all(isinstance(one, Call) and (one.op == "detach" or not one.grad) for one in users)
