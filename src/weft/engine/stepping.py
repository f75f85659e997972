"""Which invokes of a generation may share forwards, and where their rows lie in them.

    run_generations(graph, constants, net, decoders, sharer=sharer(signatures, facts))

Two things must agree, as for single forwards (`engine.merging`): what is known of the model, its
trial of generations (`engine.sharing`), and one of their sites (`engine.steptrial`) speak for it;
and at every site that an invoke uses, at every step of it, formulas say where its rows lie.

The formulas are those of the prompt's forward in batch and length; in a step the length is one. A
tensor that has the length of the cache (attention weights and masks) fits none of them: who uses
one has forwards of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

from torch import nn

from weft.families.decoding import Decoding
from weft.families.decodings import Decodings, is_plain, may_share
from weft.families.forward import LanguageFacts
from weft.families.rehearsal import Layout, first_keywords, prompt_of
from weft.families.sampling import Sampling
from weft.graph.site import Leaf, Site, is_inside
from weft.run.joined import Loop, Rows
from weft.run.rows import Dims, Piece
from weft.signatures.rows import dims_of
from weft.signatures.signature import Signature, Signatures

from .known import Known
from .merging import may_share as facts_allow
from .merging import overlaps, state_of
from .sharing import shares_steps
from .steptrial import Shown, trial
from .turns import Turns, turns_for

_SAMPLE = Layout(3, 7)
"""A prompt whose batch and length are told apart from all other sizes by the formulas."""


class Template(NamedTuple):
    """What a tensor of one invoke is like where it runs alone.

    `ends`: its dimensions in a forward of prompts of several lengths, where the head has the last
    position of each length only: of its tensors "S" is which of these.
    """

    dims: Dims
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    ends: Dims


class _Told(NamedTuple):
    """What was found out of one generation: its steps, and tensors of its sites."""

    steps: dict[int, Signature]
    templates: dict[tuple[Site, Leaf], Template | None]


class Stepping:
    """See the module's text and `run.joined.Sharer`."""

    def __init__(self, signatures: Signatures, facts: LanguageFacts) -> None:
        self._their = ref(signatures)  # who knows this by its signatures must let go of them
        self._facts = facts
        self._trials: WeakKeyDictionary[nn.Module, tuple[Any, Shown | None]] = WeakKeyDictionary()
        self._told: WeakKeyDictionary[Decoding, _Told] = WeakKeyDictionary()

    @property
    def _signatures(self) -> Signatures:
        found = self._their()
        assert found is not None  # a model that is in use has them
        return found

    @property
    def turns(self) -> Turns:
        """What the steps look like."""
        return turns_for(self._signatures, self._facts)

    # -- what a run asks -----------------------------------------------------------------------

    def may(
        self,
        decoders: Mapping[int, Any],
        leaves: Mapping[Site, Sequence[Leaf]],
        module: nn.Module,
    ) -> set[int]:
        able = {one for one, decoder in decoders.items() if self._able(decoder)}
        shown = self._shown(module) if len(able) > 1 else None
        if shown is None:
            return set()
        for site, named in leaves.items():
            if site.invoke in able and not self._known(decoders[site.invoke], site, named, shown):
                able.discard(site.invoke)
        return able

    def boards(
        self,
        decoders: Mapping[int, Any],
        leaves: Mapping[Site, Sequence[Leaf]],
        module: nn.Module,
    ) -> bool:
        """Whether a request may share steps with those of others: all of its generations may."""
        if not all(map(self._able, decoders.values())):
            return False
        shown = self._shown(module)
        return shown is not None and all(
            self._known(decoders[site.invoke], site, named, shown) for site, named in leaves.items()
        )

    def untried(self) -> Stepping:
        """As this one, but where the model has had no trial it is taken to pass it."""
        return _Untried(self._signatures, self._facts)

    def loop(self, module: nn.Module) -> Loop:
        return Decodings(module, shared=True)

    def piece(self, decoder: Any, site: Site, leaf: Leaf, place: Rows, batch: int) -> Piece:
        found = self.template(decoder, site, leaf)
        assert found is not None  # who has such a site was not let in
        dims, shape, stride, ends = found
        if place.step:
            return Piece(dims, place.rows, 1, batch, 1, shape, stride)
        if ends != dims and place.kept > 1:
            return Piece(ends, place.rows, 1, batch, place.kept, shape, stride, place.last)
        return Piece(dims, place.rows, place.length, batch, place.width, shape, stride)

    def _told_of(self, decoder: Decoding) -> _Told:
        if not isinstance(decoder, Decoding):  # a `forecast.Foreseen`, which stands for one
            return _Told({}, {})
        found = self._told.get(decoder)
        if found is None:
            found = self._told[decoder] = _Told({}, {})
        return found

    def _known(self, decoder: Any, site: Site, leaves: Sequence[Leaf], shown: Shown) -> bool:
        """Whether all of these tensors of a site were shown to be what they are alone."""
        path = self.signature(decoder, site.step).canonical(site.path)
        keys = {(site.step > 0, path, site.port, site.call, leaf) for leaf in leaves}
        return keys <= shown and None not in [self.template(decoder, site, leaf) for leaf in leaves]

    def _able(self, decoder: Any) -> bool:
        return may_share(decoder)

    def _shown(self, module: nn.Module) -> Shown | None:
        """The tensors that the trials have passed; None where nothing must be shared."""
        if not shares_steps(module, self._facts):
            return None
        state = state_of(module, self._facts)
        known = self._trials.get(module)
        if known is None or known[0] != state:
            known = self._trials[module] = state, trial(self, module, self._facts)
        return known[1]

    # -- what tensors are like -----------------------------------------------------------------

    def signature(self, decoder: Decoding, step: int) -> Signature:
        """One step of a generation, as it is alone."""
        told = self._told_of(decoder).steps
        found = told.get(step)
        if found is None:
            found = told[step] = self.turns.at(decoder.prompt, decoder.sampling, step)
        return found

    def template(self, decoder: Decoding, site: Site, leaf: Leaf) -> Template | None:
        """What a tensor is like; None where it is not certain where its rows lie.

        Of operations inside a forward the trial has said nothing. Raises nothing: a site that does
        not fire is for the run to tell.
        """
        told = self._told_of(decoder).templates
        if (site, leaf) not in told:
            told[site, leaf] = self._found_out(decoder, site, leaf)
        return told[site, leaf]

    def _found_out(self, decoder: Decoding, site: Site, leaf: Leaf) -> Template | None:
        if is_inside(site.port):
            return None
        own = self.signature(decoder, site.step)
        key = "rows of steps", site.step > 0, site.path, site.port, site.call, leaf
        if key not in own.kept:
            own.kept[key] = self._template(decoder, site, leaf, own)
        return own.kept[key]

    def _template(
        self, decoder: Decoding, site: Site, leaf: Leaf, own: Signature
    ) -> Template | None:
        sampling = decoder.sampling
        keywords = first_keywords(prompt_of(_SAMPLE), sampling, self._facts)
        found = self._signatures.formulas((), keywords)
        if found is None:
            return None
        try:
            there = self._signatures.for_call((), keywords).site(site.path, site.port, site.call)
            aval = dict(own.site(site.path, site.port, site.call).tensors)[leaf]
        except LookupError:
            return None
        dims = dims_of(found[0], there.index, leaf)
        if dims is None or not any("B" in factors for factors in dims) or overlaps(aval):
            return None
        prompt = decoder.prompt
        sizes: dict[Any, Any] = {"B": prompt.batch or 1, "S": 1 if site.step else prompt.length}
        if len(dims) != len(aval.shape):
            return None
        for factors, got in zip(dims, aval.shape, strict=True):
            if factors and prod([sizes.get(factor, factor) for factor in factors]) != got:
                return None
        ends = dims if site.step else self._ends(site, leaf, dims, sampling)
        if ends is None or (ends != dims and sum([("S" in factors) for factors in ends]) > 1):
            return None  # its positions are not certain to be those that the head has
        return Template(dims, tuple(aval.shape), tuple(aval.stride), ends)

    def _ends(self, site: Site, leaf: Leaf, dims: Dims, sampling: Sampling) -> Dims | None:
        """`Template.ends` of a tensor of the prompt's forward; None where it is not known."""
        if sampling.logits_to_keep != 1 or "logits_to_keep" not in self._facts.takes:
            return dims
        every = replace(sampling, logits_to_keep=0)
        keywords = first_keywords(prompt_of(_SAMPLE), every, self._facts)
        found = self._signatures.formulas((), keywords)
        there = self._signatures.for_call((), keywords).site(site.path, site.port, site.call)
        return None if found is None else dims_of(found[0], there.index, leaf)


class _Untried(Stepping):
    """Of a model that passes its trials."""

    def _able(self, decoder: Any) -> bool:
        return is_plain(decoder.prompt, decoder.sampling)

    def _known(self, decoder: Any, site: Site, leaves: Sequence[Leaf], shown: Shown) -> bool:
        return None not in [self.template(decoder, site, leaf) for leaf in leaves]

    def _shown(self, module: nn.Module) -> Shown | None:
        return frozenset() if facts_allow(self._facts, module) else None


def sharer_of(known: Known) -> Stepping | None:
    """Who says it for a model; None where nobody does."""
    return None if known.facts is None else sharer(known.signatures, known.facts)


def sharer(signatures: Signatures, facts: LanguageFacts) -> Stepping:
    """The one of a model: it remembers the model's trial."""
    found = _SHARERS.get(signatures)
    if found is None:
        found = _SHARERS[signatures] = Stepping(signatures, facts)
    return found


_SHARERS: WeakKeyDictionary[Signatures, Stepping] = WeakKeyDictionary()
