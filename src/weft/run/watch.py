"""Who watches a run that is not one's own: limits, cancellation, progress."""

from __future__ import annotations

from typing import Protocol

from weft.graph.site import Where


class Watch(Protocol):
    """What a run asks and tells on its way. Raising ends the run."""

    def look(self) -> None:
        """Before each step, and at each site."""
        ...

    def fired(self, left: int) -> None:
        """A site has fired; so many are left."""
        ...

    def counted(self, elements: int, line: Where | None) -> None:
        """An operation whose result only numbers tell will make so many elements."""
        ...

    def saved(self, size: int, line: Where | None) -> None:
        """A save keeps so many bytes."""
        ...
