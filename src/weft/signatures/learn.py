"""One forward pass with a hook on every module, and what it showed: a `Table`.

    table = learn(module, (ids,), {"attention_mask": mask})      # fake: no weights needed
    table = learn_by_running(module, (ids,), {})                 # real: for what cannot be faked

The module is left as it was: hooks, parameters, buffers and attributes (dynamic rope keeps state on
the module). What is inside lists or dicts that a module owns is not watched.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import Context
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from weft.graph.site import Leaf, operations_of
from weft.kernels.aval import Aval
from weft.sources.stand import StandIn

from .shapes import Look, Shapes, copied, storage_of
from .structure import PLAIN, Tree, abstract, put_together, take_apart, tensors_inside
from .telling import Telling

_STEP = 1 << 20
"""Operations of one function that fire between two sites of modules are fewer."""

P = ParamSpec("P")
R = TypeVar("R")


class Facts(NamedTuple):
    """What is known of a tensor beyond its layout.

    Leaves of one `group` share a storage in this pass. `overwritten`: the model changes the storage
    after the site has fired. `tied`: the storage is a weight, or one of the call's own inputs.
    """

    group: int
    overwritten: bool
    tied: bool


class Row(NamedTuple):
    """One site of one pass; `facts[i]` is None where `what[i]` is not an `Aval`."""

    path: str
    port: str
    call: int
    tree: Tree
    keys: tuple[Leaf, ...]
    what: tuple[Any, ...]
    facts: tuple[Facts | None, ...]


@dataclass(frozen=True)
class Table:
    """All sites of one pass in firing order; `looks` are the numbers of inputs that it read.

    `aliases` are other paths of modules that stand in the tree more than once.
    """

    rows: tuple[Row, ...]
    aliases: dict[str, str]
    looks: tuple[Look, ...] = ()

    @cached_property
    def index(self) -> dict[tuple[str, str, int], int]:
        """(path, port, call) -> place in `rows`."""
        return {(row.path, row.port, row.call): index for index, row in enumerate(self.rows)}

    @cached_property
    def times(self) -> tuple[Any, ...]:
        """When each site fires: modules in whole numbers, operations between them; inside a
        function that an operation calls, between its begin and its end. What else is told does
        not matter."""
        found: list[Any] = []
        whole, parts = -1, list[int]()
        for row in self.rows:
            depth = len(operations_of(row.port))
            if not depth:
                whole, parts = whole + 1, []
                found.append(whole)
                continue
            parts = [*parts[:depth], *[0] * (depth - len(parts))]
            parts[-1] += 1
            found.append(whole + sum([Fraction(n, _STEP ** (d + 1)) for d, n in enumerate(parts)]))
        return tuple(found)

    @cached_property
    def single(self) -> frozenset[str]:
        """The modules that are called exactly once, by all of their paths."""
        calls = Counter([row.path for row in self.rows if row.port == "inputs"])
        names = [(path, path) for path in calls] + list(self.aliases.items())
        return frozenset([name for name, path in names if calls[path] == 1])


class _Event:
    """A site as it fires; holds its tensors until the pass ends, so that storages stay apart."""

    def __init__(self, path: str, port: str, call: int, structure: Any) -> None:
        self.name = (path, port, call)
        self.tree, keys, leaves = take_apart(structure)
        self.keys = tuple(keys)
        self.what = tuple([abstract(leaf) for leaf in leaves])
        pairs = zip(leaves, self.what, strict=True)
        self.tensors = [leaf if isinstance(what, Aval) else None for leaf, what in pairs]
        self.versions = [None if t is None else t._version for t in self.tensors]

    def row(self, groups: dict[int, int], tied: set[int], origin: dict[int, int]) -> Row:
        facts = []
        for tensor, version in zip(self.tensors, self.versions, strict=True):
            if tensor is None:
                facts.append(None)
                continue
            storage = storage_of(tensor)
            storage = origin.get(storage, storage)
            group = groups.setdefault(storage, len(groups))
            facts.append(Facts(group, tensor._version != version, storage in tied))
        return Row(*self.name, self.tree, self.keys, self.what, tuple(facts))


class _Watch:
    """Hooks on all modules that note sites; they act on this thread only."""

    def __init__(self, module: nn.Module) -> None:
        self.events: list[_Event] = []
        self._thread = threading.get_ident()
        self._calls: dict[str, int] = {}
        self._open: list[tuple[str, int]] = []
        self._paths = {id(child): path for path, child in module.named_modules()}
        self._module = module

    @contextmanager
    def installed(self) -> Iterator[None]:
        handles = []
        try:
            for child in self._module.modules():
                handles.append(child.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(child.register_forward_hook(self._leave, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def told(self, path: str, port: str, call: int, structure: Any) -> None:
        """An operation inside a forward."""
        self.events.append(_Event(path, port, call, structure))

    def _enter(self, module: nn.Module, args: tuple, *rest: Any) -> None:
        if threading.get_ident() != self._thread:
            return  # it may come without keywords: the hooks are just being removed
        (kwargs,) = rest
        path = self._paths[id(module)]
        call = self._calls.get(path, 0)
        self._calls[path] = call + 1
        self._open.append((path, call))
        self.events.append(_Event(path, "inputs", call, (args, kwargs)))

    def _leave(self, module: nn.Module, args: tuple, *rest: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        output = rest[-1]
        path = self._paths[id(module)]
        opened = self._open.pop()
        while opened[0] != path:  # a forward that was left by an exception the model caught
            opened = self._open.pop()
        self.events.append(_Event(path, "output", opened[1], output))


def _unseen(function: Callable[P, R]) -> Callable[P, R]:
    """In a context of its own: a block that is being recorded around it must not see the pass."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return Context().run(function, *args, **kwargs)

    return run


