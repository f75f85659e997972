"""`tracer.cache(...)`: what many modules return (and take), in one save.

    with model.trace(prompt) as tracer:
        cache = tracer.cache(modules=["model.layers.0", "model.norm"], inputs=True)
    cache["model.layers.0"].output          # the structure that the module returned
    cache.model.layers[0].input

The sites are read when the block ends, so a cache shows what the model went on with: all edits of
the block included, wherever it stands. Modules inside a skipped one are not there, nor what a stop
has kept from firing. A module that is called several times has `.calls[k]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from weft.errors import NotReachedError, UnknownPathError
from weft.graph.node import AnyNode, Call, Map, Name, Read, Ref, Save
from weft.graph.site import Leaf, Site, leaf_text
from weft.kernels.aval import Aval, dtype_name
from weft.signatures.structure import Plain

from .containers import Unreadable
from .lines import user_line, where
from .times import TURN

if TYPE_CHECKING:
    from .recorder import Recorder
    from .tree import Module

_REMEMBERED = 256


class Spec(NamedTuple):
    """What is asked for. `paths` None: every module that runs."""

    paths: tuple[str, ...] | None
    inputs: bool
    dtype: torch.dtype | None


class Part(NamedTuple):
    """One cached site: its tensors are `start` and following of all."""

    site: Site
    signature: Any
    start: int


class _Drawn(NamedTuple):
    nodes: list[AnyNode]
    value: Map
    parts: tuple[Part, ...]
    time: int


class Cache:
    """The outputs of modules by path: a dict of entries, and a tree. See the module's text."""

    def __init__(
        self, recorder: Recorder, tree: Module, name: str, spec: Spec, device: torch.device | None
    ) -> None:
        self.__dict__.update(
            _recorder=recorder,
            _tree=tree,
            _name=name,
            _spec=spec,
            _device=device,
            _at=recorder.here(),
            _sites=recorder.sites,
            _signature=recorder.signature,
            _tensors=None,
            _entries=None,
        )
        for path in spec.paths or ():
            _check_runs(recorder, path)

    # -- recording ---------------------------------------------------------------------------

    def close(self) -> None:
        """At the end of the block: reads what was asked for, as it is then."""
        recorder, sites = self._recorder, self._sites
        key = ("cache", self._spec, self._at, len(recorder.nodes), sites.base)
        memo = self._signature.kept
        drawn = memo.get(key) if not sites.skips else None
        if drawn is None:
            drawn = self._drawn()
            if not sites.skips:
                if len(memo) > _REMEMBERED:
                    memo.clear()
                memo[key] = drawn
        recorder.nodes += drawn.nodes
        recorder.append(Save(name=self._name, value=drawn.value, at=self._at))
        recorder.saves.time = max(recorder.saves.time, drawn.time)
        self.__dict__["_parts"] = drawn.parts

    def _drawn(self) -> _Drawn:
        nodes: list[AnyNode] = []
        keys: list[str] = []
        refs: list[Ref] = []
        parts, time = [], -1
        base = len(self._recorder.nodes)
        for path, port, call in self._wanted():
            signature = self._signature.site(path, port, call)
            site = Site(path, port, call, self._sites.step, self._sites.invoke)
            parts.append(Part(site, signature, len(refs)))
            time = max(time, signature.index)
            shown = str(Site(path, port, call))
            for leaf, aval in signature.tensors:
                keys.append(f"{shown}{leaf_text(leaf)}")
                refs.append(Ref(base + self._add(nodes, base, site, leaf, aval)))
        value = Map(tuple(keys), tuple(refs))
        return _Drawn(nodes, value, tuple(parts), self._sites.base + time)

    def _add(self, nodes: list[AnyNode], base: int, site: Site, leaf: Leaf, aval: Aval) -> int:
        """Adds the nodes of one tensor; the place of its result."""
        dtype = dtype_name(aval.dtype)
        nodes.append(Read(site=site, leaf=leaf, shape=tuple(aval.shape), dtype=dtype, at=self._at))
        wanted = self._spec.dtype
        if wanted is not None and aval.dtype.is_floating_point and wanted != aval.dtype:
            read = Ref(base + len(nodes) - 1)
            args = (read, Name("dtype", dtype_name(wanted)))
            nodes.append(Call(op="Tensor.to", args=args, grad=False, at=self._at))
        return len(nodes) - 1

    def _wanted(self) -> list[tuple[str, str, int]]:
        """The sites to read, in firing order."""
        order = self._signature.order
        spans = [(s.begin % TURN, s.end % TURN) for s in self._sites.skips]
        paths = self._spec.paths
        chosen = None if paths is None else {self._signature.canonical(path) for path in paths}
        found = []
        for index, (path, port, call) in enumerate(order):
            if chosen is not None and path not in chosen:
                continue
            if port == "inputs" and not self._spec.inputs:
                continue
            if any(begin < index < end for begin, end in spans):
                if chosen is not None:
                    self._sites.state(path, port, call)  # says which skip it is
                continue
            found.append((path, port, call))
        return found

    # -- after the run -----------------------------------------------------------------------

    def receive(self, saved: Any) -> None:
        """Takes what the run has brought."""
        tensors: list[Any] = list(saved.values()) if isinstance(saved, dict) else []
        if self._device is not None:
            tensors = [None if t is None else t.to(self._device) for t in tensors]
        self.__dict__.update(_tensors=tensors, _recorder=None, _sites=None)

    def _sorted(self, tensors: list[Any]) -> dict[str, Entry]:
        """What has come, by module. Not before somebody asks: it takes as long as the saving."""
        entries: dict[str, Entry] = {}
        for part in self._parts:
            count = len(part.signature.tensors)
            own = tensors[part.start : part.start + count]
            if len(own) == count and all(tensor is not None for tensor in own):
                entry = entries.setdefault(part.site.path, Entry(part.site.path))
                entry._put(part, own)
        return entries

    def _found(self) -> dict[str, Entry]:
        found = self._entries
        if found is None:
            if self._tensors is None:
                raise self._recorder.unfilled(self._name, self._at)
            found = self._sorted(self._tensors)
            self.__dict__.update(_entries=found, _tensors=None)
        return found

    def _entry(self, path: str) -> Entry:
        found = self._found().get(self._signature.canonical(path))
        if found is None:
            raise KeyError(f"{path} is not in this cache; its keys are {self._some()}")
        return found

    def _some(self) -> str:
        keys = [key or "<root>" for key in self.keys()]
        return ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")

    def __getitem__(self, path: str) -> Entry:
        """The entry of a module, by its path or an alias."""
        return self._entry(self._path_of(path))

    def _path_of(self, path: Any) -> str:
        if isinstance(path, str):
            for one in (path, path.removeprefix("model."), path if path != "model" else ""):
                try:
                    return self._tree.get(one)._path
                except (AttributeError, LookupError):
                    continue
        return getattr(path, "_path", str(path))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(Branch(self, self._tree), name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a cache holds what the model gave; it cannot be assigned to")

    def keys(self) -> Any:
        """The paths of the modules in it, in the order in which they first began or returned."""
        return self._found().keys()

    def values(self) -> Any:
        return self._found().values()

    def items(self) -> Any:
        return self._found().items()

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())

    def __contains__(self, path: Any) -> bool:
        return self._signature.canonical(self._path_of(path)) in self._found()

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *self._tree._children, *self._tree._aliases})

    def __repr__(self) -> str:
        if self._entries is None and self._tensors is None:
            return f"<cache {self._name!r}, not filled yet>"
        return f"<cache of {len(self)} modules: {self._some()}>"


