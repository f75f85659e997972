"""The inside of a user's own module, called in a block: what its parts took and gave.

The module runs here, while the block is recorded, and its operations become nodes like any others.
While it does, every part of it tells what it takes and gives, so that afterwards these can be read
by path (`attached`). What they gave can be changed, too, until the result of the call is used: then
the module runs once more, with the change in its place, and the result that was handed out becomes
the new one. Nothing of the first run is left in the graph but what had been read of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from weft.errors import (
    NotReachedError,
    WriteMismatchError,
)
from weft.graph.site import Leaf, leaf_text
from weft.signatures.structure import put_together, take_apart

from .called import Part, Port, Run, Seen
from .containers import flatten
from .inner import Inner
from .lines import where
from .value import Value

if TYPE_CHECKING:
    from .recorder import Recorder


class Insides:
    """All that modules of the user's own have shown in one block."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.seen: dict[Port, Seen] = {}
        self.calls: dict[Part, int] = {}  # how often each was called
        self.states: dict[tuple[Port, Leaf], Inner] = {}
        self.runs: list[Run] = []

    def call(self, top: str, shown: str, module: torch.nn.Module, args: tuple, kwargs: dict) -> Any:
        """Runs a module of the user's own, and remembers what its parts take and give."""
        run = Run(self, top, shown, module, args, kwargs)
        self.runs.append(run)
        return run.begin()

    def part(self, top: str, module: torch.nn.Module) -> Part:
        return Part(self.recorder.invoke, self.now or 0, top, id(module))

    @property
    def now(self) -> int | None:
        """The step of a generation whose sites are meant; None outside of its loops."""
        steps = self.recorder.steps
        return None if steps is None else steps.now

    def port(self, part: Part, shown: str, port: str, number: int | None) -> Port:
        """A port of the only call of a part, or of the one that is meant."""
        recorder = self.recorder
        count = self.calls.get(part, 0)
        if not count:
            raise NotReachedError(
                f"{shown}.{port} does not exist: {shown} has not been called "
                + ("in this block" if recorder.steps is None else f"at step {self.now or 0}"),
                line=where(recorder.line()),
                fix="call it by its place in the tree, above this line: it runs where the call is",
            )
        if number is None and count > 1:
            raise recorder.refusal(
                f"{shown} was called {count} times here, so .{port} is ambiguous",
                f"choose one: .calls[0].{port} to .calls[{count - 1}].{port}",
            )
        found = Port(part, port, number or 0)
        if found not in self.seen:
            raise NotReachedError(
                f"{shown}.{port} does not exist since the inside of its call was edited",
                line=where(recorder.line()),
                fix="read it before that edit, or leave the edit out",
            )
        return found

    def read(self, port: Port, shown: str) -> Any:
        """What stands at a port now, with fresh handles."""
        seen = self.seen[port]
        tree, keys, leaves = take_apart(seen.structure)
        handles = [
            self.state(port, shown, leaf).read(value) if isinstance(value, Value) else value
            for leaf, value in zip(keys, leaves, strict=True)
        ]
        return put_together(tree, handles)

    def first(self, port: Port, shown: str) -> Leaf:
        """The leaf that `.input` means."""
        for leaf, value in flatten(self.seen[port].structure):
            if isinstance(value, torch.Tensor):
                return leaf
        raise self.recorder.refusal(f"{shown} has no tensor among its inputs", "use .inputs")

    def write(self, port: Port, shown: str, value: Any) -> None:
        """`part.<port> = value`."""
        now = flatten(self.seen[port].structure)
        given = dict(flatten(value))
        if given.keys() != {leaf for leaf, _ in now}:
            raise WriteMismatchError(
                f"another structure is written to {shown}.{port.port} than it has",
                line=where(self.recorder.line()),
                fix="write the same structure that it has",
            )
        for leaf, old in now:
            new = given[leaf]
            if isinstance(old, torch.Tensor):
                self.state(port, shown, leaf).write(new)
            elif new is not old and new != old:
                raise WriteMismatchError(
                    f"{shown}.{port.port}{leaf_text(leaf)} is not a tensor, so it cannot become "
                    f"{new!r}",
                    line=where(self.recorder.line()),
                    fix="leave it as it is, and write only its tensors",
                )

    def state(self, port: Port, shown: str, leaf: Leaf) -> Inner:
        found = self.states.get((port, leaf))
        if found is None:
            found = self.states[port, leaf] = Inner(self, port, leaf, f"{shown}.{port.port}")
        return found

    def close(self) -> None:
        """At the end of the block: raises where what an edit has replaced was used all the same."""
        for run in self.runs:
            run.check_unused()
        self.runs.clear()  # a handle that the user keeps leads here
        self.seen.clear()
        self.states.clear()
