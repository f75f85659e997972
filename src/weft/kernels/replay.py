"""The abstract result of a recorded operation on other shapes than it was recorded with.

found = outcome_again(node, env)       # env: Ref -> Aval
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from weft.graph.node import Arg, Call, Complex, Map, Name, Ref, Seq, Shape, Slice

from .abstract import Outcome
from .aval import Aval
from .forms import INDEXED, pinned
from .quick import outcome

Env = Mapping[Ref, Aval]
_FORMS: dict[str, Callable[[list[Any]], Any]] = {"tuple": tuple, "list": list, "size": torch.Size}


def outcome_again(node: Call, env: Env) -> Outcome:
    """What the operation gives for these shapes. Raises what PyTorch would."""
    args = tuple([value_of(arg, env) for arg in node.args])
    kwargs = {name: value_of(arg, env) for name, arg in node.kwargs}
    if node.op in INDEXED:
        args = (args[0], pinned(args[1]), *args[2:])
    return outcome(node.op, args, kwargs)


def tensor_refs(node: Call) -> list[Ref]:
    """The tensor arguments of an operation, as `Outcome` numbers them."""
    found: list[Ref] = []
    waiting: list[Any] = [*[arg for _, arg in reversed(node.kwargs)], *reversed(node.args)]
    while waiting:
        arg = waiting.pop()
        match arg:
            case Ref():
                found.append(arg)
            case Seq():
                waiting += reversed(arg.items)
            case Map():
                waiting += reversed(arg.values)
            case Slice():
                waiting += (arg.step, arg.stop, arg.start)
    return found


def value_of(arg: Arg, env: Env) -> Any:
    """An argument as Python has it, with `Aval`s as tensors."""
    match arg:
        case Ref():
            return env[arg]
        case Seq():
            return _FORMS[arg.form]([value_of(item, env) for item in arg.items])
        case Map():
            values = [value_of(item, env) for item in arg.values]
            return dict(zip(arg.keys, values, strict=True))
        case Slice():
            return slice(*[value_of(part, env) for part in (arg.start, arg.stop, arg.step)])
        case Shape():
            return torch.Size(env[arg.of].shape)
        case Name(form="ellipsis"):
            return ...
        case Name(form="float"):
            return float(arg.name)
        case Name():
            return getattr(torch, arg.name)
        case Complex():
            return complex(arg.real, arg.imag)
    return arg