class Entry:
    """What one module returned and took."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._held: dict[tuple[str, int], tuple[Part, Sequence[torch.Tensor]]] = {}

    def _put(self, part: Part, tensors: Sequence[torch.Tensor]) -> None:
        self._held[part.site.port, part.site.call] = part, tensors

    @property
    def output(self) -> Any:
        """What the module returned, in its own structure."""
        return self._only("output")

    @property
    def inputs(self) -> Any:
        """All arguments: `(args, kwargs)`. With `inputs=True`."""
        return self._only("inputs")

    @property
    def input(self) -> torch.Tensor:
        """The first tensor among the arguments. With `inputs=True`."""
        return self._first(self._call("inputs"))

    @property
    def calls(self) -> list[EntryCall]:
        """The single calls of the module."""
        return [EntryCall(self, call) for call in sorted({call for _, call in self._held})]

    def _call(self, port: str) -> int:
        calls = sorted(call for one, call in self._held if one == port)
        if len(calls) == 1:
            return calls[0]
        if not calls:
            raise AttributeError(
                f"{self.path or 'the root'}.{port} is not in this cache"
                + ("; ask for it: tracer.cache(inputs=True)" if port == "inputs" else "")
            )
        raise AttributeError(
            f"{self.path or 'the root'} was called {len(calls)} times, so .{port} is ambiguous; "
            f"choose one: .calls[0].{port} to .calls[{len(calls) - 1}].{port}"
        )

    def _only(self, port: str) -> Any:
        return self._at(port, self._call(port))

    def _first(self, call: int) -> torch.Tensor:
        _, tensors = self._held["inputs", call]
        if not tensors:
            raise AttributeError(f"{self.path or 'the root'} has no tensor among its inputs")
        return tensors[0]

    def _at(self, port: str, call: int) -> Any:
        if (port, call) not in self._held:
            return self._only(port)  # says what is missing
        part, tensors = self._held[port, call]
        left = iter(tensors)
        values = [_value(part, leaf, what, left) for leaf, what in part.signature.leaves]
        return part.signature.rebuild(values)

    def __repr__(self) -> str:
        ports = ", ".join(dict.fromkeys(port for port, _ in self._held))
        return f"<{self.path or 'the root'}: {ports}>"


class EntryCall:
    """One call of a module that was called several times."""

    def __init__(self, entry: Entry, call: int) -> None:
        self._entry = entry
        self._number = call

    @property
    def output(self) -> Any:
        return self._entry._at("output", self._number)

    @property
    def inputs(self) -> Any:
        return self._entry._at("inputs", self._number)

    @property
    def input(self) -> torch.Tensor:
        self._entry._at("inputs", self._number)
        return self._entry._first(self._number)


class Branch:
    """A place in the tree of a cache: its children, and the entry that it stands for."""

    def __init__(self, cache: Cache, module: Module) -> None:
        self._cache = cache
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        module = self._module
        child = module._children.get(name) or module._aliases.get(name)
        if child is not None:
            return Branch(self._cache, child)
        if name in ("output", "input", "inputs", "calls", "path"):
            return getattr(self._cache._entry(module._path), name)
        if name == "model" and not module._path:
            return self  # scripts that name the root itself
        raise module._unknown(name)

    def __getitem__(self, index: Any) -> Any:
        children = list(self._module._children.values())
        if isinstance(index, slice):
            return [Branch(self._cache, child) for child in children[index]]
        if isinstance(index, int):
            return Branch(self._cache, children[index])
        return self.__getattr__(index)

    def __len__(self) -> int:
        return len(self._module._children)

    def __iter__(self) -> Iterator[Branch]:
        return iter([Branch(self._cache, child) for child in self._module._children.values()])

    def __repr__(self) -> str:
        return f"<{self._module._path or 'the root'} of {self._cache!r}>"


def _value(part: Part, leaf: Leaf, what: Any, tensors: Iterator[torch.Tensor]) -> Any:
    if isinstance(what, Aval):
        return next(tensors)
    return what.value if isinstance(what, Plain) else Unreadable(f"{part.site}", str(what))


def _check_runs(recorder: Recorder, path: str) -> None:
    if not recorder.signature.calls(path):
        raise NotReachedError(
            f"{path or 'the root'} is never called in this forward pass, so it cannot be cached",
            line=where(recorder.line()),
            fix="use modules that run; print(model) shows the tree",
        )


def paths_of(tree: Module, modules: Any) -> tuple[str, ...] | None:
    """The true paths of what a user gives as `modules`."""
    if modules is None:
        return None
    given = [modules] if isinstance(modules, str) or hasattr(modules, "_path") else list(modules)
    found = []
    for one in given:
        module = tree.get(one) if isinstance(one, str) else one
        if getattr(module, "_root", None) is not tree._root or not hasattr(module, "_children"):
            raise UnknownPathError(
                f"{one!r} is no module of this model, so it cannot be cached",
                line=where(user_line()),
                fix="give paths, or modules of the model: [model.get(path), ...]",
            )
        found.append(module._path)
    return tuple(dict.fromkeys(found))
