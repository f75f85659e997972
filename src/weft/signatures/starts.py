"""From which sites on a pass must be followed, so that the gradient of one tensor is whole.

    Starts.of(signature).before(index, leaf)      # indices of sites

A tensor that a site shows may have been used before the site fired: by a sibling (parallel
attention and MLP), by the caller. Its gradient misses what was done with it then, unless the tensor
has a history from its making on. So we go to the first site that shows its storage, and from there
to the call within which it was made: what goes in there is followed, and with it all that comes of
it. Where nothing like the tensor goes in (token ids), it is made of what the call's own children
give: those are followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from weft.graph.site import Leaf, Site, split_port
from weft.kernels.aval import Aval

from .inside import inner_of
from .learn import Row
from .sites import Signature


class Starts:
    """The starts of one pass."""

    def __init__(self, signature: Signature) -> None:
        self.rows = signature.exact().rows
        self._first: dict[int, int] = {}  # a storage -> the first site that shows it
        for index, row in enumerate(self.rows):
            for fact in row.facts:
                if fact is not None:
                    self._first.setdefault(fact.group, index)
        self._within = list(_within(self.rows))

    @classmethod
    def of(cls, signature: Signature) -> Starts:
        """Those of a signature, worked out once."""
        found = _KNOWN.get(signature)
        if found is None:
            found = _KNOWN[signature] = cls(signature)
        return found

    def before(self, index: int, leaf: Leaf) -> list[int]:
        """The sites from which on a leaf's tensor must be followed, in firing order."""
        row = self.rows[index]
        place = row.keys.index(leaf)
        fact, aval = row.facts[place], row.what[place]
        first = index if fact is None else self._first[fact.group]
        maker = self._within[first]
        if maker < 0:
            return [first]
        if self._takes(maker, aval):
            return [maker, first]
        return [maker, *self._children(maker, first), first]

    def _takes(self, index: int, like: Aval) -> bool:
        """Whether such a tensor, which is no weight, goes into a call."""
        row = self.rows[index]
        for what, fact in zip(row.what, row.facts, strict=True):
            if fact is None or self._is_weight(fact):
                continue
            if what.dtype is like.dtype and what.shape == like.shape:
                return True
        return False

    def _is_weight(self, fact: Any) -> bool:
        return fact.tied and self._first[fact.group] > 0  # an input is there at the first site

    def _children(self, call: int, until: int) -> Iterator[int]:
        """What the calls directly within a call have given, until a site fires."""
        for index in range(call + 1, until):
            if (
                split_port(self.rows[index].port)[1] == "output"
                and self._within[self._within[index]] == call
            ):
                yield index


def starts_of(signature: Signature, site: Site) -> tuple[Starts, int]:
    """The starts that know a site, and its place among their rows. For an operation inside a
    forward they are those of a pass that shows operations, too."""
    inner = inner_of(signature, site.path, site.port)
    if inner is not None:
        signature = inner.signature
    return Starts.of(signature), signature.site(site.path, site.port, site.call).index


_KNOWN: WeakKeyDictionary[Signature, Starts] = WeakKeyDictionary()


def _place(row: Row) -> tuple[str, str, int]:
    return row.path, split_port(row.port)[0], row.call


def _within(rows: tuple[Row, ...]) -> Iterator[int]:
    """For each site: the site at which the call began that made what it shows; -1 for none."""
    opened: list[int] = []
    for index, row in enumerate(rows):
        if split_port(row.port)[1] == "inputs":
            yield opened[-1] if opened else -1
            opened.append(index)
            continue
        while opened:
            begun = opened.pop()
            if _place(rows[begun]) == _place(row):
                yield begun
                break
        else:
            yield -1
