"""Which invokes may share a forward of a language model, and where their rows lie in it.

    run_all(graph, constants, net, calls, merger=merger_of(known))

Two things must agree before rows of different prompts stand in one batch:

- *facts*: the model is a causal decoder of a type that was verified, with an attention kernel, a
  rope and weights that treat rows and positions alone, in eval mode; the prompts are plain tokens;
- *a trial* (`engine.trial`): once for each model, prompts beside over-long ones and beside NaN,
  infinities and 1e30 gave what they give alone, at every site that is offered.

Those whose inputs are equal then need rows of their own only from their first edit on (`trunks`).

Where a row lies in a site comes from the signature's formulas. A site without a batch dimension, or
without a formula, is not offered: an invoke that uses one runs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from copy import copy
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from weft.families.forward import PADDING_EXACT, SEES_BOTH_SIDES, LanguageFacts
from weft.graph.site import Leaf, Site, is_inside
from weft.kernels.aval import Aval
from weft.run.part import ModuleCall
from weft.run.rows import Lot, Piece
from weft.run.trunk import Station
from weft.signatures.rows import dims_of
from weft.signatures.signature import Signature, Signatures

from . import trunks
from .known import Known
from .trial import Refused, trial

LARGEST = 1 << 15
"""Tokens of one shared forward, padding included; more invokes share several."""

_KERNELS = ("eager", "sdpa")
_ROPES = frozenset(("default", "linear", "llama3", "yarn", "proportional"))
_KEYWORDS = frozenset(("input_ids", "use_cache"))


class Merger:
    """See the module's text and `run.rows.Merger`."""

    def __init__(self, signatures: Signatures, facts: LanguageFacts) -> None:
        self._their = ref(signatures)  # who knows a merger by its signatures must let go of them
        self._facts = facts
        self._trials: WeakKeyDictionary[nn.Module, tuple[Any, Refused | None]] = WeakKeyDictionary()
        self._trunks: WeakKeyDictionary[nn.Module, tuple[Any, Refused | None]] = WeakKeyDictionary()

    @property
    def _signatures(self) -> Signatures:
        found = self._their()
        assert found is not None  # a model that is in use has them
        return found

    def allows(self, module: nn.Module) -> bool:
        """Whether calls of this model may share forwards at all."""
        return may_share(self._facts, module)

    def keys(self, calls: Sequence[ModuleCall], module: nn.Module) -> list[Hashable | None]:
        if not self.allows(module):
            return [None] * len(calls)
        return ["tokens" if is_plain(call) else None for call in calls]

    def order(self, calls: Sequence[ModuleCall]) -> Callable[[Site], int]:
        signature = cache(lambda invoke: self._signature(calls[invoke]))
        return lambda s: signature(s.invoke).site(s.path, s.port, s.call).index

    def lot(
        self,
        invokes: Sequence[int],
        calls: Sequence[ModuleCall],
        leaves: Mapping[Site, Sequence[Leaf]],
        edited: Collection[Site],
        module: nn.Module,
    ) -> tuple[Lot | None, set[int]]:
        refused = self._refused(module)
        if refused is None:
            return None, set(invokes)
        lot, alone = self.offered(invokes, calls, leaves, refused)
        if lot is not None and trunks.repeat(lot.invokes, calls):
            felt = self._felt(module, refused)
            used = {(site.path, site.port, site.call, leaf) for site, leaf in lot.pieces}
            if felt is not None and felt.isdisjoint(used):
                lot = self.grown(lot, calls, edited, module)
        return lot, alone

    def grown(
        self,
        lot: Lot,
        calls: Sequence[ModuleCall],
        edited: Collection[Site],
        module: nn.Module,
    ) -> Lot:
        """The lot with rows that grow, where that is less."""
        places = self.stations(lot.call, module)
        return trunks.shared(lot, calls, edited, self._signature(lot.call), places)

    def stations(self, call: ModuleCall, module: nn.Module) -> tuple[Station, ...]:
        """Where rows of a pass like this call, of several rows, may change."""
        signature = self._signature(call)
        if "stations" not in signature.kept:
            found = self._signatures.formulas(call[0], dict(call[1]))
            places = () if found is None else trunks.stations(module, signature, found[0])
            signature.kept["stations"] = places
        return signature.kept["stations"]

    def offered(
        self,
        invokes: Sequence[int],
        calls: Sequence[ModuleCall],
        leaves: Mapping[Site, Sequence[Leaf]],
        refused: Refused,
    ) -> tuple[Lot | None, set[int]]:
        """A lot without the sites that were refused."""
        together = _together(invokes, calls, self._facts.pad)
        if together is None:
            return None, set(invokes)
        call, places = together
        found = self._signatures.formulas(call[0], dict(call[1]))
        if found is None:
            return None, set(invokes)
        formulas, (batch, width) = found
        whole = self._signature(call)
        signatures = {one: self._signature(calls[one]) for one in invokes}
        pieces: dict[tuple[Site, Leaf], Piece] = {}
        alone: set[int] = set()
        for site, named in leaves.items():
            own = signatures[site.invoke]
            for leaf in named:
                key = site.path, site.port, site.call, leaf
                piece = None
                if key not in refused:
                    size = (*places[site.invoke], batch, width)
                    piece = _piece(formulas, site, leaf, whole, own, size)
                if piece is None:
                    alone.add(site.invoke)
                else:
                    pieces[site, leaf] = piece
        left = [one for one in invokes if one not in alone]
        if len(left) < 2:
            return None, set(invokes)
        if alone:
            return self.offered(left, calls, _of(leaves, left), refused)[0], alone
        return Lot(tuple(left), call, pieces), set()

    def seats(
        self,
        guests: Sequence[tuple[Sequence[ModuleCall], Mapping[Site, Sequence[Leaf]]]],
        module: nn.Module,
    ) -> tuple[ModuleCall | None, list[dict[tuple[Site, Leaf], Piece] | None]]:
        """One forward for requests of different users: of each the calls of its invokes, and the
        leaves at its sites. Gives the call of all, and the pieces of each; who has None in their
        place must run alone. An invoke without a site has no row.
        """
        refused = self._refused(module)
        nobody: list[dict[tuple[Site, Leaf], Piece] | None] = [None] * len(guests)
        if refused is None:
            return None, nobody
        sitting = list(range(len(guests)))
        while sitting:
            found = self._seated([guests[one] for one in sitting], refused)
            if found is None:
                return None, nobody
            call, pieces = found
            if None not in pieces:
                seats = nobody.copy()
                for one, mine in zip(sitting, pieces, strict=True):
                    seats[one] = mine
                return call, seats
            sitting = [one for one, mine in zip(sitting, pieces, strict=True) if mine is not None]
        return None, nobody

    def _seated(
        self,
        guests: Sequence[tuple[Sequence[ModuleCall], Mapping[Site, Sequence[Leaf]]]],
        refused: Refused,
    ) -> tuple[ModuleCall, list[dict[tuple[Site, Leaf], Piece] | None]] | None:
        """The same, where all are to sit; None where no forward is large enough for them."""
        each = [sorted({site.invoke for site in leaves}) for _, leaves in guests]
        calls = [calls[one] for (calls, _), mine in zip(guests, each, strict=True) for one in mine]
        together = _together(range(len(calls)), calls, self._facts.pad)
        found = together and self._signatures.formulas((), dict(together[0][1]))
        if not together or not found:
            return None
        call, places = together
        formulas, (batch, width) = found
        whole, first = self._signature(call), 0
        pieces = []
        for (_, leaves), mine in zip(guests, each, strict=True):
            sizes = {one: (*places[first + n], batch, width) for n, one in enumerate(mine)}
            own = {one: self._signature(calls[first + n]) for n, one in enumerate(mine)}
            pieces.append(_pieces(formulas, leaves, whole, own, sizes, refused))
            first += len(mine)
        return call, pieces

    def _signature(self, call: ModuleCall) -> Signature:
        return self._signatures.for_call(call[0], dict(call[1]))

    tries = True

    def untried(self) -> Merger:
        """As this one, but where the model has had no trial it is taken to pass it."""
        found = copy(self)
        found.tries = False
        return found

    def _refused(self, module: nn.Module) -> Refused | None:
        """The sites that the model's trial has refused; None where it must not be shared."""
        state = state_of(module, self._facts)
        known = self._trials.get(module)
        if known is None or known[0] != state:
            if not self.tries:
                return set()
            known = self._trials[module] = state, trial(self, module, self._facts)
        return known[1]

    def _felt(self, module: nn.Module, refused: Refused) -> Refused | None:
        """The sites at which it is felt that rows grow; None where they must not."""
        state = state_of(module, self._facts)
        known = self._trunks.get(module)
        if known is None or known[0] != state:
            if not self.tries:
                return set()
            found = trunks.trial(self, module, self._facts, refused)
            known = self._trunks[module] = state, found
        return known[1]


