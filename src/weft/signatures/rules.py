"""Shape rules: what one of the model's own modules gives for abstract arguments.

    rules.apply(model.lm_head, "lm_head", (intern(...),), {}).leaves     # (((), float32[1, 9, V]),)

Plain layers have a rule; anything else is run once as a fake and remembered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from weft.errors import RecordingError
from weft.graph.site import Leaf
from weft.kernels.aval import Aval, contiguous, dtype_name

from .learn import learn_alone
from .structure import Tree, put_together, take_apart


class Result:
    """What a module gives: `leaves` and `rebuild` as in `SiteSignature`.

    `alias[i]` is None where leaf `i` has a storage of its own, else the position of the argument
    (among the avals of args and kwargs, in order) whose storage it shares; -1 is a weight.
    """

    __slots__ = ("alias", "leaves", "tree")

    def __init__(
        self, tree: Tree, leaves: tuple[tuple[Leaf, Any], ...], alias: tuple[int | None, ...]
    ) -> None:
        self.tree = tree
        self.leaves = leaves
        self.alias = alias

    def rebuild(self, values: list) -> Any:
        """The module's Python structure with `values` as its leaves."""
        return put_together(self.tree, values)


class Rules:
    """The shape rules of one model, with the results of its fake passes."""

    def __init__(self, device_of: Callable[[nn.Module], torch.device]) -> None:
        self._device_of = device_of
        self._known: dict[Any, Result] = {}
        self.by_key: dict[Any, Any] = {}  # the callers' own: see `Signature.applied`
        self._lock = threading.Lock()

    def clear(self) -> None:
        self._known.clear()
        self.by_key.clear()

    def apply(self, module: nn.Module, path: str, args: tuple, kwargs: dict) -> Result:
        """What `module` gives. Raises RecordingError if it cannot take the arguments."""
        tree, _, leaves = take_apart((args, kwargs))
        key = (path, tree, tuple([_key(leaf) for leaf in leaves]))
        found = self._known.get(key)
        if found is None:
            with self._lock:
                found = self._find_out(module, path, args, kwargs, leaves)
                if len(self._known) > 4096:
                    self._known.clear()
                self._known[key] = found
        return found

    def _find_out(
        self, module: nn.Module, path: str, args: tuple, kwargs: dict, leaves: list
    ) -> Result:
        try:
            return self._by_rule(module, leaves) or self._by_pass(module, args, kwargs)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise RecordingError(
                f"{path} cannot take these arguments: {type(error).__name__}: {reason}",
                fix="give it what its forward takes",
            ) from error

    def _by_rule(self, module: nn.Module, leaves: list) -> Result | None:
        if len(leaves) != 1 or not isinstance(leaves[0], Aval) or _hooked(module):
            return None
        rule = _RULES.get(type(module))
        aval = rule(module, leaves[0]) if rule else None
        return None if aval is None else Result(None, (((), aval),), (None,))

    def _by_pass(self, module: nn.Module, args: tuple, kwargs: dict) -> Result:
        row, alias = learn_alone(module, args, kwargs, self._device_of(module))
        return Result(row.tree, tuple(zip(row.keys, row.what, strict=True)), alias)


def _key(leaf: Any) -> Any:
    return leaf if isinstance(leaf, Aval) else (type(leaf), leaf)


def _hooked(module: nn.Module) -> bool:
    """Whether someone's hooks may change what the module gives."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


# Each rule gives None where it does not apply, and the fake pass decides (or words the error).


def _linear(module: nn.Module, aval: Aval) -> Aval | None:
    weight: Any = module.weight
    if aval.dtype != weight.dtype:  # a fake pass would let it through
        raise TypeError(f"expected {dtype_name(weight.dtype)}, got {dtype_name(aval.dtype)}")
    if not aval.shape or aval.shape[-1] != weight.shape[1]:
        return None
    if aval.shape.numel() == 0 or not aval.contiguous:
        return None
    return contiguous((*aval.shape[:-1], weight.shape[0]), aval.dtype)


def _embedding(module: nn.Module, aval: Aval) -> Aval | None:
    weight: Any = module.weight
    if aval.dtype not in (torch.int64, torch.int32) or not aval.contiguous:
        return None
    return contiguous((*aval.shape, weight.shape[1]), weight.dtype)


def _norm(module: nn.Module, aval: Aval) -> Aval | None:
    weight: Any = module.weight
    if weight is None or weight.dtype != aval.dtype or not aval.contiguous:
        return None
    if aval.shape[-weight.dim() :] != weight.shape:
        return None
    return contiguous(tuple(aval.shape), aval.dtype)


def _elementwise(module: nn.Module, aval: Aval) -> Aval | None:
    if getattr(module, "inplace", False) or not aval.contiguous:
        return None
    return contiguous(tuple(aval.shape), aval.dtype) if aval.dtype.is_floating_point else None


_RULES: dict[type, Callable[[nn.Module, Aval], Aval | None]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.LayerNorm: _norm,
    nn.GELU: _elementwise,
    nn.ReLU: _elementwise,
    nn.SiLU: _elementwise,
    nn.Tanh: _elementwise,
    nn.Sigmoid: _elementwise,
}