@_unseen
def learn(
    module: nn.Module,
    args: tuple,
    kwargs: dict,
    device: torch.device,
    integers: bool = True,
    contrary: int | None = None,
    telling: Telling | None = None,
) -> Table:
    """A fake pass. `device` is where tensors pretend to be; weights may be on meta or real.

    `integers` and `contrary` are those of `Shapes`. `telling` asks for operations, too.
    """
    weights = weights_of(module)
    mode = Shapes(weights, device, integers, contrary)
    tree, _, leaves = take_apart((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    with _quiet():
        stand_ins = mode.inputs(tensors)
        args, kwargs = put_together(tree, _replaced(leaves, stand_ins, mode))
        events = _pass(module, args, kwargs, mode, telling)
    return _table(module, events, [*weights, *stand_ins], mode.origin, mode.looks)


@_unseen
def learn_by_running(
    module: nn.Module, args: tuple, kwargs: dict, telling: Telling | None = None
) -> Table:
    """A real pass; the activations of the whole pass are alive at its end."""
    tree, _, leaves = take_apart((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    with _quiet(), _draws_kept(module), _values_kept(module):
        copies = _copies(tensors, weights_of(module))
        args, kwargs = put_together(tree, _replaced(leaves, copies, None))
        events = _pass(module, args, kwargs, None, telling)
    everything = Look(frozenset(range(len(tensors))), truth=False)
    return _table(module, events, [*weights_of(module), *copies], {}, [everything])


def _pass(
    module: nn.Module, args: tuple, kwargs: dict, mode: Shapes | None, telling: Telling | None
) -> list[_Event]:
    watch = _Watch(module)
    with ExitStack() as stack:
        stack.enter_context(_state_kept(module))
        stack.enter_context(watch.installed())
        if telling is not None:
            stack.enter_context(telling.heard(module, watch.told))
        if mode is not None:
            stack.enter_context(mode)
        module(*args, **kwargs)
    return watch.events


def _table(
    module: nn.Module,
    events: list[_Event],
    tied: list[torch.Tensor],
    origin: dict[int, int],
    looks: list[Look],
) -> Table:
    storages = [storage_of(t) for t in tied if t.layout is torch.strided]
    ties = {origin.get(storage, storage) for storage in storages}
    groups: dict[int, int] = {}
    rows = tuple([event.row(groups, ties, origin) for event in events])
    return Table(rows, _aliases(module), tuple(looks))


def _aliases(module: nn.Module) -> dict[str, str]:
    """Other paths of modules that stand in the tree more than once."""
    first = {id(child): path for path, child in module.named_modules()}
    everywhere = module.named_modules(remove_duplicate=False)
    return {path: first[id(child)] for path, child in everywhere if path != first[id(child)]}


def weights_of(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def _replaced(leaves: list, tensors: list[torch.Tensor], mode: Shapes | None) -> list:
    rest = iter(tensors)
    return [
        next(rest) if isinstance(leaf, torch.Tensor) else _private(leaf, mode) for leaf in leaves
    ]


def _private(leaf: Any, mode: Shapes | None) -> Any:
    """A copy of an object that the model may change, such as a cache; with fakes as tensors."""
    if type(leaf) in PLAIN:
        return leaf
    memo = {} if mode is None else {id(t): mode.fake(t) for t in tensors_inside(leaf)}
    return copy.deepcopy(leaf, memo)


def _copies(tensors: list[torch.Tensor], weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies with the same layouts, where the weights are, sharing storages as the originals do."""
    storages: dict[int, torch.UntypedStorage] = {}
    out = []
    for tensor in tensors:
        key = storage_of(tensor)
        device = weights[0].device if weights else tensor.device
        if key not in storages:
            storages[key] = copied(tensor.untyped_storage(), device)
        copy = torch.empty(0, dtype=tensor.dtype, device=device)
        out.append(
            copy.set_(storages[key], tensor.storage_offset(), tensor.size(), tensor.stride())
        )
    return out


@contextmanager
def _quiet() -> Iterator[None]:
    """No grad, and nobody else's dispatch modes."""
    _LEARNING.add(threading.get_ident())
    try:
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        _LEARNING.discard(threading.get_ident())


# PyTorch prints the traceback of every failing fake operation; here failing is part of the plan.
_LEARNING: set[int] = set()
logging.getLogger("torch._subclasses.fake_tensor").addFilter(
    lambda record: threading.get_ident() not in _LEARNING
)


@contextmanager
def _state_kept(module: nn.Module) -> Iterator[None]:
    """Attributes, parameters and buffers afterwards are the very objects that they were.

    A new attribute stays unless it holds tensors: it may tell of something that stays too, as
    `transformers` marks a model to which it has just added hooks of its own.
    """
    spaces = [space for child in module.modules() for space in _spaces(child)]
    saved = [(space, dict(space)) for space in spaces]
    try:
        yield
    finally:
        for space, was in saved:
            _put_back(space, was)


def _spaces(module: nn.Module) -> list[dict[str, Any]]:
    return [vars(module), module._parameters, module._buffers, module._modules]  # type: ignore[list-item]


def _put_back(space: dict[str, Any], was: dict[str, Any]) -> None:
    for name, value in was.items():
        if space.get(name, space) is not value and type(value) is not StandIn:
            space[name] = value
    for name in [name for name in space if name not in was]:
        if any(isinstance(leaf, torch.Tensor) for leaf in take_apart(space[name])[2]):
            del space[name]


@contextmanager
def _draws_kept(module: nn.Module) -> Iterator[None]:
    """What the pass draws, here and on the devices of the weights, is there to be drawn anew."""
    devices = {weight.device for weight in weights_of(module) if weight.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _values_kept(module: nn.Module) -> Iterator[None]:
    """Buffers that the pass changes in place (running statistics) get their numbers back."""
    saved = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in saved:
            if not torch.equal(buffer, value):  # batch norm changes them without a new version
                buffer.copy_(value)


@_unseen
def learn_alone(
    module: nn.Module, args: tuple, kwargs: dict, device: torch.device
) -> tuple[Row, tuple[int | None, ...]]:
    """A fake pass of one module on abstract arguments: its output, and for each leaf the aval
    argument whose storage it shares (None: its own; -1: a weight)."""
    tree, _, leaves = take_apart((args, kwargs))
    weights = weights_of(module)
    mode = Shapes(weights, device, integers=False)
    with _quiet(), _state_kept(module):
        fakes = [mode.fake(leaf.fresh()) if isinstance(leaf, Aval) else leaf for leaf in leaves]
        args, kwargs = put_together(tree, fakes)
        with mode:
            event = _Event("", "output", 0, module(*args, **kwargs))
    owner = {storage_of(t): -1 for t in weights if t.layout is torch.strided}
    given = [fake for fake in fakes if isinstance(fake, torch.Tensor)]
    owner |= {storage_of(fake): number for number, fake in enumerate(given)}
    origin = mode.origin
    storages = [None if t is None else storage_of(t) for t in event.tensors]
    alias = [owner.get(s, owner.get(origin.get(s, -1))) if s else None for s in storages]  # type: ignore[arg-type]
    return event.row({}, set(), origin), tuple(alias)
