"""One firing of a site: what its leaves are now, and what the model gets back.

The model's own containers are never changed. A written leaf is replaced in a shallow copy of the
structure; a filled leaf is copied once, at the end, into the model's own tensor, so that whatever
else shares that tensor sees it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from weft.errors import SiteMismatchError
from weft.graph.site import Leaf, Site, Where, leaf_text

from .structure import MISSING, at, replaced


class Held(NamedTuple):
    """A tensor that became a leaf's value, and the slot it came from (None: a copy of our own)."""

    tensor: torch.Tensor
    slot: int | None


class Frame:
    """The state of one site while its steps run."""

    # Most firings change nothing: what changes is made by the first change.
    now: Mapping[Leaf, Held] = MappingProxyType({})  # leaves that steps have changed
    rebound: Mapping[Leaf, Held] = now  # what the model gets in place of its own tensor
    filled: Mapping[Leaf, torch.Tensor] = MappingProxyType({})  # what goes into its own tensor
    lent: Collection[Leaf] = ()  # leaves that were read again after a change
    skipped: Sequence[Held] = ()  # what the module gives without running, by leaf
    skip: Any = None  # the step that says so

    def __init__(self, site: Site, structure: Any) -> None:
        self.site = site
        self.structure = structure

    def own(self, leaf: Leaf, line: Where | None) -> torch.Tensor:
        """The model's own tensor at a leaf."""
        found = at(self.structure, leaf) if leaf else self.structure
        if isinstance(found, torch.Tensor):
            return found
        got = "nothing" if found is MISSING else type(found).__name__
        raise SiteMismatchError(
            f"{self.site}{leaf_text(leaf)} should be a tensor, but there is {got}",
            line=line,
            fix="look at what the module returns; its structure differs from the recorded one",
        )

    def write(self, leaf: Leaf, held: Held) -> None:
        """Rebinds a leaf."""
        self.now = {**self.now, leaf: held}
        self.rebound = {**self.rebound, leaf: held}

    def fill(self, leaf: Leaf, held: Held) -> None:
        """Makes an edited read the value of its leaf."""
        self.now = {**self.now, leaf: held}
        if leaf in self.rebound:
            self.rebound = {**self.rebound, leaf: held}
        else:
            self.filled = {**self.filled, leaf: held.tensor}

    def lend(self, leaf: Leaf) -> None:
        """Notes that a changed leaf was read again."""
        self.lent = {*self.lent, leaf}

    def result(self, values: dict[Leaf, torch.Tensor]) -> Any:
        """The structure with rebound leaves."""
        structure = self.structure
        for leaf, tensor in values.items():
            structure = replaced(structure, leaf, tensor)
        return structure
