"""Drawing a graph through a module: forward hooks on the modules that the graph names.

A hook acts only for the run it belongs to: a context variable, set around the model's call, says
which run that is. Another thread's forward through the same module, and a module that the graph
applies itself, fire nothing. All hooks are gone when `run` returns or raises.

Order: a user's own hooks that were there before come first, so a graph sees the inputs and outputs
that they leave. When nothing is left to run, the forward is stopped where it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import Module

from weft.errors import UnknownPathError
from weft.graph.node import Graph
from weft.graph.site import Leaf, Site, is_inside
from weft.sources.stand import NOTHING

from .backward import interpreter
from .calls import Calls
from .logs import OnValue
from .memory import storage
from .singles import RUNNING as _RUNNING
from .singles import Single, Taken, Taking
from .skips import Skipping
from .sources import Insides
from .structure import mapped, tensors
from .taken import Take
from .watch import Watch
from .weights import is_still_weight, weights_of


class Results:
    """What a run brings back: values by name, the module's own result, where it was stopped."""

    __slots__ = ("ended", "result", "saved")

    def __init__(self, saved: dict[str, Any], result: Any, ended: Site | None) -> None:
        self.saved = saved
        self.result = result
        self.ended = ended


def run(
    graph: Graph,
    constants: Mapping[str, torch.Tensor],
    module: Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    strict: bool = True,
    want_result: bool = False,
    can_stop: bool = True,
    on_log: Callable[[str], None] | None = None,
    on_value: OnValue | None = None,
    device: torch.device | str | None = None,
    overwritten: Callable[[Site, Leaf], bool] | None = None,
    line: object = None,
    watch: Watch | None = None,
    grad: bool = False,
) -> Results:
    """Runs `module(*args, **kwargs)` with the graph drawn through it.

    `strict` asks for the recorded shapes and dtypes; without it the input may be another one.
    `on_value(node, parts)` is told what a log hands out instead of printing it. `can_stop` allows
    stopping the forward early. `overwritten(site, leaf)` says which tensors the
    model changes later. `line` is the user's line, for the model's own errors. `watch` may end the
    run at each step. With `grad` what is saved stays connected to the weights and constants.
    """
    drive = Drive(
        graph, constants, module, strict, on_log or print, overwritten, watch, grad, on_value
    )
    if drive.interpreter.finished and not want_result:
        return Results({}, None, None)
    drive.can_stop = can_stop and not want_result
    drive.want_result = want_result
    with normal_mode(), drive.interpreter.mode(module):
        found = drive.run(args, dict(kwargs or {}), line)
    if device is not None:
        found.saved = mapped(found.saved, lambda tensor: tensor.to(device))
    return found


def normal_mode() -> AbstractContextManager[Any]:
    """Leaves inference mode, in which nobody counts how often a tensor was changed."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


class Stop(BaseException):
    """Leaves the model's forward when nothing is left to run."""