def merger_of(known: Known) -> Merger | None:
    """Who merges for a model; None where nobody does."""
    return None if known.facts is None else merger(known.signatures, known.facts)


def merger(signatures: Signatures, facts: LanguageFacts) -> Merger:
    """The one merger of a model: it remembers the model's trial."""
    found = _MERGERS.get(signatures)
    if found is None:
        found = _MERGERS[signatures] = Merger(signatures, facts)
    return found


_MERGERS: WeakKeyDictionary[Signatures, Merger] = WeakKeyDictionary()


# -- facts ---------------------------------------------------------------------------------------


def may_share(facts: LanguageFacts, module: nn.Module) -> bool:
    """Whether all that is known of the model speaks for it."""
    return facts_allow(facts, module) and not _trains(module)


def facts_allow(facts: LanguageFacts, module: nn.Module) -> bool:
    """The same, as far as it can be told by a skeleton without weights."""
    return _facts_allow(facts) and not (_has_experts(facts) and _is_half(module))


def _facts_allow(facts: LanguageFacts) -> bool:
    config = facts.config
    return (
        facts.model_type in PADDING_EXACT - SEES_BOTH_SIDES
        and facts.attention in _KERNELS
        and getattr(config, "quantization_config", None) is None
        and _rope_kinds(config) <= _ROPES
    )


