"""Modules of the user's own in the tree: a sparse autoencoder, an adapter, a probe.

    model.model.layers[1].sae = sae                     # any nn.Module; `del` takes it out again
    with model.trace(prompt):
        h = model.model.layers[1].output
        model.model.layers[1].output[:] = model.model.layers[1].sae(h)
        features = model.model.layers[1].sae.encoder.output.save()

The model itself is not touched: the module stands in the tree of this handle only, and a call of it
runs here, while the block is recorded. What reaches the graph are its operations, with its
parameters as constants, so a server needs to know nothing of it. `insides` has what its parts show.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from weft.errors import RecordingError

from .current import current
from .insides import Insides, Port
from .lines import user_line, where
from .recorder import Recorder

if TYPE_CHECKING:
    from .tree import Module, Root


class Attached:
    """A user's module, or a part of one, at its place in the tree.

    Calling it calls the module. In a block what it and its parts took and gave then can be read and
    changed: `.input`, `.inputs`, `.output`. Everything else is the module's own: its parts,
    parameters, methods. `hook=False` in a call leaves no trace of the inside.
    """

    def __init__(self, root: Root, top: str, path: str, module: torch.nn.Module) -> None:
        self.__dict__.update(_root=root, _top=top, _path=path, _module=module)

    def __call__(self, *args: Any, hook: bool = True, **kwargs: Any) -> Any:
        recorder = current()
        if not hook or recorder is None or recorder.owner is not self._root:
            return self._module(*args, **kwargs)
        return insides_of(recorder).call(self._top, self._path, self._module, args, kwargs)

    @property
    def path(self) -> str:
        """Its dotted path in the tree."""
        return self._path

    @property
    def output(self) -> Any:
        """What it returned in this block: read it, edit it, assign it."""
        return self._read("output", None)

    @output.setter
    def output(self, value: Any) -> None:
        self._write("output", None, value)

    @property
    def input(self) -> Any:
        """The first tensor among the arguments that it was called with."""
        return self._read("input", None)

    @input.setter
    def input(self, value: Any) -> None:
        self._write("input", None, value)

    @property
    def inputs(self) -> Any:
        """All arguments: `(args, kwargs)`."""
        return self._read("inputs", None)

    @inputs.setter
    def inputs(self, value: Any) -> None:
        self._write("inputs", None, value)

    @property
    def calls(self) -> list[AttachedCall]:
        """Its single calls in this block, or in this invoke."""
        recorder = self._root.recorder(self._path, "calls")
        insides = insides_of(recorder)
        count = insides.calls.get(insides.part(self._top, self._module), 0)
        return [AttachedCall(self, number) for number in range(count)]

    def _there(self, port: str, number: int | None) -> tuple[Insides, Port]:
        insides = insides_of(self._root.recorder(self._path, port))
        part = insides.part(self._top, self._module)
        wanted = "inputs" if port == "input" else port
        return insides, insides.port(part, self._path, wanted, number)

    def _read(self, port: str, number: int | None) -> Any:
        insides, there = self._there(port, number)
        if port != "input":
            return insides.read(there, self._path)
        leaf = insides.first(there, self._path)
        args, kwargs = insides.read(there, self._path)
        found: Any = (args, kwargs)
        for key in leaf:
            found = found[key]
        return found

    def _write(self, port: str, number: int | None, value: Any) -> None:
        insides, there = self._there(port, number)
        if port != "input":
            insides.write(there, self._path, value)
            return
        insides.state(there, self._path, insides.first(there, self._path)).write(value)

    # -- the module's own ----------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._step(name)

    def _step(self, name: str) -> Any:
        return self._part(name) if name in self._module._modules else getattr(self._module, name)

    def _part(self, name: str) -> Any:
        part = self._module._modules[name]
        return (
            None if part is None else Attached(self._root, self._top, f"{self._path}.{name}", part)
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
            return
        raise AttributeError(
            f"{self._path} stands for a module of your own: assign {name!r} to the module itself"
        )

    def __getitem__(self, index: Any) -> Any:
        parts: Any = self._module
        if isinstance(index, str):
            return self._part(index) if index in parts._modules else parts[index]
        names = list(parts._modules)[index]
        return (
            [self._part(name) for name in names] if isinstance(names, list) else self._part(names)
        )

    def __iter__(self) -> Iterator[Any]:
        return iter([self._part(name) for name in self._module._modules])

    def __len__(self) -> int:
        return len(self._module._modules)

    def __bool__(self) -> bool:
        return True

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self._module)})

    def __repr__(self) -> str:
        return repr(self._module)


def _port(port: str) -> property:
    def read(self: AttachedCall) -> Any:
        return self._attached._read(port, self._number)

    def write(self: AttachedCall, value: Any) -> None:
        self._attached._write(port, self._number, value)

    return property(read, write)


class AttachedCall:
    """One of several calls of a module; has the same three ports."""

    def __init__(self, attached: Attached, number: int) -> None:
        self._attached = attached
        self._number = number

    output = _port("output")
    input = _port("input")
    inputs = _port("inputs")


def insides_of(recorder: Recorder) -> Insides:
    """What modules of the user's own have shown in this block."""
    if recorder.insides is None:
        recorder.insides = Insides(recorder)
    return recorder.insides


def attach(parent: Module, name: str, module: torch.nn.Module) -> None:
    """`parent.<name> = module`."""
    path = f"{parent._path}.{name}" if parent._path else name
    taken = _taken(parent, name)
    if taken is not None:
        raise RecordingError(
            f"{path} cannot be a module of your own: {taken}",
            line=where(user_line()),
            fix="give it another name",
        )
    parent._attached[name] = Attached(parent._root, path, path, module)


def _taken(parent: Module, name: str) -> str | None:
    """Why a name is not free."""
    if name.startswith("_"):
        return "names with an underscore in front are not part of the tree"
    if hasattr(type(parent), name):
        return f"{name!r} means something else in a tree"
    if name in parent._aliases:
        return "an alias has this name"
    if hasattr(parent._skeleton(), name):
        return "the model has something of this name"
    return None


def detach(parent: Module, name: str) -> None:
    """`del parent.<name>`."""
    if parent._attached.pop(name, None) is None:
        raise AttributeError(
            f"{parent._path or 'the model'} has no module of your own named {name!r}"
        )
