"""Runs with gradients: `Interpreter`, and what a backward adds to it.

A backward is one `torch.autograd.grad` with explicit inputs: nothing lands in any `.grad`. What
arrives at a value wakes the steps that wait for it, as a site does when it fires; where gradients
are replaced, this happens while they flow, so that what lies behind sees the new one.

    loss ---> autograd.grad ---> a gradient arrives at h: Grad, operations, Regrad
                            ---> what flows on from h arrives at values before it

A value has a history for each version (`gradlink`), told by the edge of the autograd graph at which
its gradients arrive. Nothing that autograd holds knows this run, so it ends with the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import ref as weak

import torch

from weft.errors import GradientError, WriteMismatchError
from weft.graph.gradients import has_gradients
from weft.graph.node import Apply, Backward, Call, Const, Grad, Graph, Param, Read, Regrad
from weft.graph.site import Site, leaf_text

from .firing import type_text
from .follow import can_be_followed, edge_of, follow, forget, walled
from .interpreter import Interpreter
from .late import late_gradient
from .memory import storage
from .steps import Step
from .still import still
from .structure import tensors

_STOPS = frozenset(("detach", "detach_copy"))  # say themselves that no gradient flows
Key = tuple[int, int]  # an edge: id of a node of the autograd graph, number of its result


class _Arrival:
    """The gradient that arrives at one edge in one backward."""

    __slots__ = ("edge", "now", "slots")

    def __init__(self, edge: Any) -> None:
        self.edge = edge
        self.slots: set[int] = set()
        self.now: torch.Tensor | None = None


class GradientInterpreter(Interpreter):
    """One run of a graph with gradients.

    With `keep` everything that is saved stays connected to what it was made of, and weights and
    client tensors ask for gradients as they did.
    """

    takes = False  # a copy would be made with a history

    def __init__(self, *args: Any, keep: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self._wake_weight: Callable[[torch.Tensor], Any] = torch.Tensor.requires_grad_
        self._keep = keep
        self._memory.detached = not keep
        self._arrivals: dict[int, dict[Key, _Arrival]] = {}  # by backward
        self._likes: dict[int, Any] = {}  # slot -> shape, dtype and device of a gradient
        self._hooks: list[Any] = []
        self._followed: list[weak[torch.Tensor]] = []  # tensors of the model
        self._active: list[int] = []  # backwards under way, the innermost last
        self._waiting = len(self.plan.backwards)

    @contextmanager
    def mode(self, module: torch.nn.Module) -> Iterator[None]:
        """Around the run: gradients are followed; weights ask for none but those wanted."""
        try:
            with nullcontext() if self._keep else still(module) as weights, torch.enable_grad():
                if weights is not None:
                    self._wake_weight = weights.wake
                for path in self.plan.params:
                    self._wake_weight(self._host.parameter(path))
                yield
        finally:
            for hook in self._hooks:
                hook.remove()
            if not self._keep:
                forget(
                    [tensor for tensor in (one() for one in self._followed) if tensor is not None]
                )

    def fire(self, site: Site, structure: Any) -> Any:
        there = self._pending.get(site)
        if there is not None and there.follow:
            for tensor in tensors(structure):
                if not self._host.is_weight(storage(tensor)):
                    self._follow(tensor)
        return super().fire(site, structure)

    # Steps that make values

    def _call(self, step: Step) -> None:
        self._made_of(step, Interpreter._call)

    def _apply(self, step: Step) -> None:
        self._made_of(step, Interpreter._apply)

    def _made_of(self, step: Step, run: Callable[[Interpreter, Step], None]) -> None:
        if step.node.grad:
            run(self, step)
        else:
            self._silently(step, run)
        if step.follows or step.captures:
            self._note(step)

    def _silently(self, step: Step, run: Callable[[Interpreter, Step], None]) -> None:
        """A step that was recorded under `no_grad`: nothing is followed through it."""
        env = self._memory.env
        sources = [env[slot] for slot in step.uses if env[slot].requires_grad]
        with torch.no_grad():
            run(self, step)
        if not sources or (step.kind is Call and step.node.op in _STOPS):
            return
        refusal = partial(_behind_no_grad, self._line(step))
        for slot in range(step.slot, step.slot + step.outs):
            if slot in env and can_be_followed(env[slot]):
                env[slot] = walled(env[slot], sources, refusal)
        for slot in step.targets:
            if env[slot].requires_grad:
                env[slot].copy_(walled(env[slot].clone(), sources, refusal))

    def _read(self, step: Step) -> None:
        if step.follows or step.captures:
            frame, leaf = self._here(), step.node.leaf
            held = frame.now.get(leaf)
            own = held.tensor if held else frame.own(leaf, self._line(step))
            self._follow(own)
            for backward, slot in step.captures:
                self._capture(backward, slot, own)
        super()._read(step)

    def _follow(self, tensor: torch.Tensor) -> None:
        if self._host.is_weight(storage(tensor)):
            self._wake_weight(tensor)
        elif not tensor.requires_grad:
            follow(tensor)
            self._followed.append(weak(tensor))

    def _const(self, step: Step) -> None:
        super()._const(step)
        self._note(step)

    def _param(self, step: Step) -> None:
        super()._param(step)
        if step.slot in self._memory.env:  # who asks for a gradient gets it of every use
            self._memory.env[step.slot] = self._host.parameter(step.node.path)
        self._note(step)

    def _note(self, step: Step) -> None:
        """Gives values a history, and remembers where their gradients will arrive."""
        env = self._memory.env
        for slot in step.follows:
            if slot in env:
                self._follow_made(slot)
        for backward, slot in step.captures:
            if slot in env:
                self._capture(backward, slot, env[slot])

    def _follow_made(self, slot: int) -> None:
        env = self._memory.env
        tensor = env[slot]
        if tensor.requires_grad or not can_be_followed(tensor):
            return
        if self._memory.is_foreign(storage(tensor)):
            env[slot] = tensor.detach().requires_grad_()
        else:
            follow(tensor)

    # Gradients

    def _capture(self, backward: int, slot: int, tensor: torch.Tensor) -> None:
        edge = edge_of(tensor)
        if edge is None:
            return
        key = (id(edge.node), edge.output_nr)
        found = self._arrivals.setdefault(backward, {})
        arrival = found.get(key)
        if arrival is None:
            arrival = found[key] = _Arrival(edge)
            plan_step: Any = self.plan.steps[backward]
            if plan_step.taps:
                self._hooks.append(tensor.register_hook(_tap(weak(self), backward, key)))
        arrival.slots.add(slot)

    def _backward(self, step: Step) -> None:
        env = self._memory.inputs(step)
        self._waiting -= 1
        steps: list[Any] = self.plan.steps
        for slot in [steps[index].of for index in step.arrivals]:
            self._likes[slot] = (env[slot].shape, env[slot].dtype, env[slot].device)
        arrivals = list(self._arrivals.get(step.index, {}).values())
        pairs = [(env[loss], seed if seed is None else env[seed]) for loss, seed in step.losses]
        pairs = [(loss, seed) for loss, seed in pairs if loss.requires_grad]
        self._active.append(step.index)
        try:
            found = self._differentiated(step, pairs, arrivals)
        finally:
            self._active.pop()
        if not step.taps:
            for arrival, gradient in zip(arrivals, found, strict=True):
                arrival.now = gradient
        self._wake([index for index in step.arrivals if self._has_not_arrived(index)])

    def _differentiated(self, step: Step, pairs: list[Any], arrivals: list[_Arrival]) -> Any:
        if not pairs or not arrivals:
            return [None] * len(arrivals)
        with torch.enable_grad():
            return torch.autograd.grad(
                [loss for loss, _ in pairs],
                [arrival.edge for arrival in arrivals],
                [seed for _, seed in pairs],
                retain_graph=step.node.create or self._keep or self._others_to_come(),
                create_graph=step.node.create,
                allow_unused=True,
            )

    def _others_to_come(self) -> bool:
        """Whether another backward may need the history: a later one, or one within which this
        one runs, because what it waits for came while its gradients flow."""
        return self._waiting > 0 or len(self._active) > 1

    def _has_not_arrived(self, index: int) -> bool:
        step: Any = self.plan.steps[index]
        taps: Any = self.plan.steps[step.node.backward]
        arrival = self._arrival(step)
        return not taps.taps or arrival is None or arrival.now is None

    def _arrival(self, step: Step) -> _Arrival | None:
        found = self._arrivals.get(step.node.backward, {}).values()
        return next((arrival for arrival in found if step.of in arrival.slots), None)

    def tapped(self, backward: int, key: Key, gradient: torch.Tensor) -> torch.Tensor | None:
        """A gradient arrives while others still flow: what becomes of it."""
        if not self._active or self._active[-1] != backward:
            return None
        arrival = self._arrivals[backward][key]
        arrival.now = gradient
        steps: list[Any] = self.plan.steps
        mine = [n for n in steps[backward].arrivals if steps[n].of in arrival.slots]
        self._wake(mine)
        with torch.enable_grad():
            self._drain()
        for index in mine:
            if self._waits[index]:
                raise late_gradient(self.graph, self.plan, self._waits, index)
        changed = arrival.now is not gradient
        if not changed:
            return None
        return arrival.now if steps[backward].node.create else arrival.now.detach()

    def _grad(self, step: Step) -> None:
        arrival = self._arrival(step)
        gradient = None if arrival is None else arrival.now
        if gradient is None:
            gradient = self._nothing(step)
        gradient = gradient.contiguous()
        if step.slot in self.plan.written:
            gradient = gradient.clone()
        self._give(step, [gradient])
        self._note(step)

    def _nothing(self, step: Step) -> torch.Tensor:
        """The gradient of a value that the losses do not depend on."""
        like: Any = self._likes[step.of]
        if step.kind is Grad and step.node.zeros:
            return torch.zeros(like[0], dtype=like[1], device=like[2])
        return _raise(self._independent(step))

    def _regrad(self, step: Step) -> None:
        arrival = self._arrival(step)
        if arrival is None or arrival.now is None:
            raise self._independent(step)
        slot = step.uses[0]
        value, present = self._memory.inputs(step)[slot], arrival.now
        if value.shape != present.shape or not can_be_followed(value):
            raise WriteMismatchError(
                f"the gradient is {type_text(present)}, but {type_text(value)} is put in its place",
                line=self._line(step),
                fix="give a tensor of the value's own shape",
            )
        if self.plan.is_written_after(slot, step.index):
            value = value.clone()
        arrival.now = value.to(device=present.device, dtype=present.dtype)

    def _independent(self, step: Step) -> GradientError:
        backward: Any = self.plan.steps[step.node.backward]
        return GradientError(
            f"the loss at {self._line(backward)} does not depend on {self._name(step.of)}, "
            "so there is no gradient of it",
            line=self._line(step),
            fix="ask for the gradient of a value that the loss is made of: of the tensor itself, "
            "not of a part or a copy that was taken of it",
        )

    def _name(self, slot: int) -> str:
        node = self.plan.nodes[self.plan.maker[slot]]
        if isinstance(node, Read):
            return f"{node.site}{leaf_text(node.leaf)}"
        if isinstance(node, Param):
            return f"the weight {node.path!r}"
        if isinstance(node, Const):
            return "this client tensor"
        made = f"torch.{node.op}" if isinstance(node, Call) else f"a {type(node).__name__.lower()}"
        return f"this result of {made}"


def _tap(run: Any, backward: int, key: Key) -> Callable[[torch.Tensor], torch.Tensor | None]:
    """A hook that holds no run."""

    def hook(gradient: torch.Tensor) -> torch.Tensor | None:
        alive = run()
        return None if alive is None else alive.tapped(backward, key, gradient)

    return hook


def _behind_no_grad(line: object) -> GradientError:
    return GradientError(
        "a gradient is needed of what was computed under torch.no_grad() (or in the forward of a "
        "torch.autograd.Function, whose backward is not recorded)",
        line=line,
        fix="compute it with gradients; or, if none shall flow here, say so with .detach()",
    )


def _raise(error: Exception) -> Any:
    raise error


GradientInterpreter.table = {
    **Interpreter.table,
    Read: GradientInterpreter._read,
    Call: GradientInterpreter._call,
    Apply: GradientInterpreter._apply,
    Const: GradientInterpreter._const,
    Param: GradientInterpreter._param,
    Backward: GradientInterpreter._backward,
    Grad: GradientInterpreter._grad,
    Regrad: GradientInterpreter._regrad,
}


def interpreter(graph: Graph, *args: Any, keep: bool = False, **options: Any) -> Interpreter:
    """The interpreter that a graph needs; with `keep` one that keeps what autograd knows."""
    if keep or has_gradients(graph.nodes):
        return GradientInterpreter(graph, *args, keep=keep, **options)
    return Interpreter(graph, *args, **options)
