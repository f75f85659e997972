"""Steps of an optimiser where its parameters are: in a session on a server.

    optimizer.step()      # the gradients are there: the step is a request of the session

A step is a graph of one operation (`optim.AdamW`) for each group of parameters, whose constants are
values of the session: parameters, gradients, and the state of the optimiser. It runs there while
the user's code goes on; here `step` finds no gradients, and does nothing. What is no such step (a
class that is not in the table, a closure, gradients of several places) brings everything home, and
is taken here: the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from weft.client.session import SessionBackend
from weft.graph.node import Arg, Call, Const, Graph, Ref, Save, Seq
from weft.kernels.aval import contiguous, dtype_name
from weft.kernels.optimizers import HOW, OPTIMIZERS, Entry, layout, options_of
from weft.trace.away import Away
from weft.trace.trained import Trained, trained_here
from weft.trace.value import Value

State = dict[str, Away]


class Steps:
    """The steps that are taken elsewhere, of all optimisers of one session."""

    def __init__(self, trained: Trained) -> None:
        self._trained = trained
        self._states: dict[int, tuple[Any, dict[torch.Tensor, State]]] = {}  # by optimiser
        self._hooks: list[Any] = []
        self._inside = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, steps of optimisers on this thread are taken where their gradients are."""
        hooks = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]
        try:
            yield
        finally:
            for hook in (*hooks, *self._hooks):
                hook.remove()

    # -- what optimisers tell ----------------------------------------------------------------

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if trained_here() is not self._trained or self._inside:
            return
        self._inside = True  # what a step leaves is found out by one on a tensor of our own
        try:
            self._taken(optimizer, args, kwargs)
        finally:
            self._inside = False

    def _taken(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        params = [one for group in optimizer.param_groups for one in group["params"]]
        if not any(self._trained.has_grad(one) for one in params):
            self._home(optimizer)  # it is taken here, if it has anything to do
            return
        room = self._room(params)
        closures = [one for one in (*args[1:], *kwargs.values()) if one is not None]
        groups = None if closures or not _are_apart(params) else _groups(optimizer)
        if room is None or groups is None:
            self._home(optimizer)
            return
        self._step(optimizer, room, groups)
        self._trained.hide(*params)

    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if trained_here() is self._trained and not self._inside:
            self._trained.hide()

    def _room(self, params: list[torch.Tensor]) -> SessionBackend | None:
        """Where all gradients are that are not here; None where that is no one place."""
        grads = [self._trained.grad_of(one) for one in params]
        aways = [one._away for one in grads if isinstance(one, Value) and one._away is not None]
        aways += [a for one in params if (a := self._trained.away_of(one)) is not None]
        rooms = {id(away.space): away.space for away in aways}
        return next(iter(rooms.values())) if len(rooms) == 1 else None  # type: ignore[return-value]

    # -- a step there ------------------------------------------------------------------------

    def _step(self, optimizer: Optimizer, room: SessionBackend, groups: list[Group]) -> None:
        states = self._states_of(optimizer)
        if any(one.space is not room for state in states.values() for one in state.values()):
            self._state_home(optimizer)  # the last step was taken somewhere else
        built = _Built(self._trained)
        for group in groups:
            built.add(group, optimizer, states)
        if not built.made:
            return
        request = room.beside(
            Graph(tuple(built.nodes)),
            built.uses,
            built.constants,
            keeps=frozenset([name for name, *_ in built.made]),
        )
        room.run(request)
        number = room.number
        for name, param, entry in built.made:
            if entry is None:
                aval = contiguous(tuple(param.shape), param.dtype)
                self._trained.moved(param, Away(room, number, name, aval))
            else:
                shape = tuple(param.shape) if entry.like else ()
                away = Away(room, number, name, contiguous(shape, entry.dtype))
                states.setdefault(param, {})[entry.name] = away

    def _states_of(self, optimizer: Optimizer) -> dict[torch.Tensor, State]:
        if id(optimizer) not in self._states:
            self._states[id(optimizer)] = optimizer, {}
            self._hooks += [
                optimizer.register_state_dict_pre_hook(self._home),
                optimizer.register_load_state_dict_pre_hook(lambda one, _: self._home(one)),
            ]
        return self._states[id(optimizer)][1]

    # -- bringing it home --------------------------------------------------------------------

    def _home(self, optimizer: Any) -> None:
        """Everything of an optimiser is here again: parameters, gradients, state."""
        params = [one for group in optimizer.param_groups for one in group["params"]]
        self._trained.home(*params)
        self._trained.grads_home(*params)
        self._state_home(optimizer)

    def _state_home(self, optimizer: Any) -> None:
        _, states = self._states.get(id(optimizer), (None, {}))
        rows = [(p, name, away) for p, state in states.items() for name, away in state.items()]
        for space in {away.space for *_, away in rows}:
            mine = [row for row in rows if row[2].space is space]
            fetched = space.fetch(*[away for *_, away in mine])
            for (param, name, _), real in zip(mine, fetched, strict=True):
                place = "cpu" if name == "step" else param.device
                optimizer.state[param][name] = real.to(place)
        states.clear()

    def all_home(self) -> None:
        """The state of all optimisers is here again."""
        for optimizer, _ in list(self._states.values()):
            self._state_home(optimizer)


def _are_apart(params: list[torch.Tensor]) -> bool:
    """Whether no two of them share memory."""
    with torch._C.DisableTorchFunction():
        dense = [one for one in params if one.layout is torch.strided]
        storages = {one.untyped_storage()._cdata for one in dense}
    return len(storages) == len(params)


class Group:
    """Parameters that are stepped alike: the operation, its options, and who has a gradient."""

    def __init__(self, kind: Any, options: dict[str, Any], params: list[torch.Tensor]) -> None:
        self.kind = kind
        self.options = options
        self.params = params


def _groups(optimizer: Optimizer) -> list[Group] | None:
    """The groups of an optimiser whose step is an operation; None where it is none."""
    kind = type(optimizer)
    if kind.__name__ not in OPTIMIZERS or getattr(torch.optim, kind.__name__, None) is not kind:
        return None
    found = []
    for group in optimizer.param_groups:
        if any(group.get(name) for name in HOW):
            return None
        options = {name: group[name] for name in sorted(options_of(kind)) if name in group}
        if any(isinstance(value, torch.Tensor) for value in options.values()):
            return None
        found.append(Group(kind, options, list(group["params"])))
    return found if all(_knows(optimizer, group) for group in found) else None


def _knows(optimizer: Optimizer, group: Group) -> bool:
    """Whether what the optimiser remembers here is what a step of its class leaves, or nothing."""
    for param in group.params:
        kept = {name for name, one in optimizer.state.get(param, {}).items() if one is not None}
        names = {entry.name for entry in layout(group.kind, param.dtype, group.options)}
        if kept and kept != names:
            return False
    return True


class _Built:
    """The graph of a step: nodes, constants that are here and there, and what it makes."""

    def __init__(self, trained: Trained) -> None:
        self._trained = trained
        self.nodes: list[Any] = []
        self.uses: dict[str, Away] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.made: list[tuple[str, torch.Tensor, Entry | None]] = []

    def add(self, group: Group, optimizer: Optimizer, states: dict[torch.Tensor, State]) -> None:
        """The step of one group, of those that have a gradient."""
        grads = [(one, self._trained.grad_of(one)) for one in group.params]
        pairs = [(one, grad) for one, grad in grads if grad is not None]
        if not pairs:
            return
        entries = [layout(group.kind, one.dtype, group.options) for one, _ in pairs]
        args: tuple[Arg, ...] = (
            _list([self._const(one, self._trained.away_of(one)) for one, _ in pairs]),
            _list([self._grad(grad) for _, grad in pairs]),
            _list(
                [
                    _list(self._state(optimizer.state.get(one, {}), states.get(one, {}), entry))
                    for (one, _), entry in zip(pairs, entries, strict=True)
                ]
            ),
        )
        kwargs = tuple([(name, _plain(value)) for name, value in group.options.items()])
        outs = sum([1 + len(entry) for entry in entries])
        name = f"optim.{group.kind.__name__}"
        call = len(self.nodes)
        self.nodes.append(Call(op=name, args=args, kwargs=kwargs, outs=outs, grad=False))
        out = 0
        for (one, _), entry in zip(pairs, entries, strict=True):
            for what in (None, *entry):
                save = f"<step {len(self.made)}"
                self.nodes.append(Save(name=save, value=Ref(call, out)))
                self.made.append((save, one, what))
                out += 1

    def _grad(self, grad: Any) -> Ref:
        if isinstance(grad, Value) and grad._away is not None:
            return self._const(grad, grad._away)
        return self._const(grad._real if isinstance(grad, Value) else grad, None)

    def _state(self, here: dict[str, Any], there: State, entries: tuple[Entry, ...]) -> list[Ref]:
        """What the optimiser remembers of a parameter; nothing before its first step."""
        known = {**{name: one for name, one in here.items() if one is not None}, **there}
        if not known:
            return []
        found = []
        for entry in entries:
            one = known[entry.name]
            if isinstance(one, Away):
                found.append(self._const(None, one))
            else:
                found.append(self._const(torch.as_tensor(one, dtype=entry.dtype), None))
        return found

    def _const(self, tensor: Any, away: Away | None) -> Ref:
        key = f"c{len(self.uses) + len(self.constants)}"
        if away is not None:
            self.uses[key] = away
            shape, dtype = tuple(away.aval.shape), away.aval.dtype
        else:
            with torch._C.DisableTorchFunction():
                self.constants[key] = tensor.detach().contiguous()
                shape, dtype = tuple(tensor.shape), tensor.dtype
        self.nodes.append(Const(key=key, shape=shape, dtype=dtype_name(dtype)))
        return Ref(len(self.nodes) - 1)


def _list(items: list[Any]) -> Seq:
    return Seq("list", tuple(items))


def _plain(value: Any) -> Arg:
    return Seq("tuple", tuple(value)) if isinstance(value, (list, tuple)) else value
