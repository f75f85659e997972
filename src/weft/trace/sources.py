"""`module.source`: the operations inside a forward, as a block sees them.

    print(model.h[3].attn.source)                             # the text, with their names
    pattern = model.h[3].attn.source.attention_interface_0.output[1]
    model.h[3].mlp.source.self_act_0.output *= 2
    model.h[3].attn.source.attention_interface_0.source       # inside the function called there

Names come from the text of the forward where the model is; they are strings and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from weft.errors import SourceError, UnknownPathError
from weft.graph.node import Mark
from weft.graph.site import inside_of, is_inside, operations_of
from weft.signatures.inside import shown, unknown_operation
from weft.sources.listing import Listing

from .current import current
from .lines import user_line, where

if TYPE_CHECKING:
    from .recorder import Recorder
    from .tree import Root

Way = tuple[str, ...]


class Source:
    """The source of a module's forward, or of a function that it calls. Attributes are operations.

    Printed, it shows the text with the names. `names` has them all, `text` is the text alone,
    `digest` its SHA-256, which travels with every graph that names something in it.
    """

    def __init__(self, root: Root, path: str, way: Way) -> None:
        self._root = root
        self._path = path
        self._way = way
        self._listing: Listing = _at_line(root.listing, path, way, call_now(root))

    @property
    def text(self) -> str:
        """The text, as it is where the model is."""
        return self._listing.text

    @property
    def digest(self) -> str:
        """SHA-256 of the text."""
        return self._listing.digest

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all operations, in the order of the text."""
        return tuple([one.name for one in self._listing.operations])

    def __getattr__(self, name: str) -> Operation:
        if name.startswith("__"):
            raise AttributeError(name)
        return Operation(self, self._name(name))

    def __getitem__(self, name: str) -> Operation:
        return Operation(self, self._name(name))

    def _name(self, name: str) -> str:
        try:
            return self._listing.find(name).name
        except LookupError:
            line = where(user_line())
            place = shown(self._path, self._way)
            raise unknown_operation(self._listing, name, place, line) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        what = self._name(name)  # says so where there is none
        raise AttributeError(f"{what} is a call; assign to its .output: .{what}.output = ...")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *self.names})

    def __repr__(self) -> str:
        return self._listing.shown()


