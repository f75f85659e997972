"""A last linear map, computed only where somebody asks.

    logits = model.lm_head.output[:, -1]

Where a shared forward ends with a linear layer, and all that its invokes do with what it gives is
to take some positions, only these are computed: for a language model the map to its vocabulary is a
third of a small model's work. A row of a linear map depends on nothing but the same row of its
input, so what is asked for is what it would be; what is not asked for is never seen.

Only the very last site of a forward may be cut short so: nothing of the model comes after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Linear, Module

from weft.graph.node import Call, Name, Read, Ref, Seq, Slice, inputs_of
from weft.graph.site import Leaf, Site

from .steps import Plan

Place = tuple[int, int]
"""(row, position) of an invoke's own tensor."""

_HIDDEN = (("B",), ("S",), ())


@dataclass(frozen=True)
class Narrow:
    """The module whose result is asked for at some places only, and the places of each invoke."""

    path: str
    call: int
    asked: Mapping[Site, tuple[Place, ...]]


def narrow(
    plan: Plan,
    pieces: Mapping[tuple[Site, Leaf], Any],
    order: Callable[[Site], int],
    find: Callable[[str], Module],
) -> Narrow | None:
    """What of the last site of these pieces is asked for; None where that is most of it."""
    last = max([site for site, _ in pieces], key=order)
    here = [one for one in pieces if (one[0].path, one[0].call) == (last.path, last.call)]
    ends = [one for one in here if one[0].port == "output"]
    if not ends or len(ends) < len(here) or not _is_plain(find(last.path)):
        return None
    asked: dict[Site, tuple[Place, ...]] = {}
    whole = 0
    for site, leaf in ends:
        piece = pieces[site, leaf]
        contiguous = piece.stride == torch.empty(piece.shape, device="meta").stride()
        if leaf or piece.dims != _HIDDEN or not contiguous or plan.sites[site].effects:
            return None
        places = _asked(plan, site, piece.shape)
        if places is None:
            return None
        asked[site] = places
        whole += piece.shape[0] * piece.shape[1]
    count = sum(map(len, asked.values()))
    return Narrow(last.path, last.call, asked) if 2 * count <= whole else None


def _is_plain(module: Module) -> bool:
    """Whether a module is a linear map and nothing else: no hook, no other forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return type(module) is Linear and not any(hooks) and "forward" not in module.__dict__


def _asked(plan: Plan, site: Site, shape: tuple[int, ...]) -> tuple[Place, ...] | None:
    """The places that anything takes of a site's tensor; None where something takes it whole."""
    reads = {
        index
        for index in plan.sites[site].steps
        if type(plan.steps[index].node) is Read  # type: ignore[union-attr]
    }
    found: dict[Place, None] = {}
    for step in plan.steps:
        if step is None or not step.deps or step.deps.isdisjoint(reads):
            continue
        node = step.node
        if type(node) is not Call or node.op != "Tensor.__getitem__":
            if any(ref.node in reads for ref in inputs_of(node)):
                return None
            continue
        if sum([ref.node in reads for ref in inputs_of(node)]) != 1:
            return None
        source: Any = node.args[0]
        places = _places(node.args[1], shape) if type(source) is Ref else None
        if places is None or source.node not in reads:
            return None
        found.update(dict.fromkeys(places))
    return tuple(found)


def _places(index: Any, shape: tuple[int, ...]) -> list[Place] | None:
    """The rows and positions that an index takes of `[batch, pos, d]`; None where it is not said
    in numbers."""
    items = list(index.items) if isinstance(index, Seq) and index.form == "tuple" else [index]
    dots = [n for n, item in enumerate(items) if isinstance(item, Name) and item.form == "ellipsis"]
    if len(dots) > 1:
        return None
    if dots:
        missing = len(shape) - (len(items) - 1)
        items[dots[0] : dots[0] + 1] = [Slice()] * missing
    items += [Slice()] * (2 - len(items))
    rows, positions = _range(items[0], shape[0]), _range(items[1], shape[1])
    if rows is None or positions is None or len(items) > len(shape) or None in items:
        return None
    return [(row, position) for row in rows for position in positions]


def _range(item: Any, size: int) -> range | None:
    if type(item) is int:
        return range(size)[item : item + 1 or None] if -size <= item < size else None
    if isinstance(item, Slice):
        parts: Any = (item.start, item.stop, item.step)
        if all(part is None or type(part) is int for part in parts) and item.step != 0:
            return range(size)[slice(*parts)]
    return None


class Head:
    """The last module of one forward, which is given only the places that are asked for."""

    def __init__(self, narrow: Narrow, pieces: Mapping[tuple[Site, Leaf], Any]) -> None:
        self.begin = Site(narrow.path, "inputs", narrow.call)
        self._narrow = narrow
        self._pieces = pieces
        piece = next(iter(pieces[site, ()] for site in narrow.asked))
        self._sizes = piece.batch, piece.width
        numbers: dict[int, int] = {}
        self._rows: dict[Site, list[int]] = {}
        for site, places in narrow.asked.items():
            first = pieces[site, ()].rows[0]
            flat = [(first + row) * piece.width + position for row, position in places]
            self._rows[site] = [numbers.setdefault(one, len(numbers)) for one in flat]
        self._flat = list(numbers)
        self._narrowed = False

    def given(self, structure: Any) -> Any:
        """The module's arguments, cut short; as they are where they are not what was expected."""
        args, kwargs = structure
        hidden = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(hidden, torch.Tensor) or hidden.shape[:-1] != self._sizes:
            return structure
        self._narrowed = True
        index = torch.tensor(self._flat, dtype=torch.int64, device=hidden.device)
        return (hidden.flatten(0, 1).index_select(0, index),), kwargs

    def cut(self, site: Site, whole: torch.Tensor) -> torch.Tensor | None:
        """An invoke's own tensor: what it asks for is in its place, and nothing else. None where
        nothing was cut short."""
        if not self._narrowed or site not in self._rows:
            return None
        piece = self._pieces[site, ()]
        own = torch.zeros(piece.shape, dtype=whole.dtype, device=whole.device)
        places = self._narrow.asked[site]
        rows, positions = [row for row, _ in places], [position for _, position in places]
        own[rows, positions] = whole[self._rows[site]]
        return own
