"""Signatures: what each site of a model looks like for one input layout, learnt without weights.

    signatures = Signatures(lambda: skeleton)             # one for each model
    sig = signatures.for_call((ids,), {})                 # -> Signature
    site = sig.site("transformer.h.3", "output", 0)       # -> SiteSignature
    site.leaves                                           # (((), float32[1, 9, 768]),)
    sig.calls("transformer.h.3")                          # 1

The first call of a layout costs one fake pass of the model; later ones a look-up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from weft.errors import RecordingError
from weft.graph.site import Leaf
from weft.kernels.aval import aval_of

from .learn import Facts, Row, Table, learn, learn_by_running, weights_of
from .rules import Result, Rules
from .structure import PLAIN, Opaque, Plain, put_together, take_apart

__all__ = ["Facts", "Opaque", "Plain", "Signature", "Signatures", "SiteSignature"]

# Layouts remembered for each model; a signature is small, a fresh one costs a pass.
REMEMBERED = 1024


class SiteSignature:
    """One site: `leaves` are (key path, `Aval` | `Plain` | `Opaque`), `facts` stands beside it.

    `index` is the place in the firing order of the pass.
    """

    __slots__ = ("facts", "index", "leaves", "tree")

    def __init__(self, index: int, row: Row) -> None:
        self.index = index
        self.leaves: tuple[tuple[Leaf, Any], ...] = tuple(zip(row.keys, row.what, strict=True))
        self.facts = row.facts
        self.tree = row.tree

    def rebuild(self, values: list) -> Any:
        """The site's Python structure with `values` as its leaves, in the order of `leaves`."""
        return put_together(self.tree, values)


class Signature:
    """All sites of one pass. Sites are made when asked for."""

    def __init__(self, table: Table, rules: Rules) -> None:
        self._table = table
        self._rules = rules
        self._sites: dict[tuple[str, str, int], SiteSignature] = {}
        rows = enumerate(table.rows)
        self._index = {(row.path, row.port, row.call): index for index, row in rows}

    @property
    def order(self) -> tuple[tuple[str, str, int], ...]:
        """(path, port, call) of every site, in firing order."""
        return tuple([(row.path, row.port, row.call) for row in self._table.rows])

    def site(self, path: str, port: str, call: int = 0) -> SiteSignature:
        """The site. Raises LookupError if it does not fire in this pass."""
        key = (path, port, call)
        found = self._sites.get(key)
        if found is None:
            path = self._table.aliases.get(path, path)
            index = self._index.get((path, port, call))
            if index is None:
                raise LookupError(f"{path or '<root>'}.{port} call {call} does not fire")
            found = self._sites[key] = SiteSignature(index, self._table.rows[index])
        return found

    def calls(self, path: str) -> int:
        """How often the module is called in this pass."""
        path = self._table.aliases.get(path, path)
        count = 0
        while (path, "inputs", count) in self._index:
            count += 1
        return count

    def apply(self, module: nn.Module, path: str, args: tuple, kwargs: dict) -> Result:
        """What `module`, which stands at `path`, gives for arguments with avals as tensors."""
        return self._rules.apply(module, path, args, kwargs)


