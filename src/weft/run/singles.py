"""Hooks at a site of a module that is called once in a pass: there is nothing to count.

`Taking` is the one at a site that is only read and saved (`taken`). It is as short as a hook that
was written by hand.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module

from weft.graph.site import Site

from .taken import Take

if TYPE_CHECKING:
    from .hooks import Drive

RUNNING: ContextVar[Drive | None] = ContextVar("weft_running", default=None)
"""The run that the module's call of this thread and task belongs to."""
_OVER: Any = object()  # the run of a hook that has done what it is there for


class Single:
    """One of them."""

    __slots__ = ("_drive", "_site", "_table", "_with_kwargs")

    def __init__(self, drive: Drive, module: Module, site: Site) -> None:
        self._drive = drive
        self._site = site
        self._with_kwargs: Any = None
        key: Any = self
        if site.port == "inputs":
            self._with_kwargs = module._forward_pre_hooks_with_kwargs
            self._with_kwargs[key] = True
            self._table: Any = module._forward_pre_hooks
            self._table[key] = self.before
        else:
            self._table = module._forward_hooks
            self._table[key] = self.after

    def unhook(self) -> None:
        self._table.pop(self, None)
        if self._with_kwargs is not None:
            self._with_kwargs.pop(self, None)

    def before(self, module: Module, args: tuple[Any, ...], *rest: Any) -> Any:
        """The forward pre-hook. Without `rest`, another thread's run was just being removed."""
        if RUNNING.get() is not self._drive:
            return None
        given = (args, rest[0])
        new = self._drive.fire(self._site, given)
        return None if new is given else new

    def after(self, module: Module, args: tuple[Any, ...], *rest: Any) -> Any:
        """The forward hook: `rest` ends with the output."""
        drive = self._drive
        if RUNNING.get() is not drive:
            return None
        output = rest[-1]
        new = drive.fire(self._site, output)
        return None if new is output else new


class Taken:
    """What the hooks of one forward have taken and the interpreter has not been told of yet.

    It is told of all of it at once: between two modules its own code would have to be fetched into
    the processor each time.
    """

    __slots__ = ("env", "fired", "left")

    def __init__(self, env: dict[int, torch.Tensor]) -> None:
        self.env = env
        self.fired: list[tuple[Site, Take]] = []
        self.left = 0  # hooks that have not fired


class Taking(Single):
    """Keeps a copy of the one tensor that a module returns."""

    __slots__ = ("_dtype", "_shape", "_slot", "_take", "_taken")

    def __init__(self, drive: Drive, module: Module, site: Site, take: Take, taken: Taken) -> None:
        self._drive = drive
        self._site = site
        self._with_kwargs = None
        self._take = take
        _, self._slot, _, self._shape, self._dtype, _ = take
        self._taken = taken
        taken.left += 1
        self._table = table = module._forward_hooks
        table[self] = self.after  # type: ignore[index]

    def after(self, module: Module, args: tuple[Any, ...], *rest: Any) -> Any:
        drive, output = self._drive, rest[-1]
        if RUNNING.get() is not drive or drive.error is not None:
            return None
        if (
            type(output) is not torch.Tensor
            or output.dtype is not self._dtype
            or output.shape != self._shape
        ):
            return super().after(module, args, *rest)  # it says what is wrong
        self._drive = _OVER  # a further call, which no fake pass has made, is another site
        taken = self._taken
        taken.env[self._slot] = output.clone()
        taken.fired.append((self._site, self._take))
        taken.left -= 1
        if not taken.left:
            drive.tell(self._site)
        return None
