"""Whether a tensor can hold what an operation in place would put into it.

    refuse_cast("Tensor.mul_", (int64[1, 9], 2.5), {})     # WriteMismatchError

On meta tensors PyTorch leaves most of its rules on dtypes out: `ids.mul_(2.5)` passes there, and
fails where there are numbers. So the operation is tried on the CPU, on tensors of the same dtypes
and numbers of dimensions with one element each. What it says then of dtypes holds for any shape;
all else that it may say (of shapes, of numbers) is not listened to.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from ..errors import WriteMismatchError
from ..graph.ops import EFFECTS, OPS
from .aval import Aval, filled
from .forms import avals_in, without_masks
from .table import FUNCTIONS

_CAST = frozenset({"Tensor.copy_", "Tensor.imag.__set__", "Tensor.real.__set__"})
"""They take any dtype, and cast it."""
_OF_DTYPES = re.compile(
    r"can't be cast|cannot be (safely )?(cast|converted)|dtype|data type|scalar[ -]type|datatype"
    r"|must not be a floating point|[Bb]oolean|bool tensor|negative integer powers|integral"
    r"|complex|only supports? |not implemented for '(Long|Int|Short|Char|Byte|Bool)'"
    r"|not implemented for '(Float|Double|ComplexFloat|ComplexDouble)'"
    r"|[Ee]xpected .*(long|Long|Float)"
)
"""Not those of half precision: what the CPU lacks there, a GPU may have."""
_ERRORS = (RuntimeError, TypeError, ValueError, IndexError)


def refuse_cast(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises `WriteMismatchError` where PyTorch refuses the dtypes of a call."""
    kind = OPS[name].kind
    if kind not in EFFECTS or name in _CAST:
        return
    if kind == "random_writes":  # the user's own stream of random numbers stays where it is
        kwargs = {**kwargs, "generator": torch.Generator()}
    if _has_many(args):  # what a mask chooses is filled with one value, and set to many
        args = without_masks(name, args)[0]
    if name == "Tensor.__setitem__":
        args = (args[0], _first(args[1]), *args[2:])
    with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
        told = _tried(name, *filled((args, kwargs), _small))
    if not _OF_DTYPES.search(told):
        return
    target = next(iter(avals_in((args, kwargs))), None)
    raise WriteMismatchError(
        f"torch.{name} cannot put its result into {target!r}: {told}",
        fix="use the result that the operation gives when it is not in place, which has a dtype of "
        "its own, or convert the tensor first",
    )


def _tried(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What PyTorch says of a call that it refuses."""
    try:
        FUNCTIONS[name](*args, **kwargs)
    except _ERRORS as error:
        return str(error).split("\n")[0]
    return ""


def _small(aval: Aval) -> torch.Tensor:
    make = torch.ones if aval.dtype is torch.bool else torch.zeros  # a mask chooses something
    return make((1,) * len(aval.shape), dtype=aval.dtype, device="cpu")


def _has_many(args: tuple[Any, ...]) -> bool:
    return len(args) > 2 and type(args[2]) is Aval and math.prod(args[2].shape) != 1


def _first(index: Any) -> Any:
    """An index of the same kind, into a tensor with one element."""
    if type(index) in (tuple, list):
        return type(index)([_first(item) for item in index])
    if type(index) is slice:
        return slice(None)
    return 0 if type(index) is int else index
