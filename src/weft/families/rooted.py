"""`Rooted`: a model whose call is another method than its forward.

    rooted = Rooted(net, method_of(net, "encode"))
    rooted(x)                       # net.encode(x); the same modules and weights, by the same paths

Only a method that the model's own class has, and `nn.Module` does not, can be one: a name is looked
up in a list, and never walked.
"""

from __future__ import annotations

import difflib
import inspect
from collections import OrderedDict
from typing import Any

from torch import nn

from weft.errors import UnknownOptionError

_SHOWN = 8
"""Methods that an error lists; a model of `transformers` has hundreds."""


class Rooted(nn.Module):
    """`net`, called by one of its methods. Modules, weights and buffers are those of `net`."""

    def __init__(self, net: nn.Module, method: str) -> None:
        super().__init__()
        hooks = {name: OrderedDict() for name in self.__dict__ if name.endswith("_hooks")}
        plain = {name: self.__dict__[name] for name in self.__dict__ if "_hooks_" in name}
        self.__dict__.update(net.__dict__)
        self.__dict__.update(hooks, **plain)  # those of `net` are of its forward
        self.__dict__.update(_net=net, _method=method)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        net, method = self.__dict__["_net"], self.__dict__["_method"]
        return getattr(net, method)(*args, **kwargs)


def method_of(net: nn.Module, given: object) -> str | None:
    """The name of the method that a user means by its name, or by itself; None: the forward.

    Raises `UnknownOptionError` for what is none of the model's own methods.
    """
    name = given if isinstance(given, str) else _name_of(net, given)
    if name in ("forward", "__call__"):
        return None
    known = methods_of(net)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        shown = known if len(known) <= _SHOWN else [*known[:_SHOWN], "others"]
        has = f"it has {', '.join(shown)}" if known else "it has none but its forward"
        raise UnknownOptionError(
            f"fn={name!r} is no method that {type(net).__name__} defines; {has}",
            fix=f"did you mean {near[0]!r}?" if near else "leave it out to trace the forward",
        )
    return name


def methods_of(net: nn.Module) -> list[str]:
    """The public methods of the model's own class that `nn.Module` does not have."""
    found = [name for name in dir(type(net)) if not name.startswith("_")]
    return [
        name
        for name in found
        if not hasattr(nn.Module, name)
        and inspect.isfunction(inspect.getattr_static(type(net), name))
    ]


def _name_of(net: nn.Module, given: object) -> str:
    """The name of a method that was given itself."""
    owner = getattr(given, "__self__", None)
    if inspect.ismethod(given) and isinstance(owner, nn.Module) and type(owner) is type(net):
        return given.__name__
    raise UnknownOptionError(
        f"fn is a method of the model, or its name, not {type(given).__name__}",
        fix='fn="encode"; a function of your own can be called in the block, on values',
    )
