"""Edits: changes that were recorded once, recorded anew at the beginning of a block.

    replay(recorder, graph, constants)      # as if the lines of the edit stood here

Every node is recorded again with the shapes of this block's input, by the same code that recorded
it first: what a batch or length does not allow is refused with the line of the edit. Only what an
edit may hold is taken (`check_edit`): a graph from a file is a stranger's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from weft.errors import EditError, WeftError
from weft.graph.node import (
    AnyNode,
    Apply,
    Arg,
    Bound,
    Call,
    Complex,
    Const,
    Fill,
    Graph,
    Map,
    Name,
    Param,
    Read,
    Ref,
    Seq,
    Shape,
    Skip,
    Slice,
    Write,
    inputs_of,
)
from weft.graph.passes import roots
from weft.graph.site import Site, Where, is_inside, operations_of
from weft.kernels.aval import Aval, aval_of
from weft.kernels.results import flatten
from weft.kernels.table import FUNCTIONS
from weft.signatures.structure import Plain

from . import containers
from .sites import LeafState
from .skips import record_skip
from .sources import learn
from .value import Sizes, Value

if TYPE_CHECKING:
    from .recorder import Recorder

KINDS = (Read, Write, Fill, Skip, Call, Apply, Param, Const)
"""What an edit may hold: it brings nothing back, looks at nothing, and ends nothing."""

_NO_LINE = Where("<unknown>", 0)


def check_edit(graph: Graph) -> None:
    """Raises `EditError` for what cannot be part of an edit. The grammar is checked elsewhere."""
    owner = roots(graph.nodes)
    for node in graph.nodes:
        if not isinstance(node, KINDS):
            says, fix = _ODD.get(type(node).__name__, _ODD[""])
            raise EditError(says, line=_line(graph, node.at), fix=fix)
        site = getattr(node, "site", None)
        if site is not None and (site.invoke or site.step):
            raise EditError(
                "an edit is about every input and step",
                line=_line(graph, node.at),
                fix="change one invoke or step in a block of the edited model",
            )
        for ref in node.writes if isinstance(node, Call) else ():
            if isinstance(graph.nodes[owner.get(ref, ref).node], Const):
                raise EditError(
                    "an edit writes into a tensor of yours, which it would do in every trace",
                    line=_line(graph, node.at),
                    fix="write into a value: torch.zeros_like(h), or tensor + torch.zeros_like(h)",
                )


_ODD = {
    "Save": (
        "an edit brings nothing back, so nothing can be saved in it",
        "save in a trace of the edited model",
    ),
    "Log": ("an edit logs nothing", "use tracer.log in a trace of the edited model"),
    "Guard": (
        "an edit holds for every input, so no number can be looked at in it",
        "keep the branch in the graph with torch.where",
    ),
    "Stop": ("an edit does not end a pass", "use tracer.stop in a trace of the edited model"),
    "": (
        "a gradient cannot be part of an edit",
        "change gradients in a trace of the edited model",
    ),
}


def replay(recorder: Recorder, graph: Graph, constants: Mapping[str, torch.Tensor]) -> None:
    """Records an edit anew. Raises `EditError` with its line where it does not fit this input."""
    noted = len(recorder.edits)
    try:
        _Replay(recorder, graph, constants).run()
    finally:
        recorder.replayed = None
    del recorder.edits[noted:]  # nobody is warned in each block that an edit has no effect there


class _Replay:
    def __init__(
        self, recorder: Recorder, graph: Graph, constants: Mapping[str, torch.Tensor]
    ) -> None:
        self._recorder = recorder
        self._graph = graph
        self._constants = constants
        self._values: dict[Ref, torch.Tensor] = {}
        self._bounds: dict[int, list[Bound]] = {}
        for bound in graph.bounds:
            self._bounds.setdefault(bound.value.node, []).append(bound)
        owner = roots(graph.nodes)
        self._owner = owner
        self._written = {
            owner.get(ref, ref)
            for node in graph.nodes
            if isinstance(node, Call)
            for ref in node.writes
        }

    def run(self) -> None:
        for number, node in enumerate(self._graph.nodes):
            with self._standing_at(node.at):
                for out, value in enumerate(_DO[type(node)](self, number, node)):
                    self._values[Ref(number, out)] = value
            for bound in self._bounds.get(number, ()):
                with self._standing_at(bound.at):
                    self._bind(bound)
        self._check_sources()

    @contextmanager
    def _standing_at(self, at: int) -> Iterator[None]:
        """Inside, the user's line is that of the edit."""
        recorder, line = self._recorder, _line(self._graph, at) or _NO_LINE
        recorder.replayed = recorder.lines.setdefault(line, len(recorder.lines))
        prefix, recorder.looks.run_prefix = recorder.looks.run_prefix, None
        try:
            yield
        except EditError:
            raise
        except WeftError as error:
            raise _misfit(error.message, line, error.fix) from error
        except (RuntimeError, TypeError, IndexError, ValueError) as error:  # torch's own
            raise _misfit(str(error), line) from error
        finally:
            recorder.looks.run_prefix = prefix

    def _check_sources(self) -> None:
        """Refuses names of operations in another text than the one that they were taken from."""
        known = self._recorder.sources
        for mark in self._graph.sources:
            found = known.get((mark.path, mark.inside))
            if found is not None and found.digest != mark.digest:
                raise EditError(
                    f"an edit of the model names operations of {mark.path or 'the model'}.source, "
                    "and its code is another one here",
                    line=self._line_in(mark.path),
                    fix="make the edit anew with this version of the code",
                )

    def _line_in(self, path: str) -> Where | None:
        """The first line of the edit that names a site of this module."""
        for node in self._graph.nodes:
            site = getattr(node, "site", None)
            if site is not None and site.path == path:
                return _line(self._graph, node.at)
        return None

    # -- nodes -------------------------------------------------------------------------------

    def _read(self, number: int, node: Read) -> list[Any]:
        leaf = self._leaf(node)
        if len(leaf.aval.shape) != len(node.shape):
            was, now = list(node.shape), list(leaf.aval.shape)
            raise self._refusal(f"{leaf} had {was} where the edit was made, and has {now} here")
        return [self._recorder.sites.read_leaf(leaf)]

    def _write(self, number: int, node: Write) -> list[Any]:
        self._recorder.sites.write_leaf(self._leaf(node), self._values[node.value])
        return []

    def _fill(self, number: int, node: Fill) -> list[Any]:
        return []  # the operation before it has recorded one

    def _skip(self, number: int, node: Skip) -> list[Any]:
        site = node.site
        if is_inside(site.port):
            learn(self._recorder, site.path, operations_of(site.port)[:-1])
        signature: Any = self._recorder.signature.site(site.path, site.port, site.call)
        given = dict(zip(node.leaves, node.values, strict=True))
        found = []
        for leaf, what in signature.leaves:
            if isinstance(what, Aval):
                if leaf not in given:
                    raise self._refusal(f"the edit skips {site.path} without a value at {leaf}")
                found.append(self._values[given.pop(leaf)])
            else:
                found.append(what.value if isinstance(what, Plain) else None)
        if given:
            raise self._refusal(f"{site} has no tensor at {min(given, key=str)} here")
        value = signature.rebuild(found)
        record_skip(self._recorder, site.path, value, site.call, site.port)
        return []

    def _call(self, number: int, node: Call) -> list[Any]:
        recorder = self._recorder
        before = len(recorder.nodes)
        args = tuple([self._raised(arg) for arg in node.args])
        kwargs = {key: self._raised(arg) for key, arg in node.kwargs}
        with torch.set_grad_enabled(node.grad and torch.is_grad_enabled()):
            got = recorder.operations.record(node.op, FUNCTIONS[node.op], args, kwargs)
        made = next(one for one in recorder.nodes[before:] if isinstance(one, Call))
        self._check_alike(number, node, made)
        return flatten(got)

    def _check_alike(self, number: int, node: Call, made: Call) -> None:
        """Refuses what shares memory otherwise than it did, where somebody writes into it."""
        if made.outs != node.outs:
            raise self._refusal(
                f"torch.{node.op} gave {node.outs} tensors where the edit was made, and gives "
                f"{made.outs} here"
            )
        for out in range(node.outs):
            then = node.alias[out] if node.alias else None
            now = made.alias[out] if made.alias else None
            if (then is None) == (now is None):
                continue
            touched = {self._owner.get(Ref(number, out), Ref(number, out))}
            touched |= {self._owner.get(ref, ref) for ref in inputs_of(node)}
            if touched & self._written:
                kinds = ("a copy", "a view") if then is None else ("a view", "a copy")
                raise self._refusal(
                    f"torch.{node.op} gave {kinds[0]} where the edit was made, and gives "
                    f"{kinds[1]} here, and one of them is written into",
                    fix="make it a copy everywhere: .clone()",
                )

    def _apply(self, number: int, node: Apply) -> list[Any]:
        args = tuple([self._raised(arg) for arg in node.args])
        kwargs = {key: self._raised(arg) for key, arg in node.kwargs}
        find = self._recorder.owner.skeleton  # type: ignore[attr-defined]
        with torch.set_grad_enabled(node.grad and torch.is_grad_enabled()):
            got = self._recorder.operations.apply(
                node.path, lambda: find().get_submodule(node.path), args, kwargs
            )
        found = [one for _, one in containers.flatten(got) if isinstance(one, torch.Tensor)]
        if len(found) != node.outs:
            raise self._refusal(f"{node.path} gives {len(found)} tensors here, not {node.outs}")
        return found

    def _param(self, number: int, node: Param) -> list[Any]:
        path, _, name = node.path.rpartition(".")
        module = self._recorder.owner.skeleton().get_submodule(path)  # type: ignore[attr-defined]
        tensor = {**module._buffers, **module._parameters}.get(name)
        if tensor is None:
            raise self._refusal(f"the model has no weight {node.path!r}")
        return [self._recorder.operations.param(node.path, aval_of(tensor.detach()))]

    def _const(self, number: int, node: Const) -> list[Any]:
        return [self._constants[node.key]]

    # -- parts of nodes ----------------------------------------------------------------------

    def _leaf(self, node: Read | Write) -> LeafState:
        site: Site = node.site
        leaf = self._recorder.sites.state(site.path, site.port, site.call).tensors.get(node.leaf)
        if leaf is None:
            raise self._refusal(f"{site} has no tensor at {node.leaf} here")
        return leaf

    def _bind(self, bound: Bound) -> None:
        value = self._values[bound.value]
        shape = value._aval.shape if isinstance(value, Value) else value.shape
        if bound.dim >= len(shape) or int(shape[bound.dim]) != bound.size:
            now = list(shape)
            raise self._refusal(
                f"it read dimension {bound.dim} as the number {bound.size}, and the tensor is "
                f"{now} here",
                fix="leave sizes of batch and length open: h.unflatten(-1, (heads, -1)), -1, "
                "h.shape as a whole; or show what it is for: model.edit(prompt)",
            )
        if isinstance(value, Value):
            self._recorder.bind(value, (bound.dim,))

    def _raised(self, arg: Arg) -> Any:
        """Graph data as what a user would have given."""
        kind = type(arg)
        if kind is Ref:
            return self._values[arg]  # type: ignore[index]
        raising = _RAISE.get(kind)
        return arg if raising is None else raising(self, arg)

    def _sizes(self, arg: Shape) -> Any:
        value = self._values[arg.of]
        if not isinstance(value, Value):
            return value.shape
        sizes = Sizes(value._aval.shape)
        sizes._of = value
        return sizes

    def _refusal(self, message: str, fix: str | None = None) -> EditError:
        recorder = self._recorder
        assert recorder.replayed is not None
        return _misfit(message, recorder.line_of(recorder.replayed), fix)