class Signatures:
    """The signatures of one model; safe to use from several threads.

    `module_provider()` gives the module, on meta or real. `real()` gives it with weights, for
    forwards that cannot be faked. `device` is where the model will run (default: where the weights
    are, or the CPU for weights on meta).
    """

    def __init__(
        self,
        module_provider: Callable[[], nn.Module],
        real: Callable[[], nn.Module] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._module = module_provider
        self._real = real
        self._device = None if device is None else torch.device(device)
        self._lock = threading.RLock()
        self._known: dict[Any, Signature] = {}
        self._watched: dict[Any, frozenset[int]] = {}
        self.rules = Rules(self._device_of)

    def for_call(self, args: tuple, kwargs: dict) -> Signature:
        """The signature of `module(*args, **kwargs)`."""
        layout, tensors = layout_of(args, kwargs)
        watched = self._watched.get(layout)
        if watched is not None:
            found = self._known.get(layout if not watched else _full_key(layout, tensors, watched))
            if found is not None:
                return found
        with self._lock:
            return self._learn(layout, tensors, args, kwargs)

    def clear(self) -> None:
        """Forgets everything; for a model whose code or options have changed."""
        with self._lock:
            self._known.clear()
            self._watched.clear()
            self.rules.clear()

    def _learn(self, layout: Any, tensors: list, args: tuple, kwargs: dict) -> Signature:
        watched = self._watched.get(layout, frozenset())
        found = self._known.get(_full_key(layout, tensors, watched) if watched else layout)
        if found is None or layout not in self._watched:
            table = self._pass(args, kwargs)
            # what one pass did not look at another one may: keys are made of all that was looked at
            watched = watched | frozenset().union(*[look.inputs for look in table.looks])
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            found = Signature(table, self.rules)
            self._known[_full_key(layout, tensors, watched) if watched else layout] = found
            self._watched[layout] = watched
        return found

    def _device_of(self, module: nn.Module) -> torch.device:
        if self._device is not None:
            return self._device
        kinds = [t.device for t in weights_of(module) if t.device.type != "meta"]
        return kinds[0] if kinds else torch.device("cpu")

    def _pass(self, args: tuple, kwargs: dict) -> Table:
        module = self._module()
        reasons = []
        for integers in (True, False):
            try:
                return learn(module, args, kwargs, self._device_of(module), integers)
            except Exception as error:  # noqa: BLE001 (any code of the model may raise anything)
                reasons.append(error)
        if self._real is None:
            raise _unlearnable(reasons[0]) from reasons[0]
        try:
            return learn_by_running(self._real(), args, kwargs)
        except Exception as error:
            raise _unlearnable(error) from error


def _unlearnable(error: BaseException) -> RecordingError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return RecordingError(
        "the shapes inside the model could not be found out: its forward pass failed with "
        f"{type(error).__name__}: {reason}",
        fix="check that the model runs on this input; a forward that branches on values needs "
        "its weights loaded",
    )


def layout_of(args: tuple, kwargs: dict) -> tuple[Any, list[torch.Tensor]]:
    """A key of all that a pass can depend on except numbers, and the tensors."""
    tensors: list[torch.Tensor] = []
    parts = [_layout(arg, tensors) for arg in args]
    for key, value in kwargs.items():
        parts.append(key)
        parts.append(_layout(value, tensors))
    if len(tensors) > 1:
        storages = [t.untyped_storage()._cdata for t in tensors]
        if len(set(storages)) < len(storages):
            parts.append(tuple([storages.index(storage) for storage in storages]))
    return (len(args), *parts), tensors


def _layout(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return aval_of(value), value.device
    if type(value) in PLAIN:
        return type(value), value
    tree, _, leaves = take_apart(value)
    if tree is None:
        return type(value), id(type(value)), _inside(value)
    return tree, tuple([_layout(leaf, tensors) for leaf in leaves])


def _inside(value: Any) -> Any:
    """What is in an object that is no container, such as a cache: layouts and plain values."""
    seen: set[int] = set()

    def walk(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return aval_of(item)
        if type(item) in PLAIN:
            return type(item), item
        if id(item) in seen:
            return None
        seen.add(id(item))
        if isinstance(item, (tuple, list)):
            return tuple([walk(part) for part in item])
        if isinstance(item, dict):
            return tuple([(str(key), walk(part)) for key, part in item.items()])
        if isinstance(item, (torch.dtype, torch.device, torch.layout)):
            return str(item)
        return type(item).__qualname__, walk(getattr(item, "__dict__", None))

    return walk(value)


def _full_key(layout: Any, tensors: list[torch.Tensor], watched: frozenset[int]) -> Any:
    """The layout and what the numbers of the looked-at inputs are like."""
    return layout, tuple([value_class(tensors[number]) for number in sorted(watched)])


def value_class(tensor: torch.Tensor) -> str | bytes:
    """`full` for a mask without holes, `holes` for one with, else the numbers themselves."""
    if tensor.dtype is torch.bool:
        return "full" if tensor.all() else "holes"
    if bool((tensor == 1).all()):
        return "full"
    if bool(((tensor == 0) | (tensor == 1)).all()):
        return "holes"
    return tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