def _has_experts(facts: LanguageFacts) -> bool:
    """Whether its layers choose among experts. In half precision two of them are often as good as
    equal: another order of additions then chooses the other, and its numbers are no rounding."""
    counts = {name: n for name, n in facts.config.to_dict().items() if "experts" in name}
    return any(isinstance(n, int) and n > 1 for n in counts.values())


def _is_half(module: nn.Module) -> bool:
    first = next(module.parameters(), None)
    return first is not None and first.dtype in (torch.bfloat16, torch.float16)


def _trains(module: nn.Module) -> bool:
    """Whether any part is in training mode. `module.modules()` takes ten times as long."""
    waiting: list[nn.Module | None] = [module]
    for one in waiting:
        if one is not None:
            if one.training:
                return True
            waiting += one._modules.values()
    return False


def _rope_kinds(config: Any) -> set[str]:
    """The kinds of rotary embedding. Dynamic ones keep state, and follow the longest row."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [v for v in rope.values() if isinstance(v, dict)]
    return {kind.get("rope_type", "default") for kind in kinds}


def is_plain(call: tuple[Sequence[Any], Mapping[str, Any]]) -> bool:
    """Whether a call is nothing but tokens, none of them padding."""
    args, kwargs = call
    ids = kwargs.get("input_ids")
    plain = not args and kwargs.keys() <= _KEYWORDS and not kwargs.get("use_cache")
    return plain and isinstance(ids, Tensor) and ids.dim() == 2


def state_of(module: nn.Module, facts: LanguageFacts) -> Any:
    first = next(module.parameters(), None)
    where = None if first is None else (first.dtype, first.device)
    return where, facts.attention, id(type(module).forward)


# -- the call of all, and the pieces ---------------------------------------------------------------


def _together(
    invokes: Sequence[int], calls: Sequence[ModuleCall], pad: int
) -> tuple[ModuleCall, dict[int, tuple[tuple[int, int], int]]] | None:
    """The call for these invokes, and the (rows, length) of each; None where it is too large."""
    ids: list[Any] = [calls[one][1]["input_ids"] for one in invokes]
    width, batch = max([one.shape[1] for one in ids]), sum([len(one) for one in ids])
    if batch * width > LARGEST:
        return None
    whole = torch.full((batch, width), pad, dtype=ids[0].dtype, device=ids[0].device)
    places, start = {}, 0
    for invoke, rows in zip(invokes, ids, strict=True):
        stop = start + len(rows)
        whole[start:stop, : rows.shape[1]] = rows
        places[invoke] = (start, stop), rows.shape[1]
        start = stop
    return ((), {**calls[invokes[0]][1], "input_ids": whole}), places


def _piece(
    formulas: Any,
    site: Site,
    leaf: Leaf,
    whole: Signature,
    own: Signature,
    size: tuple[tuple[int, int], int, int, int],
) -> Piece | None:
    """Where an invoke's part lies in a tensor; None where that is not certain.

    Of operations inside a forward the trial has said nothing.
    """
    if is_inside(site.port):
        return None
    try:
        there = whole.site(site.path, site.port, site.call)
        here = own.site(site.path, site.port, site.call)
    except LookupError:
        return None
    dims = dims_of(formulas, there.index, leaf)
    aval = dict(here.tensors).get(leaf)
    if dims is None or aval is None or here.tree != there.tree or here.index != there.index:
        return None
    if not any("B" in factors for factors in dims) or overlaps(aval):
        return None
    rows, length, batch, width = size
    sizes = {"B": rows[1] - rows[0], "S": length}
    for factors, got in zip(dims, aval.shape, strict=True):
        expected = 1
        for factor in factors:
            expected *= sizes.get(factor, factor)  # type: ignore[arg-type, operator]
        if factors and expected != got:
            return None
    return Piece(dims, rows, length, batch, width, tuple(aval.shape), tuple(aval.stride))


def _pieces(
    formulas: Any,
    leaves: Mapping[Site, Sequence[Leaf]],
    whole: Signature,
    own: Mapping[int, Signature],
    sizes: Mapping[int, tuple[tuple[int, int], int, int, int]],
    refused: Refused,
) -> dict[tuple[Site, Leaf], Piece] | None:
    """The pieces at all sites of one request; None where one of them is not offered."""
    found = {}
    for site, named in leaves.items():
        for leaf in named:
            if (site.path, site.port, site.call, leaf) in refused:
                return None
            invoke = site.invoke
            piece = _piece(formulas, site, leaf, whole, own[invoke], sizes[invoke])
            if piece is None:
                return None
            found[site, leaf] = piece
    return found


def overlaps(aval: Aval) -> bool:
    return any(n > 1 and s == 0 for n, s in zip(aval.shape, aval.stride, strict=True))


def _of(leaves: Mapping[Site, Sequence[Leaf]], invokes: list[int]) -> dict[Site, Sequence[Leaf]]:
    return {site: named for site, named in leaves.items() if site.invoke in invokes}
