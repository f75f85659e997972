"""Which models may compute once what invokes of equal inputs have in common, and where they fork.

`stations` finds the places: where the layers of a decoder begin and end. By its formulas a layer's
first argument and its result have the rows of the pass; whatever else it is given with rows (masks,
position ids, biases) has those that the pass began with. That all of what the pass goes on with is
there, and that such a pass gives what a plain one gives, is not believed but tried, once for each
model: a `trial` forks rows at every station, beside NaN, from one prompt and from two, and compares
every site with a plain batch (which `engine.trial` has compared with the prompt alone).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from weft.families.forward import LanguageFacts
from weft.graph.node import AnyNode, Call, Graph, Name, Ref, Save, Write
from weft.graph.site import Leaf, Site
from weft.run.part import ModuleCall
from weft.run.rows import Lot, Piece
from weft.run.trunk import Growth, Need, Station, schedule
from weft.signatures.rows import Dims, dims_of
from weft.signatures.signature import Signature

from .trial import Given, Key, Merging, Refused, agree, device_of, prompts, read_of, run_graph

LENGTHS = (7, 7)
"""Tokens of the two prompts of a trial."""

_EDIT = 1.5
_POISONED = "poisoned"

# -- where ---------------------------------------------------------------------------------------


def stations(module: nn.Module, signature: Signature, formulas: Any) -> tuple[Station, ...]:
    """The stations of a pass, in firing order; none where it is not clear which they are."""
    found: list[Station] = []
    for path in _layers(module):
        if signature.calls(path) != 1:
            return ()
        for port in ("inputs", "output"):
            station = _station(signature, formulas, (path, port, 0))
            if station is None or (found and found[-1].index > station.index):
                return ()
            found.append(station)
    return tuple(found)


def _layers(module: nn.Module) -> list[str]:
    """The paths of a decoder's layers: the one list that has as many as the configuration says."""
    count = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    lists = [
        path
        for path, one in module.named_modules()
        if isinstance(one, nn.ModuleList) and len(one) == count
    ]
    return [f"{lists[0]}.{number}" for number in range(count or 0)] if len(lists) == 1 else []


def _station(signature: Signature, formulas: Any, key: tuple[str, str, int]) -> Station | None:
    site = signature.site(*key)
    current: list[Leaf] = []
    first: list[Leaf] = []
    for leaf, aval in site.tensors:
        dims = dims_of(formulas, site.index, leaf)
        if dims is None:
            return None
        if not any("B" in factors for factors in dims):
            continue
        if not _leads(dims):
            return None
        hidden = dims == (("B",), ("S",), ()) and aval.dtype.is_floating_point
        (current if key[1] == "output" or (hidden and not current) else first).append(leaf)
    return Station(key, site.index, tuple(current), tuple(first)) if current else None


def _leads(dims: Dims) -> bool:
    """Whether rows are the first factor of the first dimension, and of nothing else."""
    return "B" in dims[0] and dims[0].index("B") == 0 and not any("B" in one for one in dims[1:])


# -- lots that share a trunk ---------------------------------------------------------------------


def groups(invokes: Sequence[int], calls: Sequence[ModuleCall]) -> dict[int, int]:
    """For each invoke the first one whose input is the same."""
    found: dict[int, int] = {}
    heads: dict[tuple[int, ...], list[int]] = {}
    for one in invokes:
        ids: Any = calls[one][1]["input_ids"]
        alike = heads.setdefault(tuple(ids.shape), [])
        for head in alike:
            other: Any = calls[head][1]["input_ids"]
            if ids is other or torch.equal(ids, other):
                found[one] = head
                break
        else:
            alike.append(one)
            found[one] = one
    return found


def repeat(invokes: Sequence[int], calls: Sequence[ModuleCall]) -> bool:
    """Whether any two of them have the same input."""
    return len(set(groups(invokes, calls).values())) < len(invokes)


def shared(
    lot: Lot,
    calls: Sequence[ModuleCall],
    edited: Collection[Site],
    signature: Signature,
    places: tuple[Station, ...],
) -> Lot:
    """The lot with rows that grow; itself where a plain batch does as well.

    `signature` is that of the plain batch: what fires first there fires first in either.
    """
    group = groups(lot.invokes, calls)
    if not places or len(set(group.values())) == len(group):
        return lot
    index = {s: signature.site(s.path, s.port, s.call).index for s, _ in lot.pieces}
    rows = {one: len(calls[one][1]["input_ids"]) for one in lot.invokes}  # type: ignore[arg-type]
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for site, place in index.items():
        one = site.invoke
        last[one] = max(last.get(one, place), place)
        if site in edited:
            first[one] = min(first.get(one, place), place)
    needs = {one: Need(rows[one], group[one], first.get(one), last[one]) for one in lot.invokes}
    growth = schedule(needs, places)
    if growth.cost >= sum(rows.values()) * len(growth.segments):
        return lot
    return replace(
        lot,
        call=_call(lot, growth.segments[0].owners, rows),
        pieces={key: _placed(key[0], piece, growth, index) for key, piece in lot.pieces.items()},
        growth=growth,
    )


