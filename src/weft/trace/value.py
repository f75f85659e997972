"""`Value`: what a user's code holds inside a block in place of a tensor.

A `Value` is a `torch.Tensor` on the meta device with the true shape and dtype. Every operation on
it goes to its recorder, which appends a node to the graph. After the run a saved `Value` object
itself becomes the plain tensor (`torch.utils.swap_tensors`); any other one raises when used.

This file is the noun only; what operations mean stands in `recorder`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from weft.graph.node import Ref
from weft.kernels.aval import Aval, dtype_name

from .away import filled

if TYPE_CHECKING:
    from .away import Away
    from .carry import Kept
    from .recorder import Recorder
    from .sites import LeafState


class Owner:
    """What stands in a family where no site of the model does: it is asked before an edit in
    place, and told after it."""

    __slots__ = ()

    def check_writable(self, family: Family) -> None:
        """Raises unless an operation in place may change the family."""
        raise NotImplementedError

    def filled(self, family: Family, at: int) -> None:
        """After such an operation."""
        raise NotImplementedError


class Family:
    """All values that share one storage: a tensor and its views.

    `leaf` is the site's leaf that it was read from, with the `version` it then had; `time` is the
    firing index of the latest site that its content depends on; `made` the line that read it;
    `written` the line of the last in-place edit. `readonly` names a weight.
    """

    __slots__ = ("leaf", "made", "readonly", "root", "time", "version", "written")

    def __init__(self, root: Ref | None, time: int, made: int) -> None:
        self.root = root
        self.time = time
        self.made = made
        self.leaf: LeafState | Owner | None = None
        self.version = 0
        self.written: int | None = None
        self.readonly: str | None = None


class Sizes(tuple):
    """`value.shape`: a tuple of ints that tells its recorder which of them were read.

    Handed whole to a torch function it stays symbolic; an item taken out is a number, and binds
    the graph to that size.
    """

    _of: Value

    def __getitem__(self, item: Any) -> Any:
        got = tuple.__getitem__(self, item)
        dims = range(len(self))[item]
        self._of._rec.bind(self._of, (dims,) if isinstance(dims, int) else tuple(dims))
        return torch.Size(got) if isinstance(got, tuple) else got

    def __iter__(self) -> Any:
        self._of._rec.bind(self._of, tuple(range(len(self))))
        return tuple.__iter__(self)

    def __repr__(self) -> str:
        return f"torch.Size({list(tuple.__iter__(self))})"

    def __eq__(self, other: object) -> bool:
        self._of._rec.bind(self._of, tuple(range(len(self))))
        return tuple.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return tuple.__hash__(self)

    def __add__(self, other: tuple) -> torch.Size:
        return torch.Size([*self, *other])

    def __radd__(self, other: tuple) -> torch.Size:
        return torch.Size([*other, *self])

    def numel(self) -> int:
        """Number of elements."""
        return self._of.numel()


class Value(torch.Tensor):
    """A tensor that will exist when the model runs. Use it like the tensor it stands for."""

    _rec: Recorder
    _ref: Ref
    _aval: Aval
    _family: Family
    _time: int
    _at: int
    _bare: str | None = None
    _missed: bool = False  # saved, but a stop came first
    _part: tuple[Ref, Any] | None = None
    _real: torch.Tensor | None = None
    _kept: Kept | None = None  # the session that has filled it, until it ends
    _away: Away | None = None  # where its tensor is, if a session on a server has it
    _marks: Mapping[str, Any] | None = None  # what its tensor is to have, when it is here
    _stands: torch.Tensor | None = None  # what stands for it there, in graphs

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return first_value(args, kwargs)._rec.dispatch(func, args, kwargs or {})

    def save(self, name: str | None = None) -> Any:
        """Brings the value back after the run, frozen as it is at this line.

        Returns a handle that becomes a plain `torch.Tensor` when the block has run. `name` is its
        key in the results; the default is the line number.
        """
        return self._rec.save_value(self, name)

    @property
    def shape(self) -> Any:  # type: ignore[override]
        """Sizes, true ones; reading one as a number binds the graph to it."""
        if self._rec.open:
            sizes = Sizes(self._aval.shape)
            sizes._of = self
            return sizes
        return self._real.shape if self._real is not None else self._aval.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self._aval.dtype

    @property
    def ndim(self) -> int:  # type: ignore[override]
        return len(self._aval.shape) if self._real is None else self._real.ndim

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where results will live; never meta."""
        return self._rec.device

    @property
    def grad(self) -> Any:  # type: ignore[override]
        """The gradient of this value: see `grads`."""
        return self._rec.gradient_of(self)

    @grad.setter
    def grad(self, new: Any) -> None:
        self._rec.set_gradient(self, new)

    def backward(self, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        """As `Tensor.backward`; `with loss.backward():` has the gradients of this one as they flow.

        gradient: that of the value itself, where it is not one number. create_graph: gradients can
        be differentiated again. inputs: the client tensors that get a `.grad` (default: all that
        require one). retain_graph: accepted; the history is kept while a later backward needs it.
        """
        return self._rec.backward(self, args, options)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        if self._real is not None:
            return repr(self._real)
        return self._rec.describe(self)

    def __format__(self, spec: str) -> str:
        real = filled(self) if spec else self._real  # print is no look, a number asked for is
        real = real if real is not None else self._rec.shown(self)
        return format(real, spec) if real is not None else repr(self)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """`array * value`, `np.exp(value)`: the function of that name in torch."""
        function = getattr(torch, ufunc.__name__, None)
        if function is None or method != "__call__" or kwargs:
            raise self._rec.refusal(
                f"numpy's {ufunc.__name__} ({method}) cannot be recorded",
                "use a torch function, or value.numpy(), which looks at the numbers",
            )
        numpy_kinds = (np.ndarray, np.generic)
        return function(*[torch.as_tensor(x) if isinstance(x, numpy_kinds) else x for x in inputs])

    def __deepcopy__(self, memo: dict) -> Any:
        return self.clone()

    def __copy__(self) -> Any:
        return self._rec.handle(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        real = filled(self)
        if real is not None:
            return real.view_as(real).__reduce_ex__(protocol)
        raise self._rec.refusal(
            "a value of a block cannot be pickled: it has no numbers yet",
            "save it with .save() and pickle the tensor after the block",
        )


def make(recorder: Recorder, ref: Ref, aval: Aval, family: Family, time: int, at: int) -> Value:
    """A handle on result `ref`."""
    value = torch.Tensor._make_subclass(Value, aval.meta)  # a fresh alias, with no view or owner
    value._rec = recorder
    value._ref = ref
    value._aval = aval
    value._family = family
    value._time = time
    value._at = at
    if recorder.made is not None:
        recorder.made.append(weakref.ref(value))
    return value


def first_value(args: Any, kwargs: dict | None = None) -> Value:
    """The first `Value` among (nested) arguments."""
    found = _find(args)
    if found is None and kwargs:
        found = _find(tuple(kwargs.values()))
    assert found is not None, "a torch function was dispatched to Value without one"
    return found


def _find(args: Any) -> Value | None:
    for arg in args:
        if isinstance(arg, Value):
            return arg
        if isinstance(arg, slice):
            found = _find((arg.start, arg.stop, arg.step))
        elif isinstance(arg, (tuple, list)):
            found = _find(arg)
        elif isinstance(arg, dict):
            found = _find(arg.values())
        else:
            continue
        if found is not None:
            return found
    return None


def short(aval: Aval) -> str:
    """`float32[1, 9, 768]`."""
    return f"{dtype_name(aval.dtype)}{list(aval.shape)}"
