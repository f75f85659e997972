"""`Calls`: the two hooks of one module in one run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn import Module

from weft.graph.site import Site

from .singles import RUNNING

if TYPE_CHECKING:
    from .hooks import Drive


class Calls:
    """The two hooks of one module. A call has one number, taken when it begins."""

    __slots__ = ("_drive", "_module", "_open", "inputs", "outputs", "started")

    def __init__(self, drive: Drive, module: Module) -> None:
        self._drive = drive
        self._module = module
        self.started = 0
        self._open: list[int] = []  # calls that have begun and not returned
        self.inputs: dict[int, Site] = {}
        self.outputs: dict[int, Site] = {}

    @property
    def current(self) -> int | None:
        """The number of the innermost call that has begun and not returned."""
        return self._open[-1] if self._open else None

    def hook(self) -> None:
        key: Any = self
        self._module._forward_pre_hooks_with_kwargs[key] = True
        self._module._forward_pre_hooks[key] = self.before
        self._module._forward_hooks[key] = self.after

    def unhook(self) -> None:
        key: Any = self
        self._module._forward_hooks.pop(key, None)
        self._module._forward_pre_hooks.pop(key, None)
        self._module._forward_pre_hooks_with_kwargs.pop(key, None)

    def before(self, module: Module, args: tuple[Any, ...], *rest: Any) -> Any:
        """The forward pre-hook. Without `rest`, another thread's run was just being removed."""
        if RUNNING.get() is not self._drive:
            return None
        number = self.started
        self.started += 1
        self._open.append(number)
        site = self.inputs.get(number)
        if site is None:
            return None
        given = (args, rest[0])
        new = self._drive.fire(site, given)
        return None if new is given else new

    def after(self, module: Module, args: tuple[Any, ...], *rest: Any) -> Any:
        """The forward hook: `rest` ends with the output."""
        if RUNNING.get() is not self._drive or not self._open:
            return None
        site = self.outputs.get(self._open.pop())
        if site is None:
            return None
        new = self._drive.fire(site, rest[-1])
        return None if new is rest[-1] else new
