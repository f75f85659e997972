"""Which forms of a call the operation table covers, and which need numbers first.

The table names functions; a few of them take arguments that would choose a device, draw numbers
without a key or change a module's statistics (`refuse`), or give a result whose shape depends on
numbers (`needs_numbers`). All work on the arguments of a call, with `Aval`s in place of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch.nn.functional import multi_head_attention_forward

from ..errors import UnsupportedOperationError
from ..graph.ops import OPS
from .aval import Aval, intern


def avals_in(arg: Any) -> list[Aval]:
    """The `Aval`s of an argument structure, in flattening order."""
    kind = type(arg)
    if kind is Aval:
        return [arg]
    if kind is dict:
        arg = tuple(arg.values())
    elif kind is slice:
        arg = (arg.start, arg.stop, arg.step)
    elif not isinstance(arg, (tuple, list)):
        return []
    return [aval for item in arg for aval in avals_in(item)]


# Forms of a call that are not in the table

_UNSET = {"layout": torch.strided, "requires_grad": False, "pin_memory": False}
_RESERVED = ("out", "device", "generator", "names", "layout", "requires_grad", "pin_memory")


def refuse(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises `UnsupportedOperationError` for a form of a call which the table does not cover."""
    for key in _RESERVED:
        if kwargs.get(key) not in (None, _UNSET.get(key)):
            raise UnsupportedOperationError(f"torch.{name} with {key}= cannot be recorded")
    rule = _REFUSED.get(name)
    text = rule(*args, **kwargs) if rule else None
    if text:
        raise UnsupportedOperationError(f"torch.{name} cannot be recorded like this: {text}")


def _casts(
    tensor: Any = None, target: Any = None, *_: Any, dtype: Any = None, **__: Any
) -> str | None:
    if isinstance(target, (str, int, torch.device)) or isinstance(dtype, str):
        return "a device cannot be chosen in a graph"
    return None


def _type(tensor: Any = None, dtype: Any = None, *_: Any, **__: Any) -> str | None:
    return None if isinstance(dtype, torch.dtype) else "give it a torch.dtype"


def _keeps_statistics(
    input: Any = None, mean: Any = None, var: Any = None, weight: Any = None, bias: Any = None,
    training: bool = False, *_: Any, **named: Any,
) -> str | None:  # fmt: skip
    kept = named.get("running_mean", mean) is not None
    return "training=True changes the running statistics" if training and kept else None


def _instance_statistics(
    input: Any = None, mean: Any = None, var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, *rest: Any, **named: Any,
) -> str | None:  # fmt: skip
    return _keeps_statistics(input, mean, var, weight, bias, use_input_stats, *rest, **named)


def _attention_dropout(
    q: Any = None, k: Any = None, v: Any = None, mask: Any = None, dropout_p: float = 0.0,
    *_: Any, **__: Any,
) -> str | None:  # fmt: skip
    return "it draws numbers; use dropout_p=0 and nn.functional.dropout" if dropout_p else None


def _head_dropout(*args: Any, **named: Any) -> str | None:
    at = dict(zip(_HEADS, args, strict=False)) | named
    draws = at.get("dropout_p") and at.get("training", True)
    return "it draws numbers; use training=False" if draws else None


_HEADS = tuple(signature(multi_head_attention_forward).parameters)


def _few(input: Any = None, p: int = 1, *_: Any, **__: Any) -> str | None:
    return f"it would need {p} times the memory; 1024 at most" if p > 1024 else None


_REFUSED: dict[str, Callable[..., str | None]] = {
    "mvlgamma": _few,
    "nn.functional.local_response_norm": lambda input=None, size=1, *_, **__: _few(input, size),
    "special.multigammaln": _few,
    "Tensor.mvlgamma_": _few,
    "Tensor.to": _casts,
    "Tensor.type": _type,
    "nn.functional.batch_norm": _keeps_statistics,
    "nn.functional.instance_norm": _instance_statistics,
    "nn.functional.scaled_dot_product_attention": _attention_dropout,
    "nn.functional.multi_head_attention_forward": _head_dropout,
}


# Results whose shape depends on numbers

INDEXED = frozenset(("Tensor.__getitem__", "Tensor.__setitem__"))
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


def pinned(index: Any) -> Any:
    """An index with 0 for each integer that is a tensor: it chooses a place, not a shape."""
    if isinstance(index, Aval):
        chooses = not index.shape and index.dtype in _INTEGERS
        return 0 if chooses else index
    return tuple([pinned(item) for item in index]) if isinstance(index, tuple) else index


_ALWAYS = frozenset(
    {"nonzero", "argwhere", "masked_select", "bincount", "linalg.lstsq"}
    | {"unique", "unique_consecutive", "Tensor.unique", "Tensor.unique_consecutive"}
)
_MASKED_WRITES = ("Tensor.__setitem__", "index_put", "index_put_")


def needs_numbers(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call's result, or its shape, depends on numbers of its arguments."""
    if name in _ALWAYS or OPS[name].kind == "look":
        return True
    rule = _SOMETIMES.get(name)
    return bool(rule and rule(*args, **kwargs))


def _repeats(
    input: Any = None, repeats: Any = None, *_: Any, output_size: Any = None, **__: Any
) -> bool:
    return output_size is None and (repeats is None or input is None or type(repeats) is Aval)


def _classes(tensor: Any = None, num_classes: int = -1, **_: Any) -> bool:
    return num_classes == -1


def _only_condition(condition: Any = None, *rest: Any, **named: Any) -> bool:
    return not rest and not {"input", "self", "other"} & named.keys()


def _sections(input: Any = None, *rest: Any, **named: Any) -> bool:
    return any(type(value) is Aval for value in (*rest, *named.values()))


def _indexed_by_mask(tensor: Any, index: Any) -> bool:
    return any(map(_is_mask, avals_in(index)))


_SOMETIMES: dict[str, Callable[..., bool]] = {
    "repeat_interleave": _repeats,
    "nn.functional.one_hot": _classes,
    "where": _only_condition,
    "tensor_split": _sections,
    "Tensor.__getitem__": _indexed_by_mask,
}


def _is_mask(value: Any) -> bool:
    return type(value) is Aval and value.dtype in (torch.bool, torch.uint8)


def without_masks(name: str, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The calls to try: with each mask that is written through replaced by the indices it means.

    How many elements a mask selects is not known, but the values that are written tell: one, or
    the size of one of their dimensions.
    """
    if name not in _MASKED_WRITES or len(args) < 3 or not _indexed_by_mask(args[0], args[1]):
        return [args]
    sizes = args[2].shape if type(args[2]) is Aval else ()
    counts = dict.fromkeys((1, *sizes))
    return [(args[0], _indices(args[1], count), *args[2:]) for count in counts]


def _indices(index: Any, count: int) -> tuple[Any, ...]:
    """An index whose masks are replaced by `count` positions per dimension of the mask."""
    positions = intern((count,), (1,), 0, torch.int64)
    found: list[Any] = []
    for item in index if isinstance(index, (tuple, list)) else (index,):
        found += [positions] * len(item.shape) if _is_mask(item) else [item]
    return tuple(found)
