"""Sites inside forwards: a run's own copy of a forward, whose operations fire them.

The copy (`sources.source`) belongs to one run: its calls lead to this run's sites, and nobody else
can come by it. While the run is on its way, a `StandIn` in the module's `forward` asks which run a
call is of; only this one's goes to the copy. A function that the forward calls is copied when it is
called, where there are sites inside it.

That names mean what they meant when the graph was recorded is said by the hashes in the graph. They
are compared with what is here before a copy is made; another source is an `OtherSourceError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from msgspec.structs import replace
from torch.nn import Module

from weft.errors import OtherSourceError
from weft.graph.inside import Place, marks_of
from weft.graph.site import Site, inside_of, operations_of, split_port
from weft.sources.source import source_of
from weft.sources.stand import NOTHING, Ask, forward_of, stand_down, stand_in


class Driver(Protocol):
    """What this asks of a `hooks.Drive`."""

    @property
    def interpreter(self) -> Any: ...

    @property
    def skipping(self) -> Any: ...

    def fire(self, site: Site, structure: Any) -> Any: ...


class Insides:
    """The forwards inside of which one run has sites.

    `running()` tells whose forward is on its way on this thread, `ask` stands in for forwards.
    `calls` gets what is counted, by path and operation.
    """

    def __init__(
        self,
        drive: Driver,
        running: Callable[[], object],
        ask: Ask,
        calls: dict[str, Any],
    ) -> None:
        self._drive = drive
        self._running = running
        self._ask = ask
        self._calls = calls
        self._marks: Mapping[Place, str] = marks_of(drive.interpreter.graph)
        self._modules: dict[int, tuple[Module, Level]] = {}
        self._copies: dict[int, Any] = {}
        self._checked: set[str] = set()

    def add(self, module: Module, site: Site) -> None:
        """A site that is to fire. Raises `OtherSourceError` where the graph means other code."""
        there = self._modules.get(id(module))
        if there is None:
            level = Level(self, site.path, ())
            self._modules[id(module)] = module, level
            stand_in(module, self._ask)
        else:
            level = there[1]
        if site.path not in self._checked:
            self._checked.add(site.path)
            level.check(forward_of(module), site.path)
        names = operations_of(site.port)
        for depth, name in enumerate(names, 1):
            runs = level.run(name)
            self._calls[f"{site.path}.{inside_of(names[:depth])}"] = runs
            if depth < len(names):
                level = runs.deeper()
        runs.add(site)

    def remove(self) -> None:
        """The modules are as they were."""
        while self._modules:
            module, _ = self._modules.popitem()[1]
            stand_down(module, self._ask)
        self._copies.clear()

    def instead(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the copy of a module's forward gives; `NOTHING` where there are no sites inside."""
        there = self._modules.get(id(module))
        if there is None:
            return NOTHING
        copy = self._copies.get(id(module))
        if copy is None:
            copy = self._copies[id(module)] = there[1].copied(forward_of(module))
        return copy(*args, **kwargs)

    def fire(self, site: Site, structure: Any) -> Any:
        return self._drive.fire(site, structure)

    def given(self, site: Site) -> Any:
        """What an operation gives that is skipped, by its output; or `NOTHING`."""
        given = self._drive.interpreter.given
        if site not in given:
            return NOTHING
        self._drive.skipping.pass_over(site)
        return given.pop(site)

    def is_mine(self) -> bool:
        """Whether the forward on its way on this thread is that of this run."""
        return self._running() is self._drive

    def mark(self, place: Place) -> str | None:
        return self._marks.get(place)


class Level:
    """The operations of one source: of a forward, or of a function that is called inside it."""

    def __init__(self, whole: Insides, path: str, way: tuple[str, ...]) -> None:
        self.path = path
        self.way = way
        self.whole = whole
        self._runs: dict[str, Runs] = {}

    def run(self, name: str) -> Runs:
        """The runs of an operation."""
        found = self._runs.get(name)
        if found is None:
            found = self._runs[name] = Runs(self, name)
        return found

    def check(self, function: Any, path: str) -> None:
        """Raises `OtherSourceError` unless this is the source that the graph means."""
        listing = source_of(function).listing
        where = f"{path}.{inside_of(self.way)}source"
        if listing.digest != self.whole.mark((path, self.way)):
            raise OtherSourceError(
                f"the graph names operations of {where}, which is another source here",
                fix="open the model anew, and record the experiment on what is there",
            )
        for name in self._runs:
            if name not in listing.by_name:
                raise OtherSourceError(
                    f"{where} has no operation {name[:200]!r}",
                    fix="name one that it has: print the source to see its operations",
                )

    def copied(self, function: Any) -> Any:
        """A copy of the function that leads here."""
        self.check(function, self.path)
        return source_of(function).copied(function, self.told)

    def told(self, name: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """In the place of each call in the copy."""
        runs = self._runs.get(name)
        if runs is None or not self.whole.is_mine():
            return function(*args, **kwargs)
        return runs(function, args, kwargs)


class Runs:
    """One operation. A run of it has one number, taken when it begins."""

    def __init__(self, level: Level, name: str) -> None:
        self.started = 0
        self._level = level
        self._name = name
        self._inputs: dict[int, list[Site]] = {}
        self._outputs: dict[int, list[Site]] = {}
        self._deeper: Level | None = None

    def add(self, site: Site) -> None:
        """A site that is to fire; a module that stands in the tree twice has two of one place."""
        there = self._inputs if split_port(site.port)[1] == "inputs" else self._outputs
        there.setdefault(site.call, []).append(site)

    def deeper(self) -> Level:
        """The operations of the function that is called here."""
        if self._deeper is None:
            level = self._level
            self._deeper = Level(level.whole, level.path, (*level.way, self._name))
        return self._deeper

    def unhook(self) -> None:
        """There is no hook: the copy goes with its run."""

    def __call__(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        whole, number, result = self._level.whole, self.started, NOTHING
        self.started += 1
        for site in self._inputs.get(number, ()):
            args, kwargs = whole.fire(site, (args, kwargs))
            if result is NOTHING:
                result = whole.given(end_of(site))
        if result is NOTHING:
            if self._deeper is not None:
                function = self._deeper.copied(function)
            result = function(*args, **kwargs)
        for site in self._outputs.get(number, ()):
            result = whole.fire(site, result)
        return result


def end_of(site: Site) -> Site:
    """The output of the operation that begins at a site."""
    return replace(site, port=split_port(site.port)[0] + "output")
