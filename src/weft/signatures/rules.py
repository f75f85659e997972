"""Shape rules: what one of the model's own modules gives for abstract arguments.

    rules.apply(model.lm_head, "lm_head", (intern(...),), {}).leaves     # (((), float32[1, 9, V]),)

Plain layers have a rule; anything else is run once as a fake, or asked of whoever has the model,
and remembered. A rule has a name, under which a server publishes it for a module of any class:

    linear        dense, weight `[out, in]`: the last size becomes `out`
    transposed    the same with weight `[in, out]` (the Conv1D of GPT-2)
    embedding     one row of the weight for each integer
    same          shape and dtype stay; where there is a weight, it must fit the last sizes
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from weft.errors import GraphError, RecordingError
from weft.graph.site import Leaf
from weft.kernels.aval import Aval, contiguous, dtype_name

from .asking import Asker
from .learn import learn_alone
from .reading import decode
from .structure import Tree, put_together, take_apart
from .tables import Applied, encode


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
    """The shape rules of one model, with the results of its fake passes, or an asker's answers."""

    def __init__(
        self, device_of: Callable[[nn.Module], torch.device], asker: Asker | None = None
    ) -> None:
        self._device_of = device_of
        self._asker = asker
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
        found = self._known.get(key) or self._ruled(module, path, leaves)
        if found is None:
            with self._lock:
                found = self._known.get(key) or self._find_out(module, path, args, kwargs)
        if len(self._known) > 4096:
            self._known.clear()
        self._known[key] = found
        return found

    def answer(self, module: nn.Module, path: str, args: tuple, kwargs: dict) -> bytes:
        """What `apply` gives, for a client that asks."""
        found = self.apply(module, path, args, kwargs)
        return encode(applied=[Applied(found.tree, found.leaves, found.alias)])

    def _ruled(self, module: nn.Module, path: str, leaves: list) -> Result | None:
        try:
            return by_rule(module, leaves)
        except Exception as error:
            raise _refused(path, error) from error

    def _find_out(self, module: nn.Module, path: str, args: tuple, kwargs: dict) -> Result:
        if self._asker is not None:
            return self._by_asking(self._asker, path, args, kwargs)
        try:
            return self._by_pass(module, args, kwargs)
        except Exception as error:
            raise _refused(path, error) from error

    def _by_pass(self, module: nn.Module, args: tuple, kwargs: dict) -> Result:
        row, alias = learn_alone(module, args, kwargs, self._device_of(module))
        return Result(row.tree, tuple(zip(row.keys, row.what, strict=True)), alias)

    def _by_asking(self, asker: Asker, path: str, args: tuple, kwargs: dict) -> Result:
        said = decode(asker.apply(path, args, kwargs)).applied
        if len(said) != 1:
            raise GraphError("one module's result was asked for, and is not in the answer")
        return Result(*said[0])


def _refused(path: str, error: Exception) -> RecordingError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return RecordingError(
        f"{path} cannot take these arguments: {type(error).__name__}: {reason}",
        fix="give it what its forward takes",
    )


def by_rule(module: nn.Module, leaves: list) -> Result | None:
    """What a module gives for arguments with these leaves by its rule; None where it has none.

    Raises TypeError for arguments that only a fake module would take.
    """
    if len(leaves) != 1 or not isinstance(leaves[0], Aval) or _hooked(module):
        return None
    rule = RULES.get(rule_of(module) or "")
    aval = rule(module, leaves[0]) if rule else None
    return None if aval is None else Result(None, (((), aval),), (None,))


def rule_of(module: nn.Module) -> str | None:
    """The name of the rule of a module's class, if it has one."""
    if isinstance(module, nn.LayerNorm) and module.weight is None:
        return None  # nothing would tell which sizes fit
    return _CLASSES.get(type(module)) or getattr(type(module), "weft_rule", None)


def _key(leaf: Any) -> Any:
    return leaf if isinstance(leaf, Aval) else (type(leaf), leaf)


def _hooked(module: nn.Module) -> bool:
    """Whether someone's hooks may change what the module gives."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


# Each rule gives None where it does not apply, and the fake pass decides (or words the error).


def _linear(module: nn.Module, aval: Aval) -> Aval | None:
    weight: Any = module.weight
    out, into = weight.shape
    return _dense(weight, aval, into, out)


def _transposed(module: nn.Module, aval: Aval) -> Aval | None:
    weight: Any = module.weight
    into, out = weight.shape
    return _dense(weight, aval, into, out)


def _dense(weight: torch.Tensor, aval: Aval, into: int, out: int) -> Aval | None:
    if aval.dtype != weight.dtype:  # a fake pass would let it through
        raise TypeError(f"expected {dtype_name(weight.dtype)}, got {dtype_name(aval.dtype)}")
    if not aval.shape or aval.shape[-1] != into:
        return None
    if aval.shape.numel() == 0 or not aval.contiguous:
        return None
    return contiguous((*aval.shape[:-1], out), aval.dtype)


def _embedding(module: nn.Module, aval: Aval) -> Aval | None:
    weight: Any = module.weight
    if aval.dtype not in (torch.int64, torch.int32) or not aval.contiguous:
        return None
    return contiguous((*aval.shape, weight.shape[1]), weight.dtype)


def _same(module: nn.Module, aval: Aval) -> Aval | None:
    if getattr(module, "inplace", False) or not aval.contiguous or not aval.shape:
        return None
    if aval.shape.numel() == 0 or not aval.dtype.is_floating_point:
        return None
    weight = module._parameters.get("weight")
    if weight is not None:
        fits = weight.dtype == aval.dtype and aval.shape[-weight.dim() :] == weight.shape
        return contiguous(tuple(aval.shape), aval.dtype) if fits else None
    return contiguous(tuple(aval.shape), aval.dtype)


RULES: dict[str, Callable[[nn.Module, Aval], Aval | None]] = {
    "linear": _linear,
    "transposed": _transposed,
    "embedding": _embedding,
    "same": _same,
}

_CLASSES: dict[type, str] = {
    nn.Linear: "linear",
    nn.Embedding: "embedding",
    nn.LayerNorm: "same",
    nn.GELU: "same",
    nn.ReLU: "same",
    nn.SiLU: "same",
    nn.Tanh: "same",
    nn.Sigmoid: "same",
}
