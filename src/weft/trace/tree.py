"""The module tree: the user's handle on a model's modules and weights.

`model.transformer.h[5].mlp` walks the model's own names. Inside a block `.output`, `.input` and
`.inputs` are sites, weights are values, and calling a module applies it to a value; outside,
weights are the real parameters and calling a module calls it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from weft.errors import OutsideTraceError, RecordingError, UnknownPathError
from weft.kernels.aval import aval_of

from .attached import attach, detach
from .current import current
from .lines import user_line, where
from .recorder import Recorder
from .sources import Source

PORTS = ("output", "input", "inputs", "source")


class Root:
    """What all modules of one tree share: how to get the model, now or with its weights."""

    def __init__(
        self,
        skeleton: Callable[[], torch.nn.Module],
        loaded: Callable[[], torch.nn.Module],
    ) -> None:
        self.skeleton = skeleton
        self.loaded = loaded
        self.listing: Callable[..., Any] = _unknown_source
        """Tells the source of a module's forward: `signatures.Inside.listing`."""
        self.learn: Callable[..., None] = _unknown_source
        """Teaches a signature the sites inside one: `signatures.Inside.learn`."""
        self.paths = [path for path, _ in skeleton().named_modules(remove_duplicate=False)]

    def recorder(self, path: str, port: str) -> Recorder:
        """The open recorder of this model's block."""
        recorder = current()
        if recorder is None or recorder.owner is not self:
            other = "another model's block" if recorder is not None else "no block"
            raise OutsideTraceError(
                f"{path}.{port} was used in {other}",
                line=where(user_line()),
                fix="use it inside `with model.trace(...):`",
            )
        return recorder


def _unknown_source(*_: Any) -> Any:
    raise OutsideTraceError(
        "the sources of this tree are not known",
        line=where(user_line()),
        fix="open the model with weft.LanguageModel or weft.Model",
    )


class Module:
    """One module of the tree. Attributes are its children, weights, and the sites of design."""

    def __init__(self, root: Root, path: str, module: torch.nn.Module) -> None:
        state = self.__dict__
        state["_root"] = root
        state["_path"] = path
        state["_kind"] = type(module)
        state["_children"] = {
            name: make_tree(root, f"{path}.{name}" if path else name, child)
            for name, child in module._modules.items()  # named_children leaves out second names
            if child is not None
        }
        state["_aliases"] = {}  # further names of modules below: see `aliases`
        state["_attached"] = {}  # modules of the user's own: see `attached`
        state.update(
            {k: v for k, v in self._children.items() if k not in PORTS and k.isidentifier()}
        )

    # -- sites -------------------------------------------------------------------------------

    @property
    def output(self) -> Any:
        """What the module returns, e.g. `[batch, pos, d_model]`: read it, edit it, assign it."""
        return self._root.recorder(self._path, "output").read(self._path, "output")

    @output.setter
    def output(self, value: Any) -> None:
        self._root.recorder(self._path, "output").write(self._path, "output", value)

    @property
    def input(self) -> Any:
        """The first tensor among the arguments that the module gets."""
        return self._root.recorder(self._path, "input").read(self._path, "input")

    @input.setter
    def input(self, value: Any) -> None:
        self._root.recorder(self._path, "input").write(self._path, "input", value)

    @property
    def inputs(self) -> Any:
        """All arguments: `(args, kwargs)`."""
        return self._root.recorder(self._path, "inputs").read(self._path, "inputs")

    @inputs.setter
    def inputs(self, value: Any) -> None:
        self._root.recorder(self._path, "inputs").write(self._path, "inputs", value)

    @property
    def calls(self) -> Calls:
        """The single calls of a module that runs several times in one pass: `.calls[1].output`."""
        return Calls(self)

    @property
    def source(self) -> Source:
        """The source of the module's forward, with names for the operations in it. Each is a
        site: `module.source.self_c_proj_0.output`. (A child of that name: `get("source")`.)"""
        return Source(self._root, self._path, ())

    def skip(self, value: Any) -> None:
        """The module does not run: its output is `value`, in the structure that it returns.

        `value` may be made from the module's `.input` and all that comes before it. Sites inside
        the module do not fire. Raises `LateEditError` for a value that comes later.
        """
        self._root.recorder(self._path, "skip").skip(self._path, value)

    def next(self, step: int = 1) -> Module:
        """As `tracer.next(step)`: from here on the sites of a later step of the generation are
        meant, of all modules. The module itself, for `module.next().output`. Raises
        `RecordingError` where another module has gone on before."""
        self._root.recorder(self._path, "next").move(step, self._path)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """In a block: the module applied to given values (a logit lens). Else: the real call."""
        recorder = current()
        if kwargs.pop("hook", False) and recorder is not None:
            raise recorder.refusal(
                f"{self._path or 'the model'} was called with hook=True: a module of the model "
                "that is applied to a value fires no sites",
                "leave it out, and apply the modules inside one by one; a module of your own, "
                "attached to the tree, shows its inside",
            )
        if recorder is None or recorder.owner is not self._root:
            return self._real()(*args, **kwargs)
        return recorder.operations.apply(self._path, self._skeleton, args, kwargs)

    # -- the tree ----------------------------------------------------------------------------

    def get(self, path: str) -> Any:
        """The module or weight at a dotted path below this one."""
        found: Any = self
        for name in path.split(".") if path else ():
            found = found._step(name)
        return found

    def modules(self) -> Iterator[Module]:
        """This module and all below it, in the model's order."""
        yield self
        for child in self._children.values():
            yield from child.modules()

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """`(path, module)` of this module and all below it; "" is the root."""
        for module in self.modules():
            yield module._path, module

    @property
    def path(self) -> str:
        """The dotted path of the module; "" for the root."""
        return self._path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._step(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
            return
        if isinstance(value, torch.nn.Module):
            attach(self, name, value)
            return
        raise AttributeError(f"{self._path or 'the model'} has no site {name!r} to assign to")

    def __delattr__(self, name: str) -> None:
        detach(self, name)

    def _step(self, name: str) -> Any:
        child = self._children.get(name) or self._aliases.get(name) or self._attached.get(name)
        if child is not None:
            return child
        module = self._find(self._root.skeleton())
        if name in module._parameters or name in module._buffers:
            return self._weight(name, module)
        if name.startswith("_") or not hasattr(module, name):
            raise self._unknown(name)
        return getattr(self._real() if _holds_tensors(getattr(module, name)) else module, name)

    def _weight(self, name: str, module: torch.nn.Module) -> Any:
        recorder = current()
        if recorder is None or recorder.owner is not self._root:
            return getattr(self._real(), name)
        tensor = getattr(module, name)
        path = f"{self._path}.{name}" if self._path else name
        return None if tensor is None else recorder.operations.param(path, aval_of(tensor.detach()))

    def _skeleton(self) -> torch.nn.Module:
        return self._find(self._root.skeleton())

    def _find(self, root: torch.nn.Module) -> torch.nn.Module:
        return root.get_submodule(self._path)

    def _real(self) -> torch.nn.Module:
        return self._find(self._root.loaded())

    def _unknown(self, name: str) -> UnknownPathError:
        wanted = f"{self._path}.{name}" if self._path else name
        near = self._nearest(name, wanted)
        hint = f"the nearest are {', '.join(near)}" if near else "print(model) shows the tree"
        return UnknownPathError(
            f"the model has no {wanted!r} ({self._kind.__name__} has no attribute {name!r})",
            line=where(user_line()),
            fix=hint,
        )

    def _nearest(self, name: str, wanted: str) -> list[str]:
        names = [*self._aliases, *self._attached, *self._children]
        children = difflib.get_close_matches(name, names, 3, 0.5)
        own = [f"{self._path}.{child}" if self._path else child for child in children]
        same = [path for path in self._root.paths if path.rpartition(".")[2] == name]
        far = difflib.get_close_matches(wanted, self._root.paths, 3, 0.5)
        return list(dict.fromkeys((*own, *same[:3], *far)))[:4]

    def __dir__(self) -> list[str]:
        module = self._find(self._root.skeleton())
        weights = [*module._parameters, *module._buffers]
        own = (*self._children, *self._aliases, *self._attached)
        return sorted({*object.__dir__(self), *own, *weights})

    def __repr__(self) -> str:
        return repr(self._find(self._root.skeleton()))


class LayerList(Module):
    """A list of modules: `len`, iteration, slices, negative indices."""

    def __getitem__(self, index: int | slice) -> Any:
        children = list(self._children.values())
        if isinstance(index, slice):
            return children[index]
        try:
            return children[index]
        except IndexError:
            raise IndexError(
                f"{self._path} has {len(children)} modules (0 to {len(children) - 1}), not {index}"
            ) from None

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._children.values()))

    def __len__(self) -> int:
        return len(self._children)


