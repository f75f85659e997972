"""A function's source as data: its text, a hash of it, and the operations in it, by name.

    listing = Listing(digest, text, (Operation("self_c_proj_0", 7),))
    listing.find("self_c_proj_0")             # or LookupError, with the nearest names
    print(listing.shown())

Operations are the calls in the function's body. A name is that of what is called, with dots as
underscores, and an ordinal among those of the same name, in the order of the text: in
`self.c_attn(x).split(n)` they are `split_0` and `self_c_attn_0`. Where only one operation ends in
a name, the end is enough: `softmax_0` for `nn_functional_softmax_0`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

TAB = "    "


class Operation(NamedTuple):
    """A call in a function's body: `line` is that of the text, from 0; `tail` is its name's end."""

    name: str
    line: int
    tail: str = ""


class Listing:
    """See the module's text."""

    def __init__(self, digest: str, text: str, operations: tuple[Operation, ...]) -> None:
        self.digest = digest
        self.text = text
        self.operations = operations

    @cached_property
    def by_name(self) -> dict[str, Operation]:
        return {one.name: one for one in self.operations}

    def find(self, name: str) -> Operation:
        """The operation of this name. Raises `LookupError` whose argument says what is near."""
        found = self.by_name.get(name)
        if found is None:
            ending = self._ending(name)
            if len(ending) != 1:
                raise LookupError([one.name for one in ending] or self._nearest(name))
            found = ending[0]
        return found

    def _ending(self, name: str) -> list[Operation]:
        tail, _, number = name.rpartition("_")
        return [one for one in self.operations if one.tail == tail and number == "0"]

    def _nearest(self, name: str) -> list[str]:
        near = difflib.get_close_matches(name, self.by_name, 4, 0.5) if len(name) < 256 else []
        tail = name.rpartition("_")[0]
        same = [one.name for one in self.operations if tail and one.tail == tail]
        return list(dict.fromkeys((*same[:4], *near)))

    def shown(self, only: str | None = None) -> str:
        """The text with the names of operations before their lines; of `only` one, its lines."""
        width = max([len(one.name) for one in self.operations], default=0)
        lines = self.text.expandtabs(4).split("\n")
        at: dict[int, list[str]] = {}
        for one in self.operations:
            at.setdefault(one.line, []).append(one.name)
        if only is None:
            return "\n".join(_rows(lines, at, width, range(len(lines))))
        line = self.by_name[only].line
        around = range(max(line - 3, 0), min(line + 4, len(lines)))
        return "\n".join(_rows(lines, {line: [only]}, width, around))


def _rows(lines: list[str], at: dict[int, list[str]], width: int, which: range) -> Iterator[str]:
    for number in which:
        names = at.get(number, [])
        first = f"{names[0]:>{width}} ->" if names else " " * (width + 3)
        yield f"{first} {number:>4} {lines[number]}".rstrip()
        for name in names[1:]:
            yield f"{name:>{width}} ->    +"