class Operation:
    """One call in a source: has the same sites as a module, and a source where it has one.

    Printed, it shows its lines.
    """

    def __init__(self, source: Source, name: str, call: int | None = None) -> None:
        self._source = source
        self._name = name
        self._call = call

    @property
    def output(self) -> Any:
        """What the call gives: read it, edit it, assign it."""
        recorder, place = self._place("output")
        return recorder.sites.read(recorder.sites.state(*place))

    @output.setter
    def output(self, value: Any) -> None:
        recorder, place = self._place("output")
        recorder.sites.write(recorder.sites.state(*place), value)

    @property
    def inputs(self) -> Any:
        """All arguments of the call: `(args, kwargs)`."""
        recorder, place = self._place("inputs")
        return recorder.sites.read(recorder.sites.state(*place))

    @inputs.setter
    def inputs(self, value: Any) -> None:
        recorder, place = self._place("inputs")
        recorder.sites.write(recorder.sites.state(*place), value)

    @property
    def input(self) -> Any:
        """The first tensor among the arguments."""
        recorder, place = self._place("inputs")
        return recorder.sites.read_leaf(recorder.first_input(*place))

    @input.setter
    def input(self, value: Any) -> None:
        recorder, place = self._place("inputs")
        recorder.sites.write_leaf(recorder.first_input(*place), value)

    def skip(self, value: Any) -> None:
        """The call does not happen: it gives `value`, in the structure that it would give."""
        recorder, (path, port, call) = self._place("output")
        recorder.skip(path, value, call, port)

    @property
    def source(self) -> Source:
        """The source of the function that is called here."""
        source = self._source
        return Source(source._root, source._path, (*source._way, self._name))

    @property
    def calls(self) -> Runs:
        """The single runs of an operation that runs several times in a pass: `.calls[1].output`."""
        return Runs(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in ("output", "input", "inputs"):
            raise AttributeError(f"an operation has no site {name!r} to assign to")
        object.__setattr__(self, name, value)

    def _place(self, last: str) -> tuple[Recorder, tuple[str, str, int | None]]:
        source = self._source
        port = f"{inside_of((*source._way, self._name))}{last}"
        recorder = source._root.recorder(source._path, port)
        return recorder, (source._path, port, self._call)

    def __repr__(self) -> str:
        return self._source._listing.shown(self._name)


class Runs:
    """`operation.calls[k]`: the sites of its k-th run within the pass."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation

    def __len__(self) -> int:
        recorder, (path, port, _) = self._operation._place("inputs")
        learn(recorder, path, self._operation._source._way)
        return recorder.signature.calls(path, port)

    def __getitem__(self, index: int) -> Operation:
        count, one = len(self), self._operation
        if not -count <= index < count:
            raise IndexError(f"{one._name} runs {count} times, not {index}")
        return Operation(one._source, one._name, index % count)


def runs_instead(recorder: Recorder, path: str, port: str) -> str | None:
    """What to do about an operation that does not run: its namesakes may. None for a module."""
    if not is_inside(port):
        return None
    way, name = operations_of(port)[:-1], operations_of(port)[-1]
    source = Source(cast("Root", recorder.owner), path, way)
    others = [one for one in source.names if one != name and _stem(one) == _stem(name)]
    inside = inside_of(way)
    run = [one for one in others if recorder.signature.calls(path, f"{inside}source.{one}.inputs")]
    if run:
        return f"the pass goes another way through the source: {', '.join(run[:4])} runs"
    return f"use an operation that runs; print({shown(path, way)}) shows them"


def _stem(name: str) -> str:
    return name.rpartition("_")[0]


def call_now(root: Root) -> Any:
    """The call of the block that is recorded on this model now, if there is one."""
    recorder = current()
    if recorder is None or recorder.owner is not root or recorder.invoke is None:
        return None
    return recorder.calls[recorder.invoke] if recorder.steps is None else recorder.steps.forward()


def learn(recorder: Recorder, path: str, way: Way) -> None:
    """The recorder learns the sites of a source, and marks it in its graph."""
    if recorder.invoke is None:
        recorder.sites.state(path, "inputs", None)  # says what is missing, or makes it
    if recorder.root is not None:
        raise recorder.refusal(
            f"operations inside a forward are no sites of a call of {recorder.root!r}",
            "use the modules' own sites, or trace the forward: leave out fn=",
        )
    if ("inside", path, way) in recorder.signature.kept and (path, way) in recorder.sources:
        return
    if recorder.steps is not None:
        _mark(recorder, recorder.steps.forward(), path, way)
        _at_line(recorder.steps.learn, path, way)
        return
    known_inside(recorder, recorder.signature, recorder.invoke or 0, path, inside_of((*way, "-")))


def known_inside(recorder: Recorder, signature: Any, invoke: int, path: str, port: str) -> None:
    """Of one invoke: its signature learns the sites of the source that a port is inside of."""
    root: Any = recorder.owner
    way, call = operations_of(port)[:-1], recorder.calls[invoke]
    _mark(recorder, call, path, way)
    _at_line(root.learn, signature, call, path, way)


def _mark(recorder: Recorder, call: Any, path: str, way: Way) -> None:
    """The sources on the way are in the graph."""
    root: Any = recorder.owner
    for depth in range(len(way) + 1):
        place = path, way[:depth]
        if place not in recorder.sources:
            found: Listing = _at_line(root.listing, *place, call)
            recorder.sources[place] = Mark(path=path, digest=found.digest, inside=way[:depth])


def _at_line(function: Any, *args: Any) -> Any:
    """The function's result; its refusals with the user's line."""
    try:
        return function(*args)
    except (SourceError, UnknownPathError) as error:
        if error.line is not None:
            raise
        raise type(error)(error.message, line=where(user_line()), fix=error.fix) from None
