"""One call of a module of the user's own, and what was changed inside it: see `insides`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from weft.errors import LateEditError, RecordingError
from weft.graph.node import Apply, Call, Const, Guard, Param, Read, Ref, inputs_of
from weft.graph.passes import roots
from weft.graph.site import Leaf
from weft.signatures.structure import put_together, take_apart

from .containers import flatten
from .current import current
from .lines import where
from .value import Value

if TYPE_CHECKING:
    from .insides import Insides

_COMPUTING = (Call, Apply, Guard, Read, Const, Param)
"""Kinds of nodes that can be recorded a second time without anybody noticing."""
SOURCES = (Read, Const, Param)


class Part(NamedTuple):
    """A part of a module that stands in the tree at `top`, as one invoke sees it, and in a
    generation one step."""

    invoke: int | None
    step: int
    top: str
    module: int  # its id


class Port(NamedTuple):
    """One port of one call of a part. `number` counts the calls of the part."""

    part: Part
    port: str
    number: int


class Seen(NamedTuple):
    """What stood at a port, in which run of the module, and which node came next."""

    run: Run
    structure: Any
    following: int


Changes = Mapping[Leaf, tuple[bool, Any]]
"""What a leaf becomes, and whether that is copied into the tensor that stands there."""


class Run:
    """One call of a module, and what was changed inside it."""

    def __init__(
        self,
        insides: Insides,
        top: str,
        shown: str,
        module: torch.nn.Module,
        args: tuple,
        kwargs: dict,
    ) -> None:
        self.recorder = insides.recorder
        self.top = top
        self.shown = shown
        self.insides = insides
        self.changes: dict[Port, dict[Leaf, tuple[bool, Any]]] = {}
        self.read: set[Ref] = set()  # results that were handed out by reading a port
        self._module = module
        self._given = args, kwargs
        self._part = insides.part(top, module)
        self._now = insides.now
        self._before = dict(insides.calls)
        self._dead: list[range] = []  # nodes of runs that an edit has replaced
        self._copies: dict[int, tuple[Port, Leaf]] = {}  # nodes that put an edit in its place
        self._nodes = range(0)
        self._edited = 0
        self._results: dict[Leaf, Any] = {}

    def begin(self) -> Any:
        result = self._run()
        self._results = dict(flatten(result))
        return result

    def again(self, port: Port, leaf: Leaf, in_place: bool, value: Any) -> None:
        """Runs the module with one more change; the result that was handed out is the new one."""
        recorder = self.recorder
        if recorder.invoke != self._part.invoke or self.insides.now != self._now:
            what = "invoke" if recorder.invoke != self._part.invoke else "step"
            raise recorder.refusal(
                f"the inside of {self.shown} is edited outside of the {what} that called it",
                "edit it there",
            )
        self._check_again(port, leaf)
        self._check_late(port, leaf, in_place, value)
        self._edited = recorder.here()
        self._dead.append(self._nodes)
        self.check_unused()
        self.changes.setdefault(port, {})[leaf] = in_place, value
        calls, seen = self.insides.calls, self.insides.seen
        for one in [one for one, what in seen.items() if what.run is self]:
            del seen[one]
        now = dict(calls)
        calls.clear()
        calls.update(self._before)
        try:
            new = dict(flatten(self._run()))
        finally:
            calls.update({key: max(count, calls.get(key, 0)) for key, count in now.items()})
        self._become(new)

    def owns(self, ref: Ref) -> bool:
        """Whether a result was made by this call, with its edits or without."""
        return ref.node in self._nodes or any(ref.node in dead for dead in self._dead)

    # -- running ----------------------------------------------------------------------------

    def _run(self) -> Any:
        recorder = self.recorder
        first = len(recorder.nodes)
        args, kwargs = self._given
        with self._observed():
            result = self._module(*args, **kwargs)
        self._nodes = range(first, len(recorder.nodes))
        return result

    @contextmanager
    def _observed(self) -> Iterator[None]:
        """Inside, the parts of the module tell what they take and give, to this run only."""
        watch = _Watch(self)
        parts = list(self._module.modules())
        key: Any = watch
        try:
            for part in parts:
                part._forward_pre_hooks_with_kwargs[key] = True
                part._forward_pre_hooks[key] = watch.before
                part._forward_hooks[key] = watch.after
            yield
        finally:
            for part in parts:
                part._forward_hooks.pop(key, None)
                part._forward_pre_hooks.pop(key, None)
                part._forward_pre_hooks_with_kwargs.pop(key, None)

    def began(self, part: torch.nn.Module, given: tuple) -> tuple[int, tuple]:
        """A part is called: the number of the call, and what it is called with."""
        calls, key = self.insides.calls, self._part._replace(module=id(part))
        number = calls.get(key, 0)
        calls[key] = number + 1
        return number, self._shown(Port(key, "inputs", number), given)

    def returned(self, part: torch.nn.Module, number: int, output: Any) -> Any:
        port = Port(self._part._replace(module=id(part)), "output", number)
        return self._shown(port, output)

    def _shown(self, port: Port, structure: Any) -> Any:
        changes = self.changes.get(port)
        if changes:
            structure = self._changed(port, structure, changes)
        self.insides.seen[port] = Seen(self, structure, len(self.recorder.nodes))
        return structure

    def _changed(self, port: Port, structure: Any, changes: Changes) -> Any:
        """A structure with changes at its leaves; those in place are copied into what is there."""
        tree, keys, leaves = take_apart(structure)
        for place, leaf in enumerate(keys):
            if leaf in changes:
                in_place, value = changes[leaf]
                if in_place:
                    leaves[place].copy_(value)
                    self._copies[len(self.recorder.nodes) - 1] = port, leaf
                else:
                    leaves[place] = value
        return put_together(tree, leaves)

    # -- what an edit asks ------------------------------------------------------------------

    def _check_again(self, port: Port, leaf: Leaf) -> None:
        """Raises where a second run, for an edit of this leaf, would do something twice."""
        recorder = self.recorder
        nodes = tuple(recorder.nodes)
        owner = roots(nodes)
        first = self._nodes.start
        taken: set[Ref] = set()  # what the run has used of all that was there before
        for number in self._nodes:
            if self._copies.get(number) == (port, leaf):
                continue  # an edit that this one takes the place of
            node = nodes[number]
            taken.update([owner.get(ref, ref) for ref in inputs_of(node)])
            outside = any(owner.get(ref, ref).node < first for ref in _written(node))
            if outside or not isinstance(node, _COMPUTING):
                raise recorder.refusal(
                    f"{self.shown} changes more than its own values, at "
                    f"{where(recorder.line_of(node.at))}, so the inside of its call cannot be "
                    "edited: it would happen twice",
                    "call its parts one after another, and edit what is between them",
                )

        for node in nodes[self._nodes.stop :]:
            for ref in _written(node):
                root = owner.get(ref, ref)
                if root.node < first and root in taken:
                    raise recorder.refusal(
                        f"the inside of {self.shown} is edited after what its call was given has "
                        f"changed, at {where(recorder.line_of(node.at))}",
                        "move the edit up, right below the call",
                    )

    def _check_late(self, port: Port, leaf: Leaf, in_place: bool, value: Any) -> None:
        """Raises where an edit is made of what comes later in the same call."""
        nodes = self.recorder.nodes
        place = self._steps(self._nodes.start, self.insides.seen[port].following)
        waiting = list(inputs_of(nodes[-1])) if in_place else _refs(value)
        seen: set[Ref] = set()
        while waiting:
            ref = waiting.pop()
            if ref in seen:
                continue
            seen.add(ref)
            own = [run for run in (*self._dead, self._nodes) if ref.node in run]
            if not own:
                waiting += inputs_of(nodes[ref.node])
            elif self._steps(own[0].start, ref.node) >= place:
                raise LateEditError(
                    f"a value inside {self.shown} is edited with one that its call makes later, at "
                    f"{where(self.recorder.line_of(nodes[ref.node].at))}",
                    line=where(self.recorder.line()),
                    fix="edit what comes after it",
                )

    def _steps(self, first: int, last: int) -> int:
        """How many steps of the module itself are among these nodes."""
        nodes = self.recorder.nodes
        numbers = [n for n in range(first, last) if not isinstance(nodes[n], SOURCES)]
        return len([number for number in numbers if number not in self._copies])

    def check_unused(self) -> None:
        """Raises where something of a run that an edit has replaced is used outside of it."""
        if not self._dead:
            return
        nodes = self.recorder.nodes
        for number in range(self._dead[0].stop, len(nodes)):
            if any(number in dead for dead in self._dead) or number in self._nodes:
                continue
            node = nodes[number]
            for ref in inputs_of(node):
                if ref not in self.read and self._is_dead(ref):
                    raise self._used(node.at)

    def _is_dead(self, ref: Ref) -> bool:
        if ref.node in self._nodes or isinstance(self.recorder.nodes[ref.node], SOURCES):
            return False
        return any(ref.node in dead for dead in self._dead)

    def _used(self, at: int) -> RecordingError:
        recorder = self.recorder
        return RecordingError(
            f"{self.shown} is edited inside, at {where(recorder.line_of(self._edited))}, but what "
            f"its call gave without the edit is used at {where(recorder.line_of(at))}",
            line=where(recorder.line_of(self._edited)),
            fix="edit the inside between the call and the first use of its result",
        )

    def _become(self, new: Mapping[Leaf, Any]) -> None:
        """Makes the handles that the user has stand for the new results."""
        if new.keys() != self._results.keys():
            raise self._other()
        for leaf, old in self._results.items():
            now = new[leaf]
            if not isinstance(old, Value):
                if isinstance(now, Value) or not _same(old, now):
                    raise self._other()
                continue
            if not isinstance(now, Value) or now._aval != old._aval:
                raise self._other()
            if now._ref == old._ref:
                continue
            if not any(old._ref.node in dead for dead in self._dead):
                raise self._other()  # what was handed out is the argument itself
            old._ref, old._family, old._time, old._at = now._ref, now._family, now._time, now._at

    def _other(self) -> RecordingError:
        return self.recorder.refusal(
            f"with this edit inside, {self.shown} gives something else than its call has given",
            "call its parts one after another, and edit what is between them",
        )


class _Watch:
    """The hooks of one run of a module. Another thread's call of the same module is not ours."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._open: list[int] = []

    def before(self, part: torch.nn.Module, args: tuple, *rest: Any) -> Any:
        if current() is not self._run.recorder or not rest:
            return None
        number, given = self._run.began(part, (args, rest[0]))
        self._open.append(number)
        return given

    def after(self, part: torch.nn.Module, args: tuple, *rest: Any) -> Any:
        if current() is not self._run.recorder or not self._open:
            return None
        return self._run.returned(part, self._open.pop(), rest[-1])


def _written(node: Any) -> tuple[Ref, ...]:
    """The results into which a node writes."""
    return node.writes if isinstance(node, Call) else ()


def _refs(value: Any) -> list[Ref]:
    return [value._ref] if isinstance(value, Value) else []


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return one is other
    return type(one) is type(other) and one == other