def _misfit(message: str, line: object, fix: str | None = None) -> EditError:
    return EditError(
        f"an edit of the model does not fit this input: {message}",
        line=line,
        fix=fix or "trace the model without it, or make the edit so that it holds for any input",
    )


def _line(graph: Graph, at: int) -> Where | None:
    return graph.where[at] if at < len(graph.where) else None


_FORMS: dict[str, Callable[[list[Any]], Any]] = {"tuple": tuple, "list": list, "size": torch.Size}


def _named(replay: _Replay, arg: Name) -> Any:
    if arg.form == "ellipsis":
        return ...
    return float(arg.name) if arg.form == "float" else getattr(torch, arg.name)


_RAISE: dict[type, Callable[[_Replay, Any], Any]] = {
    Seq: lambda replay, arg: _FORMS[arg.form]([replay._raised(item) for item in arg.items]),
    Map: lambda replay, arg: dict(zip(arg.keys, map(replay._raised, arg.values), strict=True)),
    Slice: lambda replay, arg: slice(*map(replay._raised, (arg.start, arg.stop, arg.step))),
    Shape: lambda replay, arg: replay._sizes(arg),
    Name: _named,
    Complex: lambda replay, arg: complex(arg.real, arg.imag),
}

_DO: dict[type[AnyNode], Callable[[_Replay, int, Any], list[Any]]] = {
    Read: _Replay._read,
    Write: _Replay._write,
    Fill: _Replay._fill,
    Skip: _Replay._skip,
    Call: _Replay._call,
    Apply: _Replay._apply,
    Param: _Replay._param,
    Const: _Replay._const,
}