def _call(lot: Lot, owners: Sequence[int], rows: Mapping[int, int]) -> ModuleCall:
    """The call with the rows of these invokes only."""
    starts, start = {}, 0
    for one in lot.invokes:
        starts[one] = start
        start += rows[one]
    args, kwargs = lot.call
    ids: Any = kwargs["input_ids"]
    kept = [starts[one] + number for one in owners for number in range(rows[one])]
    return args, {**kwargs, "input_ids": ids[torch.tensor(kept, device=ids.device)]}


def _placed(site: Site, piece: Piece, growth: Growth, index: Mapping[Site, int]) -> Piece:
    segment = growth.segment(index[site])
    return piece._replace(rows=segment.places[site.invoke], batch=segment.size)


# -- the trial -----------------------------------------------------------------------------------


def trial(
    merging: Merging, module: nn.Module, facts: LanguageFacts, refused: Refused
) -> Refused | None:
    """The tensors that are not what they are in a plain batch; None where no rows may grow."""
    one, other = prompts(facts, device_of(module), LENGTHS)
    bad: Refused = set()
    for pair in ((one, one), (one, other)):
        found = _differing(merging, module, pair, refused)
        if found is None:
            return None
        bad |= found
    return bad


def _differing(
    merging: Merging, module: nn.Module, pair: tuple[ModuleCall, ModuleCall], refused: Refused
) -> Refused | None:
    """What differs where the invokes are given these two inputs in turn."""
    signature = merging._signature(pair[0])
    keys = [(*key, leaf) for key in signature.order for leaf, _ in signature.site(*key).tensors]
    offered = [key for key in keys if key not in refused]
    results = [key for key in offered if key[:2] == ("", "output")]
    args, kwargs = pair[0]
    ids: Any = kwargs["input_ids"]
    places = merging.stations((args, {**kwargs, "input_ids": ids.repeat(2, 1)}), module)
    if not places or not results or any((*s.key, s.current[0]) in refused for s in places):
        return None
    calls = [pair[number % 2] for number in range(len(places) + 4)]
    signatures = [merging._signature(call) for call in calls]
    graph = _graph(signatures, places, offered, results)
    try:
        plain = run_graph(module, calls, graph, Given(merging, refused))
        grown = run_graph(module, calls, graph, Given(merging, refused, module))
    except (RuntimeError, ValueError, TypeError, LookupError):
        return None
    bad: Refused = set()
    for name, tensor in plain.items():
        whose, _, number = name.partition(" ")
        if whose != _POISONED and not agree(grown[name], tensor):
            bad.add(offered[int(number.split()[0])])
    return None if not bad.isdisjoint(results) else bad


def _graph(
    signatures: list[Signature],
    places: Sequence[Station],
    offered: list[Key],
    results: list[Key],
) -> Graph:
    """Two invokes without an edit, one with an edit at each station, and two with NaN.

    All bring the model's result, and some every site.
    """
    count = len(places)
    watched = (0, 1, 2, 2 + count // 2, 1 + count)
    nodes: list[AnyNode] = []
    for invoke, signature in enumerate(signatures):
        poison = invoke - 2 >= count
        if invoke >= 2:
            station = places[(invoke - 2 - count) * (count // 2) if poison else invoke - 2]
            key = (*station.key, station.current[0])
            read, at = read_of(signature, invoke, key), len(nodes)
            factor = Name("float", "nan") if poison else _EDIT
            edit = Call(op="mul", args=(Ref(at), factor))
            nodes += [read, edit, Write(site=read.site, leaf=key[3], value=Ref(at + 1))]
        for key in offered if invoke in watched else results:
            nodes.append(read_of(signature, invoke, key))
            name = f"{_POISONED if poison else invoke} {offered.index(key)} {invoke}"
            nodes.append(Save(name=name, value=Ref(len(nodes) - 1)))
    return Graph(nodes=tuple(nodes))
