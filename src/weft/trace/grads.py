"""Gradients in a block: `loss.backward()`, `.grad`, `torch.autograd.grad`.

    loss.backward()
    g = model.h[5].output.grad.save()       # as torch has it: the sum of all backwards so far

    with loss.backward():
        model.h[5].output.grad[:, 0] = 0    # this backward's own, as it flows: what lies behind
        g = model.h[2].output.grad.save()   # sees the change; in any order

Before the first backward `.grad` is that of the next one, as it flows. `flows` has
the noun, `finish` brings nodes into an order in which everything looks back, `given` adds the
gradients of client tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from weft.errors import GradientError
from weft.graph.gradients import invokes_behind, reaching
from weft.graph.node import Backward, Param, Read, Ref, inputs_of
from weft.graph.passes import roots

from .flows import Block, Flow, Pass
from .given import Given
from .lines import user_line, where
from .trained import trained_here
from .value import Owner, Value, short

if TYPE_CHECKING:
    from .recorder import Recorder


class Gradients:
    """The backwards of one recording. Made when the first gradient is asked for."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.passes: list[Pass] = []
        self.upcoming: Pass | None = None
        self.inside: list[Pass] = []
        self.nodes: dict[int, Flow] = {}  # by the nodes that read and replace it
        self.sums: dict[Any, tuple[int, Value | None]] = {}  # of a value: passes added up, and what
        self.given = Given(self)

    @property
    def time(self) -> int:
        """When the last backward can run."""
        return max([one.time for one in self.passes], default=-1)

    def open_passes(self) -> list[Pass]:
        """The backwards whose gradients can still be replaced on this line."""
        return self.inside if self.upcoming is None else [*self.inside, self.upcoming]

    # -- loss.backward() ---------------------------------------------------------------------

    def backward(
        self,
        loss: Any,
        gradient: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> Block:
        """`loss.backward(...)`. The graph of autograd is kept where a later backward needs it."""
        run, self.upcoming = self.upcoming or self._new(), None
        if inputs is not None:
            given = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
            run.only = tuple([one for one in given if not isinstance(one, Value)])
        self._record(run, [loss], [gradient], create_graph)
        return Block(self, run)

    def autograd_grad(
        self,
        outputs: Any,
        inputs: Any,
        grad_outputs: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        only_inputs: bool = True,
        allow_unused: bool | None = None,
        is_grads_batched: bool = False,
        materialize_grads: bool = False,
    ) -> tuple[Value | None, ...]:
        """`torch.autograd.grad(...)`."""
        if is_grads_batched or not only_inputs:
            raise self.recorder.refusal(
                "torch.autograd.grad with is_grads_batched=True or only_inputs=False cannot be "
                "recorded",
                "call it once for each of the gradients",
            )
        losses, wanted = _listed(outputs), _listed(inputs)
        seeds = [None] * len(losses) if grad_outputs is None else _listed(grad_outputs)
        run = self._new()
        run.adds_up = False
        self._record(run, losses, seeds, create_graph)
        return tuple([self._of(run, one, allow_unused, materialize_grads) for one in wanted])

    def _of(self, run: Pass, one: Any, unused: bool | None, zeros: bool) -> Value | None:
        value = self._known(one)
        if not zeros and not self._may_depend(run, value):
            if unused:
                return None
            raise self._independent(run, value)
        return self._flow(run, value).read(zeros)

    def _new(self) -> Pass:
        run = Pass(len(self.passes))
        self.passes.append(run)
        return run

    def _record(self, run: Pass, losses: list[Any], seeds: list[Any], create: bool) -> None:
        recorder = self.recorder
        if len(seeds) != len(losses):
            raise recorder.refusal("there are more or fewer gradients than losses", "give each one")
        known = [self._known(loss) for loss in losses]
        refs = [self._seed(one, seed) for one, seed in zip(known, seeds, strict=True)]
        run.at = recorder.here()
        run.node = recorder.append(
            Backward(
                losses=tuple([loss._ref for loss in known]),
                seeds=tuple(refs) if any(ref is not None for ref in refs) else (),
                create=bool(create),
                at=run.at,
            )
        ).node
        run.time = max([max(loss._time, loss._family.time) for loss in known])
        self.given.meet()

    def _seed(self, loss: Any, seed: Any) -> Ref | None:
        if seed is None:
            if loss._aval.shape.numel() != 1:
                raise self.recorder.refusal(
                    f"a loss of shape {list(loss._aval.shape)} is not one number, so it has no "
                    "gradient of its own",
                    "sum it up, or give its gradient: loss.backward(gradient)",
                )
            return None
        known = self._known(seed)
        if known._aval.shape != loss._aval.shape:
            raise self.recorder.refusal(
                f"the loss is {short(loss._aval)}, but its gradient {short(known._aval)}",
                "give a gradient of the loss's own shape",
            )
        return known._ref

    def _known(self, one: Any) -> Any:
        """A value, or what stands for a client tensor; of a dtype that has gradients."""
        recorder = self.recorder
        if not isinstance(one, torch.Tensor):
            raise recorder.refusal(f"a {type(one).__name__} has no gradient", "give a tensor")
        value = recorder.own(one) if isinstance(one, Value) else one
        if not isinstance(value, Value):
            value = recorder.clients.use(value)
        dtype = value._aval.dtype
        if not (dtype.is_floating_point or dtype.is_complex):
            raise GradientError(
                f"{short(value._aval)} has no gradient: only floating tensors have",
                line=where(recorder.line()),
                fix="take the gradient of what it was made of, before it became whole numbers",
            )
        return value

    # -- .grad -------------------------------------------------------------------------------

    def read(self, value: Any) -> Value | None:
        """`value.grad`."""
        value = self._known(value)
        if self.inside:
            return self._flow(self.inside[-1], value).read()
        if self._none_yet(value):
            if self.upcoming is None:
                self.upcoming = self._new()
            return self._flow(self.upcoming, value).read()
        return self._sum(value)

    def write(self, value: Any, new: Any) -> None:
        """`value.grad = new`."""
        recorder, known = self.recorder, self._known(value)
        if self.inside:
            return self._flow(self.inside[-1], known).write(new)
        if self._none_yet(known):
            if self.upcoming is None:
                self.upcoming = self._new()
            return self._flow(self.upcoming, known).write(new)
        _, held = self.sums.get(self._key(known), (0, None))
        if new is None:
            self.sums[self._key(known)] = (len(self.added()), None)
        elif not (isinstance(new, Value) and held is not None and new._ref == held._ref):
            raise recorder.refusal(
                "a gradient was assigned after its backward, where it would change nothing",
                "assign it inside `with loss.backward():`, so that it flows on from there",
            )
        return None

    def of_client(self, tensor: torch.Tensor) -> Any:
        """`.grad` of a client tensor inside the block: with what the backwards so far add to it."""
        client = self.recorder.clients.use(tensor)
        total = self._sum(client)
        trained = trained_here()
        with torch._C.DisableTorchFunction():
            before: Any = tensor.grad if trained is None else trained.grad_of(tensor)
        if total is None or before is None:
            return before if total is None else total
        return total + before

    def concerns(self, func: Any, args: tuple) -> bool:
        """Whether a torch call is a look at the gradient of a client tensor of this block."""
        if func != CLIENT_GRAD or not self.added():
            return False
        with torch._C.DisableTorchFunction():
            tensor = args[0]
            return tensor.requires_grad and id(tensor) in self.recorder.clients.taken

    def added(self) -> list[Pass]:
        """The backwards that add to `.grad` and stand before this line."""
        return [one for one in self.passes if one.adds_up and one.node is not None]

    def _none_yet(self, value: Any) -> bool:
        """Whether `.grad` on this line is that of the next backward: there is none before it, or
        in a block of several invokes none that has to do with the value."""
        added = self.added()
        if not added or self.recorder.invokes is None:
            return not added
        return not any(self._may_depend(one, value) for one in added)

    def _sum(self, value: Any) -> Value | None:
        """What all backwards so far add up to, as in `.grad`; None after it was set to None."""
        passes, key = self.added(), self._key(value)
        total: Any
        count, total = self.sums.get(key, (0, None))
        fresh = [one for one in passes[count:] if self._may_depend(one, value)]
        if not fresh and not count:
            raise self._independent(passes[-1], value)
        for one in fresh:
            gradient = self._flow(one, value).read(zeros=len(passes) > 1)
            total = gradient if total is None else total + gradient
        self.sums[key] = (len(passes), total)
        return None if total is None else self.recorder.handle(total)

    def _flow(self, run: Pass, value: Any) -> Flow:
        key = self._key(value)
        found = run.flows.get(key)
        if found is None:
            found = run.flows[key] = Flow(self, run, value)
        return found

    def _key(self, value: Any) -> Any:
        """The same for every handle on the same tensor."""
        state = value._family.leaf
        if state is not None and value._ref == value._family.root and not isinstance(state, Owner):
            return id(state), value._family.version
        return value._ref

    def _may_depend(self, run: Pass, value: Any) -> bool:
        """Whether the losses may depend on a value, by what is recorded so far."""
        recorder, node = self.recorder, self.recorder.nodes[value._ref.node]
        if run.node is None:
            return True
        if isinstance(node, Read):
            if recorder.invokes is None:
                return value._time <= run.time
            everything = tuple(recorder.nodes)
            losses = inputs_of(everything[run.node])
            return node.site.invoke in invokes_behind(everything, losses, roots(everything))
        if isinstance(node, Param):
            return True
        nodes = tuple(recorder.nodes[: run.node + 1])
        if value._ref.node >= run.node:
            return False
        return bool(reaching(nodes, roots(nodes))[value._ref.node] >> self.bit(run) & 1)

    def bit(self, run: Pass) -> int:
        return sum([one.node is not None and one.node < run.node for one in self.passes])  # type: ignore[operator]

    def _independent(self, run: Pass, value: Any) -> GradientError:
        recorder = self.recorder
        return GradientError(
            f"the loss at {where(recorder.line_of(run.at))} does not depend on this value "
            f"({short(value._aval)}), made at {where(recorder.line_of(value._at))}, so there is "
            "no gradient of it",
            line=where(user_line()) if recorder.open else where(recorder.line_of(value._at)),
            fix="ask for the gradient of what the loss is made of: of the tensor itself, not of a "
            "part or a copy that was taken of it",
        )


CLIENT_GRAD = torch.Tensor.grad.__get__  # type: ignore[attr-defined]


def _listed(given: Any) -> list[Any]:
    return [given] if isinstance(given, torch.Tensor) else list(given)
