"""`Part`: the forward of one invoke, among several that one interpreter runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from weft.graph.site import Site

from .hooks import Drive
from .interpreter import Interpreter
from .taken import Take

ModuleCall = tuple[tuple[Any, ...], Mapping[str, Any]]


class Part(Drive):
    """The forward of one invoke, or of several that share it. `whole` has what all share."""

    def __init__(
        self, whole: Drive, invokes: Iterable[int], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.module = whole.module
        self.interpreter: Interpreter = whole.interpreter
        self.callers = whole.callers
        self.weights = whole.weights
        self.told = whole.told
        self.taken = whole.taken
        self.can_stop = True
        self.want_result = False
        self.error = None
        self.ended = None
        self._args, self._kwargs = args, kwargs
        self._invokes = frozenset(invokes)
        self._left = [site for site in self.interpreter.sites if site.invoke in self._invokes]
        self.open = set(self._left)
        """Sites that have not fired yet."""
        self.pause: Callable[[Site], None] | None = None
        """Waits, at a site, until its edits can act."""

    def call(self) -> None:
        """The forward, from its begin to where nothing is left to do."""
        if not self.is_over():
            args, kwargs = self.guarded(self._args, dict(self._kwargs))
            self.forward(args, kwargs, None)

    def quick(self) -> Mapping[Site, Take]:
        """None: others may wait for this forward, or share it."""
        return {}

    def sites(self) -> Iterable[Site]:
        return self._left

    def is_over(self) -> bool:
        return not self.open

    def become(self, site: Site, structure: Any) -> Any:
        if self.pause is not None:
            self.pause(site)
        self.open.discard(site)
        return self.interpreter.fire(site, structure)
