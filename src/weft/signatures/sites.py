"""The sites of one pass: what each looks like, in which order they fire, how often.

    site = signature.site("transformer.h.3", "output", 0)     # -> SiteSignature
    site.leaves                                               # (((), float32[1, 9, 768]),)
    signature.calls("transformer.h.3")                        # 1

How a signature is come by is not here: `Signatures` (`signature`) gives one for each call.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

from torch import nn

from weft.graph.site import Leaf, begin_port
from weft.kernels.aval import Aval

from .inside import counts_between, inner_of
from .learn import Row, Table
from .rules import Result, Rules
from .structure import put_together


class SiteSignature:
    """One site: `leaves` are (key path, `Aval` | `Plain` | `Opaque`), `facts` stands beside it.

    `index` is the place in the firing order of the pass. `tensors` are the leaves that are `Aval`s,
    `overwritten` the keys of those that the model changes in place later on.
    """

    __slots__ = ("facts", "index", "leaves", "overwritten", "tensors", "tree")

    def __init__(self, index: int, row: Row) -> None:
        self.index: Any = index  # of an operation inside a forward a fraction
        self.leaves: tuple[tuple[Leaf, Any], ...] = tuple(zip(row.keys, row.what, strict=True))
        self.facts = row.facts
        self.tree = row.tree
        self.tensors = tuple([(leaf, what) for leaf, what in self.leaves if type(what) is Aval])
        changed = [fact is not None and fact.overwritten for fact in row.facts]
        self.overwritten = frozenset([k for k, c in zip(row.keys, changed, strict=True) if c])

    def at(self, index: Any) -> SiteSignature:
        """The same site at another place in the firing order."""
        made = copy(self)
        made.index = index
        return made

    def rebuild(self, values: list) -> Any:
        """The site's Python structure with `values` as its leaves, in the order of `leaves`."""
        return put_together(self.tree, values)


class Signature:
    """All sites of one pass. Sites are made when asked for."""

    def __init__(self, table: Table, row: Callable[[int], Row], rules: Rules) -> None:
        self._table = table  # for the names; `row` tells what the sites look like
        self._row = row
        self._rules = rules
        self._sites: dict[tuple[str, str, int], SiteSignature] = {}
        self.kept: dict[Any, Any] = {}
        """A place to keep what is made of this pass by keys of one's own."""

    @property
    def order(self) -> tuple[tuple[str, str, int], ...]:
        """(path, port, call) of every site, in firing order."""
        return tuple(self._table.index)

    @property
    def count(self) -> int:
        """How many sites there are."""
        return len(self._table.rows)

    @property
    def times(self) -> tuple[Any, ...]:
        """When each of these fires, where operations are among them: see `Table.times`."""
        return self._table.times

    def again(self) -> Signature:
        """The same sites, with nothing kept."""
        return Signature(self._table, self._row, self._rules)

    def site(self, path: str, port: str, call: int = 0) -> SiteSignature:
        """The site. Raises LookupError if it does not fire in this pass."""
        key = (path, port, call)
        found = self._sites.get(key)
        if found is None:
            index = self._table.index.get((self._table.aliases.get(path, path), port, call))
            found = self._sites[key] = (
                self._inside(path, port, call)
                if index is None
                else SiteSignature(index, self._row(index))
            )
        return found

    def _inside(self, path: str, port: str, call: int) -> SiteSignature:
        """A site of an operation, which `Inside.learn` must have brought."""
        inner = inner_of(self, path, port)
        if inner is None:
            raise LookupError(f"{path or '<root>'}.{port} call {call} does not fire")
        return inner.site(path, port, call)

    def calls(self, path: str, port: str = "inputs") -> int:
        """How often the module is called in this pass, or the operation that has this port."""
        inner = inner_of(self, path, port)
        if inner is not None:
            return inner.calls(path, port)
        path, port, count = self._table.aliases.get(path, path), begin_port(port), 0
        while (path, port, count) in self._table.index:
            count += 1
        return count

    @property
    def singles(self) -> frozenset[str]:
        """The modules that are called exactly once in this pass, by all of their paths."""
        return self._table.single

    def canonical(self, path: str) -> str:
        """The path by which the pass names a module that stands in the tree more than once."""
        return self._table.aliases.get(path, path)

    def inside(self, path: str, call: int, port: str = "output") -> dict[str, int]:
        """How often each module, by each of its paths, is called inside this call of a module (or
        an operation), and each operation that is known, by `path.source.name.`."""
        found = counts_between(self, path, port, call)
        names = self._table.aliases.items()
        return found | {name: found[inner] for name, inner in names if inner in found}

    def exact(self) -> Table:
        """All sites as they are, without formulas."""
        rows = tuple([self._row(index) for index in range(len(self._table.rows))])
        return Table(rows, self._table.aliases)

    @property
    def applied(self) -> dict[Any, Any]:
        """A place to keep results of `apply` by keys of one's own; forgotten with the rules."""
        return self._rules.by_key

    def apply(self, module: nn.Module, path: str, args: tuple, kwargs: dict) -> Result:
        """What `module`, which stands at `path`, gives for arguments with avals as tensors."""
        return self._rules.apply(module, path, args, kwargs)
