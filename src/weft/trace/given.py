"""Client tensors that get their `.grad` when the block has run.

All that require gradients, that the block uses, and on which a loss may depend; also those among
the inputs of the model. Their gradients are saved under names of our own, from afar as here, and
added to what they have; what they were made of outside the block gets its share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from weft.graph.gradients import reaching
from weft.graph.node import Call, Grad, Read, Ref, Save
from weft.graph.passes import roots
from weft.graph.site import Site
from weft.kernels.aval import aval_of, dtype_name

from .containers import flatten
from .flows import Flow, Pass
from .trained import trained_here
from .value import Family, Value, make

if TYPE_CHECKING:
    from .grads import Gradients


class Given:
    """The gradients that one recording gives to client tensors."""

    def __init__(self, grads: Gradients) -> None:
        self._grads = grads
        self.clients: dict[int, Any] = {}  # by their nodes: who may get a gradient
        self._saves: list[tuple[str, torch.Tensor, Any]] = []
        self._before: dict[int, Ref] | None = None
        """In a session on a server that keeps the gradients: those added up so far, by tensor."""

    def meet(self) -> None:
        """Notes the client tensors that the block uses by now."""
        with torch._C.DisableTorchFunction():
            for client in self._grads.recorder.clients.taken.values():
                if client.tensor.requires_grad:
                    self.clients[client._ref.node] = client

    def close(self, inputs: Any) -> None:
        """At the end of the block: gradients for the client tensors that require them.

        `inputs` are (invoke, leaf, tensor): those among the inputs of the model.
        """
        self.meet()
        groups: dict[Any, list[Pass]] = {}
        for one in self._grads.added():
            groups.setdefault(one.only and tuple(map(id, one.only)), []).append(one)
        asked = [*[client.tensor for client in self.clients.values()], *[t for _, _, t in inputs]]
        self._before = self._kept_there(asked) if groups else None
        nodes = tuple(self._grads.recorder.nodes)
        reached = reaching(nodes, roots(nodes)) if groups and self.clients else []
        for passes in groups.values():
            if passes[0].only == ():
                continue
            for client in self.clients.values():
                bits = reached[client._ref.node]  # what is written to a site counts wherever it is
                mine = [one for one in passes if bits >> self._grads.bit(one) & 1]
                self._give(client.tensor, client._ref, mine)
            for invoke, leaf, tensor in inputs:
                self._give(tensor, self._input(invoke, leaf, tensor, passes), passes)

    def _input(self, invoke: int, leaf: Any, tensor: torch.Tensor, mine: list[Pass]) -> Ref:
        recorder = self._grads.recorder
        aval = aval_of(tensor.detach())
        dtype = dtype_name(aval.dtype)
        site = Site("", "inputs", invoke=invoke)
        node = Read(site=site, leaf=leaf, shape=tuple(aval.shape), dtype=dtype, at=mine[0].at)
        ref = recorder.append(node)
        family = Family(ref, -1, mine[0].at)
        value = make(recorder, ref, aval, family, -1, mine[0].at)
        for one in mine:
            one.flows.setdefault(("input", invoke, leaf), Flow(self._grads, one, value))
        return ref

    def _give(self, tensor: torch.Tensor, ref: Ref, passes: list[Pass]) -> None:
        """Saves the sum of a client tensor's gradients."""
        recorder = self._grads.recorder
        only = passes[0].only if passes else None
        if self._before is not None and only is not None and all(one is not tensor for one in only):
            return
        total: Ref | None = None
        for one in passes:
            grad = recorder.append(Grad(backward=one.number, of=ref, zeros=True, at=one.at))
            if total is not None:
                grad = recorder.append(Call(op="add", args=(total, grad), grad=False, at=one.at))
            total = grad
        if total is not None and self._before is not None:
            total = self._added(tensor, total, passes[0].at)
        if total is not None:
            name = f"<grad {len(self._saves) + len(recorder.stays)}"
            recorder.append(Save(name=name, value=total, at=passes[0].at))
            if self._before is None:
                self._saves.append((name, tensor, passes[0].only))
            else:
                recorder.stays[name] = tensor

    def _kept_there(self, asked: list[torch.Tensor]) -> dict[int, Ref] | None:
        """Nothing yet, where the gradients stay in a session: only what has no history here, and
        nobody who waits for its gradient. Else earlier ones come home, to be added to here."""
        trained = trained_here()
        if trained is None:
            return None
        if self._grads.recorder.space is not None and all(map(_stays, asked)):
            return {}
        trained.grads_home()
        return None

    def _added(self, tensor: torch.Tensor, total: Ref, at: int) -> Ref:
        """`total` added to the gradient that the tensor has already."""
        recorder, trained = self._grads.recorder, trained_here()
        assert self._before is not None and trained is not None
        before = self._before.get(id(tensor))
        if before is None:
            has = trained.grad_of(tensor)
            if has is not None:
                has = recorder.own(has) if isinstance(has, Value) else has
                before = recorder.clients.use(has)._ref
        if before is not None:
            total = recorder.append(Call(op="add", args=(before, total), grad=False, at=at))
        self._before[id(tensor)] = total
        return total

    def deliver(self, saved: dict[str, Any]) -> None:
        """Client tensors get their gradients, added to what they have; also through what they
        were made of outside the block."""
        groups: dict[Any, tuple[Any, list[torch.Tensor], list[torch.Tensor]]] = {}
        for name, tensor, only in self._saves:
            if name in saved:
                key = only and tuple(map(id, only))
                _, tensors, gradients = groups.setdefault(key, (only, [], []))
                tensors.append(tensor)
                gradients.append(saved[name].detach().to(tensor.device))
        self._saves.clear()
        for only, tensors, gradients in groups.values():
            later = len(groups) > 1  # what they were made of may be the same
            torch.autograd.backward(tensors, gradients, retain_graph=later, inputs=only)


def _stays(tensor: torch.Tensor) -> bool:
    """Whether a gradient of it can be elsewhere: it is a leaf, and nobody waits for it."""
    waits = tensor._backward_hooks or tensor._post_accumulate_grad_hooks
    return tensor.is_leaf and not waits and tensor.layout is torch.strided


def inputs_that_ask(calls: Any) -> list[tuple[int, Any, torch.Tensor]]:
    """(invoke, leaf, tensor) of the model's inputs that require gradients."""
    return [
        (invoke, leaf, tensor)
        for invoke, call in enumerate(calls)
        for leaf, tensor in flatten((tuple(call.args), dict(call.kwargs)))
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad
    ]
