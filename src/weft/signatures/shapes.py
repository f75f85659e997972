"""The mode under which a forward pass is learnt: floats are fake, known integers are real.

A pass under plain `FakeTensorMode` takes other branches than a real one: the mask code of
`transformers` asks whether a mask is all ones, and asks nothing of a fake tensor. So integer and
boolean tensors that derive only from the call's own integer inputs (ids, masks, positions) and from
factories (`arange`) stay real and are computed; weights, and all that derives from them, are fake:
they have a layout and no numbers, whatever device the weights are on (also meta).

Reading a number (`.item()`, `if x.all():`) of a real integer gives the number, and notes which of
the inputs it came from: `Shapes.looks`. Of a fake tensor it raises, as everywhere in PyTorch.

What this does not see: `.tolist()` and `.numpy()` of a real integer read memory directly.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .remembered import REMEMBERED, asked_of, remember

# Integers with more elements than this (the mask of one row and 2,000 positions) are fake: nobody
# asks for the numbers of so large a tensor.
LARGEST = 1 << 22

_DEVICE = torch.ops.prim.device.default
_LOOKS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
_NOTHING: frozenset[int] = frozenset()


class Unfakeable(Exception):
    """The forward pass does something that cannot be followed without real numbers."""


class Look(NamedTuple):
    """The model read a number that came from these inputs of the call; `truth`: it was a bool."""

    inputs: frozenset[int]
    truth: bool


class Shapes(TorchDispatchMode):
    """Runs operations on layouts, and on the numbers of small integers.

    `weights` are the tensors of the model; `device` is where results pretend to be. With
    `integers=False` integers are fake as well. Look number `contrary` comes out as it does not:
    that shows whether the answer matters (a warning about padding asks, and does nothing with it).
    """

    def __init__(
        self,
        weights: list[torch.Tensor],
        device: torch.device,
        integers: bool = True,
        contrary: int | None = None,
    ) -> None:
        super().__init__()
        self.device = device
        self.integers = integers
        self.contrary = contrary
        self.looks: list[Look] = []
        self.origin: dict[int, int] = {}  # storage of a fake -> storage of the tensor it stands for
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._mode.cache_enabled = False  # `remembered` has asked before, and forgets
        self._weights = {storage_of(t) for t in weights}
        self._fakes: dict[int, FakeTensor] = {}
        self._bases: dict[int, torch.UntypedStorage] = {}
        self._taint: dict[int, frozenset[int]] = {}
        self._kept: list[Any] = []  # an id is only unique while its object lives

    # -- the call's own inputs -------------------------------------------------------------------

    def inputs(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The call's tensors, in the same order, as the model may have them; never the originals.

        Those that share a storage still do. All are on the device pretended: a call that is only
        recorded, or sent somewhere else, is not moved to the model.
        """
        copies: dict[int, torch.UntypedStorage] = {}
        return [self._input(t, number, copies) for number, t in enumerate(tensors)]

    def _input(
        self, tensor: torch.Tensor, number: int, copies: dict[int, torch.UntypedStorage]
    ) -> torch.Tensor:
        if not self.integers or not _is_known_kind(tensor) or tensor.layout is not torch.strided:
            return self.fake(tensor, self.device)
        key = storage_of(tensor)
        if key not in copies:
            copies[key] = copied(tensor.untyped_storage(), self.device)
        copy = torch.empty(0, dtype=tensor.dtype, device=self.device)
        copy.set_(copies[key], tensor.storage_offset(), tensor.size(), tensor.stride())
        self._note(copy, self._taint.get(storage_of(copy), _NOTHING) | {number})
        return copy

    # -- operations ------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor:  # a third of all that is asked
            return args[0].fake_device
        kwargs = kwargs or {}
        tensors: list[torch.Tensor] = []
        _gather(args, tensors)
        _gather(kwargs.values(), tensors)
        if tensors and self.integers and self._computable(func, tensors):
            return self._on_numbers(func, *tree_flatten((args, kwargs)), tensors)
        if any(self._known(t) for t in _mutated(func, args, kwargs)):
            raise Unfakeable(f"{func} writes unknown numbers into known ones")
        if tensors:
            return self._from_memory(func, args, kwargs)
        flat, spec = tree_flatten((args, kwargs))
        out = self._on_layouts(func, flat, spec)
        if self.integers and _worth_knowing(func, out):
            out = self._really(func, flat, spec)
            self._note(out, _NOTHING)
        return out

    def _from_memory(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """What comes of layouts, found out where nobody has asked it before."""
        asked = asked_of(func, args, kwargs, self._faked)
        if asked is not None:
            made = REMEMBERED.get(asked.key)
            if made is not None:
                return made.anew(asked.tensors, self._mode)
        out = self._on_layouts(func, *tree_flatten((args, kwargs)))
        if asked is not None:
            after = asked_of(func, args, kwargs, self._faked)
            if after is not None and after.key == asked.key:  # its arguments' sizes are as before
                remember(asked, out, self._mode)
        return out

    def _computable(self, func: Any, tensors: list[torch.Tensor]) -> bool:
        random = torch.Tag.nondeterministic_seeded in func.tags
        return not random and all(map(self._known, tensors)) and _is_small(tensors)

    def _on_numbers(self, func: Any, flat: list, spec: Any, tensors: list[torch.Tensor]) -> Any:
        taint = frozenset().union(*[self._taint.get(storage_of(t), _NOTHING) for t in tensors])
        out = self._really(func, flat, spec)
        if _is_look(func, tensors):
            return self._look(out, taint)
        results = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor)]
        if not all(map(_is_known_kind, results)):
            return self._on_layouts(func, flat, spec)  # floats made of integers are fake
        args, kwargs = tree_unflatten(flat, spec)
        for tensor in [*results, *_mutated(func, args, kwargs)]:
            self._note(tensor, taint)
        return out

    def _look(self, out: Any, taint: frozenset[int]) -> Any:
        """Notes that the model reads a number; gives the contrary of a truth that is on trial."""
        self.looks.append(Look(taint, isinstance(out, bool)))
        self._note(out, taint)
        return not out if len(self.looks) - 1 == self.contrary else out

    def _really(self, func: Any, flat: list, spec: Any) -> Any:
        args, kwargs = tree_unflatten([self._place(leaf) for leaf in flat], spec)
        return func(*args, **kwargs)

    def _on_layouts(self, func: Any, flat: list, spec: Any) -> Any:
        args, kwargs = tree_unflatten([self._faked(leaf) for leaf in flat], spec)
        # `with self._mode: func(...)` would go through the dispatcher twice, a third slower
        return self._mode.dispatch(func, (), args, kwargs)

    def _faked(self, leaf: Any) -> Any:
        return self.fake(leaf) if isinstance(leaf, torch.Tensor) else self._place(leaf)

    def _place(self, leaf: Any) -> Any:
        """What a module asks for on meta, as its weights are, belongs on the device pretended."""
        if isinstance(leaf, torch.device) and leaf.type == "meta":
            return self.device
        return leaf

    # -- tensors ---------------------------------------------------------------------------------

    def _known(self, tensor: torch.Tensor) -> bool:
        return (
            not isinstance(tensor, FakeTensor)
            and _is_known_kind(tensor)
            and storage_of(tensor) not in self._weights
        )

    def _note(self, out: Any, taint: frozenset[int]) -> None:
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                key = storage_of(tensor)
                self._kept.append(tensor)
                self._taint[key] = self._taint.get(key, _NOTHING) | taint

    def fake(self, tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """The fake of a tensor, where it is, or on `device`; the fakes of two that share a storage
        share one too."""
        if isinstance(tensor, FakeTensor):
            return tensor
        found = self._fakes.get(id(tensor))
        if found is None:
            if device is None:
                device = self.device if tensor.device.type == "meta" else tensor.device
            with no_dispatch():
                elem = tensor.detach() if tensor.device.type == "meta" else self._on_meta(tensor)
                found = FakeTensor(self._mode, elem, device)
            self.origin[storage_of(elem)] = storage_of(tensor)
            self._kept.append(tensor)
            self._fakes[id(tensor)] = found
        return found

    def _on_meta(self, tensor: torch.Tensor) -> torch.Tensor:
        key = storage_of(tensor)
        if key not in self._bases:
            size = tensor.untyped_storage().nbytes()
            base = torch.empty(size, dtype=torch.uint8, device="meta")
            self._bases[key] = base.untyped_storage()
            self._kept.append(tensor)
        elem = torch.empty(0, dtype=tensor.dtype, device="meta")
        return elem.set_(self._bases[key], tensor.storage_offset(), tensor.size(), tensor.stride())


def _gather(args: Any, tensors: list[torch.Tensor]) -> None:
    """Adds the tensors among arguments, in order."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            tensors.append(arg)
        elif type(arg) in (tuple, list):
            _gather(arg, tensors)


def copied(storage: torch.UntypedStorage, device: torch.device) -> torch.UntypedStorage:
    """A copy of all of a storage, on a device."""
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]
    return whole.to(device, copy=True).untyped_storage()


def storage_of(tensor: torch.Tensor) -> int:
    """The identity of a tensor's storage; unique while the tensor lives."""
    return tensor.untyped_storage()._cdata


def _is_known_kind(tensor: torch.Tensor) -> bool:
    dtype = tensor.dtype
    return not dtype.is_floating_point and not dtype.is_complex and tensor.device.type != "meta"


def _is_small(tensors: list[torch.Tensor]) -> bool:
    """Whether an elementwise result of these, broadcast, stays small."""
    if all(t.numel() < 4096 for t in tensors):
        return True
    rank = max(t.dim() for t in tensors)
    sizes = [max([t.shape[-i] for t in tensors if t.dim() >= i]) for i in range(1, rank + 1)]
    return math.prod(sizes) <= LARGEST


def _is_look(func: Any, tensors: list[torch.Tensor]) -> bool:
    """Whether what comes out, or its shape, hangs on numbers."""
    if func is torch.ops.aten.index.Tensor:  # tagged, but only masks make shapes
        return any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
    return not _LOOKS.isdisjoint(func.tags)


def _worth_knowing(func: Any, out: Any) -> bool:
    """Whether a factory's result is worth having as numbers."""
    if not isinstance(out, torch.Tensor) or torch.Tag.nondeterministic_seeded in func.tags:
        return False
    dtype = out.dtype
    return not dtype.is_floating_point and not dtype.is_complex and out.numel() <= LARGEST


def _mutated(func: Any, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The arguments that an operation writes into."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += value if isinstance(value, (list, tuple)) else [value]
    return [value for value in found if isinstance(value, torch.Tensor)]