class ModuleTable(Module):
    """A dict of modules, by key."""

    def __getitem__(self, key: str) -> Any:
        return self._step(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._children)

    def __len__(self) -> int:
        return len(self._children)


class Calls:
    """`module.calls[k]`: the sites of the k-th call of a module within one pass."""

    def __init__(self, module: Module) -> None:
        self._module = module

    def __getitem__(self, index: int) -> Call:
        recorder = self._module._root.recorder(self._module._path, "calls")
        count = recorder.signature.calls(self._module._path)
        if not -count <= index < count:
            raise IndexError(f"{self._module._path} is called {count} times, not {index}")
        return Call(self._module, index % count)

    def __len__(self) -> int:
        recorder = self._module._root.recorder(self._module._path, "calls")
        return recorder.signature.calls(self._module._path)


def _port(port: str) -> property:
    def read(self: Call) -> Any:
        module = self._module
        return module._root.recorder(module._path, port).read(module._path, port, self._index)

    def write(self: Call, value: Any) -> None:
        module = self._module
        module._root.recorder(module._path, port).write(module._path, port, value, self._index)

    return property(read, write)


class Call:
    """One call of a module; has the same three sites."""

    def __init__(self, module: Module, index: int) -> None:
        self._module = module
        self._index = index

    output = _port("output")
    input = _port("input")
    inputs = _port("inputs")

    @property
    def source(self) -> Source:
        """Refused: runs of an operation are numbered within the pass, not within a call."""
        raise RecordingError(
            f"the operations of {self._module._path or 'the root'} are not counted by its calls",
            line=where(user_line()),
            fix="count the runs of one: module.source.<name>.calls[k]",
        )

    def skip(self, value: Any) -> None:
        """As `Module.skip`, of this call."""
        module = self._module
        module._root.recorder(module._path, "skip").skip(module._path, value, self._index)


def make_tree(root: Root, path: str, module: torch.nn.Module) -> Module:
    """The handle for `module`, of the class that fits it."""
    if isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)):
        return LayerList(root, path, module)
    if isinstance(module, torch.nn.ModuleDict):
        return ModuleTable(root, path, module)
    return Module(root, path, module)


def _holds_tensors(value: Any) -> bool:
    return callable(value) or isinstance(value, torch.Tensor)
