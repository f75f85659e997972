"""What the steps of a plan do: `Interpreter`, the loop with a method for each kind of node."""

from __future__ import annotations

from typing import Any

import torch

from weft.errors import GraphError, OverwrittenError, ReadOnlyError
from weft.graph.node import (
    DRAWS,
    Apply,
    Bound,
    Call,
    Const,
    Fill,
    Guard,
    Log,
    Param,
    Read,
    Save,
    Skip,
    Stop,
    Write,
)
from weft.kernels.execute import call, seed_of
from weft.kernels.own import COUNTED
from weft.kernels.results import flatten

from .compare import agree, check_bound, check_look, guard_error, value_of
from .cuts import cut
from .firing import type_text
from .frame import Frame
from .late import what
from .logs import handed
from .loop import Loop
from .lower import Env, lower
from .memory import storage, version
from .steps import Step, line_of
from .stops import left_out, stops
from .structure import tensors


class Interpreter(Loop):
    """One run of a graph. `backward` has the one for gradients."""

    # Steps without a site

    def _call(self, step: Step) -> None:
        if step.changes:
            self._before_write(step)
        env = self._memory.inputs(step)
        args, kwargs = step.args.build(env)  # type: ignore[union-attr]
        if self._watch is not None and step.node.op in COUNTED:
            self._watch.counted(COUNTED[step.node.op](*args, **kwargs), self._line(step))
        function = step.function
        result = function(*args, **kwargs) if function else self._made(step, args, kwargs)
        if isinstance(result, torch.Tensor) and step.outs == 1 and not step.bounds:
            self._memory.put(step, step.slot, self._verified(step, 0, result, env))
        else:
            results = enumerate(flatten(result))
            self._give(step, [self._verified(step, out, result, env) for out, result in results])

    def _made(self, step: Step, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The result of an operation that draws numbers, or makes a tensor from plain values."""
        node, key = step.node, None
        if node.draw is not None:
            seed = self.graph.seed if node.seed is None else node.seed
            key = seed_of(seed or 0, node.draw % DRAWS, 0, 0)
        return call(node.op, tuple(args), kwargs, seed_key=key, device=self._host.device)

    def _before_write(self, step: Step) -> None:
        for slot in step.changes:
            if self._host.is_weight(storage(self._memory.env[slot])):
                raise ReadOnlyError(
                    f"torch.{step.node.op} would write into a weight of the model",
                    line=self._line(step),
                    fix="edit a copy: take .clone() first",
                )
        if step.older:
            self._memory.freeze([use for use in step.older if self._waits[use[0]]])
        if self._at.direct:
            self._at.protect(step.targets)

    def _verified(self, step: Step, out: int, result: torch.Tensor, env: Env) -> torch.Tensor:
        """A result that shares storage with arguments exactly as recorded."""
        if not step.verify:
            return result
        source = step.sources[out] if out < len(step.sources) else None
        if source is not None:
            if result is not env[source] and storage(result) != storage(env[source]):
                self._refuse_copy(step, out)
            if step.slot + out in step.cuts:
                return cut(result)
        elif storage(result) in [storage(env[slot]) for slot in step.uses]:
            return result.clone()
        return result

    def _refuse_copy(self, step: Step, out: int) -> None:
        if self.plan.family[step.slot + out] in self.plan.written:
            raise GraphError(
                f"torch.{step.node.op} gave a copy where the recording had a view",
                line=self._line(step),
                fix="record the experiment on an input like this one",
            )

    def _apply(self, step: Step) -> None:
        memory = self._memory
        env = memory.inputs(step)
        given = {slot: env[slot] for slot in step.uses}
        for slot, tensor in given.items():
            if memory.is_foreign(storage(tensor)):
                given[slot] = tensor.clone()
        before = {slot: version(env[slot]) for slot in step.uses}
        args, kwargs = step.args.build(given)  # type: ignore[union-attr]
        results = [*tensors(self._host.apply(step.node.path, args, kwargs))]
        for slot in step.uses:
            if version(env[slot]) != before[slot] and not memory.is_last_use(slot):
                raise OverwrittenError(
                    f"the module {step.node.path!r} changed its argument in place",
                    line=self._line(step),
                    fix="give it a copy: x.clone()",
                )
        taken = {storage(tensor) for tensor in given.values()}
        self._give(step, [self._own(result, taken) for result in results])

    def _own(self, tensor: torch.Tensor, taken: set[int]) -> torch.Tensor:
        where = storage(tensor)
        return tensor.clone() if where in taken or self._host.is_weight(where) else tensor

    def _param(self, step: Step) -> None:
        tensor = self._host.parameter(step.node.path).detach()
        self._refuse_other(step, tensor, f"the weight {step.node.path!r}")
        self._give(step, [tensor])

    def _const(self, step: Step) -> None:
        node = step.node
        tensor = self._constants.get(node.key)
        if tensor is None:
            raise GraphError(
                f"the constant {node.key!r} is missing",
                line=self._line(step),
                fix="load the experiment with its constants",
            )
        self._refuse_other(step, tensor, f"the constant {node.key!r}")
        device = self._host.device
        if device is not None and tensor.device != device:
            tensor = tensor.to(device)
        if step.slot in self.plan.written:
            tensor = tensor.clone()
        self._memory.clients.add(storage(tensor))
        self._give(step, [tensor])

    def _refuse_other(self, step: Step, tensor: torch.Tensor, name: str) -> None:
        node = step.node
        if tensor.shape != node.shape or tensor.dtype != step.dtype:
            recorded = f"{node.dtype}{list(node.shape)}"
            raise GraphError(
                f"{name} should be {recorded}, but is {type_text(tensor)}",
                line=self._line(step),
                fix="run the experiment with the constants and the model it was recorded with",
            )

    def _guard(self, step: Step) -> None:
        node = step.node
        tensor = self._memory.inputs(step)[step.uses[0]]
        expected, _ = lower(node.expected, (), [])
        check_look(node.look, expected, tensor.shape, self._line(step))
        got = value_of(tensor, node.look)  # as many numbers as the graph itself has
        if not agree(expected, got, tensor.dtype):
            raise guard_error(node.look, expected, got, self._line(step))

    def _save(self, step: Step) -> None:
        memory = self._memory
        kept = memory.keep(step, memory.inputs(step))
        self._saves.append((step, kept))
        if self._watch is not None:
            self._watch.saved(sum([tensor.nbytes for tensor in kept.values()]), self._line(step))

    def _log(self, step: Step) -> None:
        parts, _ = step.args.build(self._memory.inputs(step))  # type: ignore[union-attr]
        if step.node.stream is None:
            self._lines.say(step.index, parts)
        elif self._on_value is not None:
            self._on_value(step.node, tuple(map(handed, parts)))

    def _give(self, step: Step, results: list[torch.Tensor]) -> None:
        if len(results) != step.outs:
            raise GraphError(
                f"{what(step.node)} gave {len(results)} tensors where {step.outs} were recorded",
                line=self._line(step),
                fix="record the experiment on an input like this one",
            )
        for slot, result in enumerate(results, step.slot):
            self._memory.put(step, slot, result)
        for bound in step.bounds:
            self._check_bound(bound, results[bound.value.out])

    def _check_bound(self, bound: Bound, tensor: torch.Tensor) -> None:
        check_bound(bound, tensor.shape, line_of(self.graph, bound))

    # Steps at a site

    def _read(self, step: Step) -> None:
        self._give(step, [self._at.read(step, self._here())])

    def _write(self, step: Step) -> None:
        self._at.write(step, self._here())

    def _fill(self, step: Step) -> None:
        self._at.fill(step, self._here())

    def _skip(self, step: Step) -> None:
        self._at.skip(step, self._here())

    def _stop(self, step: Step) -> None:
        if stops(step, self._memory, self._line(step)):
            self.stopped.add(step.node.invoke)
            self.leave_out(left_out(step.node, self._pending))

    def _here(self) -> Frame:
        assert self._frame is not None  # what stands at a site waits for it
        return self._frame


Interpreter.table = {
    Read: Interpreter._read,
    Write: Interpreter._write,
    Fill: Interpreter._fill,
    Call: Interpreter._call,
    Apply: Interpreter._apply,
    Param: Interpreter._param,
    Const: Interpreter._const,
    Guard: Interpreter._guard,
    Save: Interpreter._save,
    Log: Interpreter._log,
    Skip: Interpreter._skip,
    Stop: Interpreter._stop,
}