class Drive:
    """One forward with hooks; the `Host` of its interpreter."""

    skipping: Skipping | None = None  # the modules that it may skip
    insides: Insides | None = None  # the forwards inside of which it has sites

    def __init__(
        self,
        graph: Graph,
        constants: Mapping[str, torch.Tensor],
        module: Module,
        strict: bool,
        on_log: Callable[[str], None],
        overwritten: Callable[[Site, Leaf], bool] | None,
        watch: Watch | None,
        grad: bool = False,
        on_value: OnValue | None = None,
    ) -> None:
        self.module = module
        self.can_stop = True
        self.want_result = False
        self.error: BaseException | None = None
        self.told: Any = overwritten if hasattr(overwritten, "site") else None
        self.ended: Site | None = None
        self.callers: set[int] = set()  # storages of the caller's tensors
        self.weights = weights_of(module)
        self.taken = Taken({})
        self.interpreter = interpreter(
            graph,
            constants,
            self,
            keep=grad,
            strict=strict,
            on_log=on_log,
            on_value=on_value,
            overwritten=overwritten,
            watch=watch,
        )

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], line: object) -> Results:
        try:
            interpreter = self.interpreter
            self.taken = Taken(interpreter.env)
            args, kwargs = self.guarded(args, kwargs)
            interpreter.begin()
            result = None
            if not interpreter.finished or self.want_result:
                result = self.forward(args, kwargs, line)
            return Results(interpreter.end(result), result, self.ended)
        finally:
            self.leave()

    def leave(self) -> None:
        """Lets go of the interpreter, which knows its host: no cycle may hold tensors."""
        self.interpreter.close()
        del self.interpreter

    def guarded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The caller's tensors never change: edits in place and histories get copies of them."""
        if self.interpreter.plan.fills or self.interpreter.plan.backwards:
            args = tuple([mapped(arg, torch.Tensor.clone) for arg in args])
            kwargs = {name: mapped(arg, torch.Tensor.clone) for name, arg in kwargs.items()}
        else:
            for arg in (*args, *kwargs.values()):
                self.callers.update([storage(tensor) for tensor in tensors(arg)])
        return args, kwargs

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], line: object) -> Any:
        """The module's result; None where it was stopped."""
        hooks = _Hooks(self)
        token = _RUNNING.set(self)
        result = None
        try:
            hooks.add(self.sites())
            result = self.module(*args, **kwargs)
            self.interpreter.took(self.taken.fired)
        except Stop:
            pass
        except Exception as error:
            if self.error is None:
                if line is not None:
                    error.add_note(f"while running the model for the block at {line}")
                raise
        finally:
            try:
                hooks.remove()
            finally:
                _RUNNING.reset(token)
        if self.error is not None:  # also where the model swallowed it
            try:
                raise self.error
            finally:
                self.error = None
        return result if self.want_result else None

    def quick(self) -> Mapping[Site, Take]:
        """Sites at which a tensor is taken, and nothing else: their hooks may do that."""
        return self.interpreter.quick()

    def tell(self, site: Site) -> None:
        """Tells the interpreter what hooks have taken, of which this one is the last."""
        try:
            self.interpreter.took(self.taken.fired)
        except BaseException as error:
            self.error = error
            raise
        self.leave_if_over(site)

    def leave_if_over(self, site: Site) -> None:
        """Leaves the forward after a site if nothing is left to do."""
        if self.is_over() and self.can_stop and (site.path or site.port != "output"):
            self.ended = site
            raise Stop

    def sites(self) -> Iterable[Site]:
        """The sites of this forward."""
        return self.interpreter.sites

    def is_over(self) -> bool:
        """Whether nothing is left to do in this forward."""
        return self.interpreter.finished

    def become(self, site: Site, structure: Any) -> Any:
        """What the value at a site becomes."""
        return self.interpreter.fire(site, structure)

    def fire(self, site: Site, structure: Any) -> Any:
        """What a hook does."""
        if self.error is not None:
            return structure
        try:
            if self.taken.fired:
                self.interpreter.took(self.taken.fired)
            structure = self.become(site, structure)
        except BaseException as error:
            self.error = error
            raise
        self.leave_if_over(site)
        return structure

    # What the interpreter asks of its host

    def parameter(self, path: str) -> torch.Tensor:
        owner, _, name = path.rpartition(".")
        found = getattr(find(self.module, owner), name, None)
        if not isinstance(found, torch.Tensor):
            raise UnknownPathError(
                f"the model has no weight {path!r}", fix="print(model) shows the tree"
            )
        return found

    def apply(self, path: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        token = _RUNNING.set(None)
        try:
            return find(self.module, path)(*args, **kwargs)
        finally:
            _RUNNING.reset(token)

    def is_weight(self, where: int) -> bool:
        return where in self.weights.storages and is_still_weight(where, self.module)

    def is_anothers(self, where: int) -> bool:
        return where in self.callers or self.is_weight(where)

    @property
    def device(self) -> torch.device | None:
        return self.weights.device


def find(module: Module, path: str) -> Module:
    """The module at a dotted path."""
    found: Any = module
    for name in path.split(".") if path else ():
        found = found._modules.get(name) or getattr(found, name, None)
        if not isinstance(found, Module):
            break
    if not isinstance(found, Module):
        raise UnknownPathError(
            f"the model has no module {path!r}", fix="print(model) shows the tree"
        )
    return found


def _instead(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the run that this call belongs to gives in place of the module's forward, if it does."""
    drive = _RUNNING.get()
    if drive is None or drive.error is not None:
        return NOTHING
    found = NOTHING
    if drive.skipping is not None:
        found = drive.skipping.instead(module, drive.interpreter.given)
    if found is NOTHING and drive.insides is not None:
        found = drive.insides.instead(module, args, kwargs)
    return found


def _running() -> Drive | None:
    return _RUNNING.get()


class _Hooks:
    """The hooks of one run.

    They are put into the modules' hook tables directly: `RemovableHandle` numbers hooks with a
    counter that two threads can read at once, and then one thread's hook replaces the other's.
    """

    def __init__(self, drive: Drive) -> None:
        self._drive = drive
        self._calls: dict[str, Any] = {}  # `Calls` by path, `sources.Runs` by operation
        self._single: list[Single] = []
        self._modules = {"": drive.module}
        self._skipping: Skipping | None = None

    def add(self, sites: Iterable[Site]) -> None:
        drive = self._drive
        skips, told = drive.interpreter.plan.skips, drive.told
        quick, taken = drive.quick(), drive.taken
        turn, single = None, frozenset()
        for site in sites:
            path = site.path
            if is_inside(site.port):
                self._inside(site)
                continue
            if told is not None and not skips and turn != (site.invoke, site.step):
                turn, single = (site.invoke, site.step), told.singles(site)
            if path in single:
                module, take = self._find(path), quick.get(site)
                if take is None:
                    self._single.append(Single(drive, module, site))
                else:
                    self._single.append(Taking(drive, module, site, take, taken))
                continue
            there = self._calls.get(path)
            if there is None:
                there = self._calls[path] = Calls(drive, self._find(path))
                there.hook()
            (there.inputs if site.port == "inputs" else there.outputs)[site.call] = site
        if skips:
            self._skipping = Skipping(self._calls, self._drive.told)
            self._drive.skipping = self._skipping
            for output, begin in skips.items():
                if begin in sites and not is_inside(begin.port):
                    module = find(self._drive.module, begin.path)
                    self._skipping.add(module, begin.path, {begin.call: output}, _instead)

    def _inside(self, site: Site) -> None:
        """A site of an operation inside the forward of a module."""
        drive = self._drive
        if drive.insides is None:
            drive.insides = Insides(drive, _running, _instead, self._calls)
        drive.insides.add(self._find(site.path), site)

    def _find(self, path: str) -> Module:
        """As `find`, by way of the module above."""
        found = self._modules.get(path)
        if found is None:
            above, _, name = path.rpartition(".")
            found = self._find(above)._modules.get(name) or find(self._drive.module, path)
            self._modules[path] = found
        return found

    def remove(self) -> None:
        for one in self._single:
            one.unhook()
        if self._skipping is not None:
            self._skipping.remove()
        if self._drive.insides is not None:
            self._drive.insides.remove()
            self._drive.insides = None
        for calls in self._calls.values():
            calls.unhook()
