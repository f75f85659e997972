"""Finding the shape rules of modules, and proving them: see `signatures.rules`.

    rule_for(net.model.norm)          # "same"

A rule that is published is applied by clients without asking. PyTorch's plain layers have theirs
by class. Any other single layer is tried: the rule is its own only if fake passes at several sizes,
ranks and dtypes agree with it on shape, strides, dtype and a storage of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from weft.kernels.aval import Aval, contiguous
from weft.signatures.learn import learn_alone
from weft.signatures.rules import RULES, rule_of

# What stands before the last size. Long and wide ones, because a layer may cut off or round up.
_LEADING = ((), (3,), (2, 5), (1, 1), (4, 1), (1, 4099), (521, 3), (2, 3, 5))
_WIDTHS = (6, 1, 9, 4099)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32)


class Prover:
    """Proves the rules of one model: modules that are made alike are proven once."""

    def __init__(self) -> None:
        self._proven: dict[Any, str | None] = {}

    def rule_for(self, module: nn.Module) -> str | None:
        """The name of the module's rule, or None where there is none."""
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return None
        known = rule_of(module)
        if known is not None or module._modules:
            return known
        key = _made_like(module)
        if key not in self._proven:
            holding = (rule for rule in _candidates(module) if _holds(rule, module))
            self._proven[key] = next(holding, None)
        return self._proven[key]


def rule_for(module: nn.Module) -> str | None:
    """The rule of one module: `Prover`."""
    return Prover().rule_for(module)


def _made_like(module: nn.Module) -> Any:
    """What decides how a module of one class acts: its weights, and all that it was told."""
    tensors = (*module._parameters.items(), *module._buffers.items())
    weights = [(n, None if t is None else (t.dtype, tuple(t.shape))) for n, t in tensors]
    told = [(name, _text(value)) for name, value in vars(module).items() if name[0] != "_"]
    return type(module), tuple(weights), tuple(told)


def _text(value: Any) -> Any:
    plain = isinstance(value, (type(None), bool, int, float, str, tuple, torch.dtype))
    return repr(value) if plain else id(value)


def _candidates(module: nn.Module) -> tuple[str, ...]:
    """The rules that a module's weights allow."""
    weight = module._parameters.get("weight")
    if weight is None:
        return () if module._parameters else ("same",)
    return ("linear", "transposed", "embedding") if weight.dim() == 2 else ("same",)


def _holds(rule: str, module: nn.Module) -> bool:
    """Whether fake passes agree with the rule everywhere."""
    trials = list(_trials(rule, module))
    return bool(trials) and all(_agrees(rule, module, aval) for aval in trials)


def _trials(rule: str, module: nn.Module) -> Iterator[Aval]:
    weight = module._parameters.get("weight")
    if rule == "embedding":
        for leading in _LEADING:
            yield from [contiguous((*leading, 7), dtype) for dtype in _INTEGERS]
    elif weight is not None:
        last = {"linear": weight.shape[-1:], "transposed": weight.shape[:1]}.get(rule, weight.shape)
        yield from [contiguous((*leading, *last), weight.dtype) for leading in _LEADING]
    else:
        for width in _WIDTHS:
            shapes = [(*leading, width) for leading in _LEADING]
            yield from [contiguous(shape, dtype) for shape in shapes for dtype in _FLOATS]


def _agrees(rule: str, module: nn.Module, aval: Aval) -> bool:
    try:
        said = RULES[rule](module, aval)
        row, alias = learn_alone(module, (aval,), {}, torch.device("cpu"))
    except Exception:  # noqa: BLE001 (a module that is no such layer may refuse in any way)
        return False
    return said is not None and row.tree is None and row.what == (said,) and alias == (None,)
