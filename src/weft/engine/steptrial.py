"""A trial of generations: are their sites, beside hostile neighbours, what they are alone?

Once for each model, after the one of logits (`engine.sharing`) and before any generation of a block
shares forwards. Two generations stand first and last beside an over-long one and beside three whose
hidden states are NaN, infinite and 1e30 from the embedding on, at every step; the first shares its
prompt's forward with the one of NaN, and neighbours leave before the end. A tensor that is not what
it is alone, at any step, is never offered; where the model's own result is not, nothing is shared.

Tokens are given, not chosen: which are likeliest is no matter here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from weft.errors import InputError
from weft.families.call import ModelCall
from weft.families.decoding import Decoding
from weft.families.decodings import Decodings
from weft.families.forward import LanguageFacts
from weft.families.sampling import Sampling
from weft.graph.node import AnyNode, Call, Graph, Read, Ref, Save, Write
from weft.graph.site import Leaf, Site
from weft.kernels.aval import dtype_name
from weft.run.generate import run_generations
from weft.run.joined import Loop, Rows
from weft.run.rows import Piece
from weft.signatures.signature import Signature

from .trial import POISON, VICTIMS, agree, device_of, prompts

Key = tuple[bool, str, str, int, Leaf]
"""(whether after the prompt, path, port, call, leaf) of a tensor, whosever it is."""

Shown = frozenset[Key]
"""Tensors that are what they are alone."""

LENGTHS = (5, 23, 5, 6, 3, 7)
STEPS = (5, 2, 5, 3, 4, 3)
"""Steps of each generation: some leave while the first goes on, and it ends beside one other."""


class Stepping(Protocol):
    """What a trial needs to know of steps (`engine.stepping`)."""

    def signature(self, decoder: Decoding, step: int) -> Signature: ...

    def template(self, decoder: Decoding, site: Site, leaf: Leaf) -> Any: ...

    def piece(self, decoder: Any, site: Site, leaf: Leaf, place: Rows, batch: int) -> Piece: ...


def trial(stepping: Stepping, module: nn.Module, facts: LanguageFacts) -> Shown | None:
    """The tensors that may be offered; None where no generation of the model may share forwards."""
    try:
        ones = _generations(module, facts)
        offered = _offered(stepping, ones[0])
        poisoned = _poisoned(stepping.signature(ones[0], 0), offered)
        if poisoned is None:
            return None
        graph = _reads(stepping, ones, offered)
        alone = run_generations(graph, {}, module, ones).saved
        ones = _generations(module, facts)
        graph = _reads(stepping, ones, offered, poisoned)
        together = run_generations(graph, {}, module, ones, sharer=_All(stepping)).saved
    except (RuntimeError, ValueError, TypeError, LookupError, InputError):
        return None  # a model that cannot even take the batch is not shared
    names = _names(offered)
    bad = {key for name, key in names if not agree(together[name], alone[name])}
    results = [key for key in offered if key[1:3] == ("", "output")]
    if {key[0] for key in results} != {False, True} or not bad.isdisjoint(results):
        return None
    return frozenset(offered) - bad


class _All:
    """A sharer that lets everybody in."""

    def __init__(self, stepping: Stepping) -> None:
        self.piece = stepping.piece

    def may(
        self,
        decoders: Mapping[int, Any],
        leaves: Mapping[Site, Sequence[Leaf]],
        module: nn.Module,
    ) -> set[int]:
        return set(decoders)

    def loop(self, module: nn.Module) -> Loop:
        return Decodings(module, shared=True)


class _Given:
    """In the place of a sampler: tokens that do not depend on logits."""

    def __init__(self, vocab: int, longest: int) -> None:
        self._vocab = vocab
        self._longest = longest

    def choose(self, ids: Tensor, logits: Tensor) -> Tensor:
        return (ids[:, -1] * 7 + ids.shape[1]) % self._vocab

    def ended(self, ids: Tensor) -> bool:
        return ids.shape[1] >= self._longest


def _generations(module: nn.Module, facts: LanguageFacts) -> list[Decoding]:
    found = []
    plain = prompts(facts, device_of(module), LENGTHS)
    for (args, kwargs), steps in zip(plain, STEPS, strict=True):
        ids: Any = kwargs["input_ids"]
        call = ModelCall(args, {"input_ids": ids}, batch=1, length=ids.shape[1])
        one = Decoding(module, call, Sampling(max_new_tokens=steps))
        given: Any = _Given(facts.vocab, one.longest)
        one.sampler = given
        found.append(one)
    return found


def _offered(stepping: Stepping, one: Decoding) -> list[Key]:
    """The tensors whose rows the formulas know, of the prompt's forward and of a later one."""
    found: list[Key] = []
    for step in (0, 1):
        signature = stepping.signature(one, step)
        for path, port, call in signature.order:
            site = Site(path, port, call, step=step)
            for leaf, _ in signature.site(path, port, call).tensors:
                if stepping.template(one, site, leaf) is not None:
                    found.append((step > 0, path, port, call, leaf))
    return found


def _poisoned(signature: Signature, offered: list[Key]) -> Key | None:
    """Where neighbours are poisoned: the first hidden states of the pass."""
    for key in offered:
        later, path, port, call, leaf = key
        if not later and port == "output":
            aval = dict(signature.site(path, port, call).tensors)[leaf]
            if aval.dtype.is_floating_point and (True, path, port, call, leaf) in offered:
                return key
    return None


def _names(offered: list[Key]) -> list[tuple[str, Key]]:
    """What is saved of the victims at each step, and of which tensor it is."""
    found = []
    for victim in VICTIMS:
        for step in range(STEPS[victim]):
            for number, key in enumerate(offered):
                if key[0] == (step > 0):
                    found.append((f"{victim} {step} {number}", key))
    return found


def _neighbours() -> list[tuple[int, int]]:
    """Their numbers and steps."""
    others = [number for number in range(len(STEPS)) if number not in VICTIMS]
    return [(number, step) for number in others for step in range(STEPS[number])]


def _reads(
    stepping: Stepping, ones: list[Decoding], offered: list[Key], poisoned: Key | None = None
) -> Graph:
    """A graph that saves all tensors of the victims at all steps, and poisons the neighbours."""
    nodes: list[AnyNode] = []
    for name, key in _names(offered):
        victim, step, _ = map(int, name.split())
        nodes.append(_read(stepping, ones, victim, step, key))
        nodes.append(Save(name=name, value=Ref(len(nodes) - 1)))
    if poisoned is None:
        return Graph(nodes=tuple(nodes))
    for invoke, step in _neighbours():
        read = _read(stepping, ones, invoke, step, poisoned)
        at, value = len(nodes), POISON.get(invoke, 1.0)  # the over-long one takes part as it is
        call = Call(op="mul", args=(Ref(at), value))
        nodes += [read, call, Write(site=read.site, leaf=read.leaf, value=Ref(at + 1))]
    return Graph(nodes=tuple(nodes))


def _read(stepping: Stepping, ones: list[Decoding], invoke: int, step: int, key: Key) -> Read:
    _, path, port, call, leaf = key
    aval = dict(stepping.signature(ones[invoke], step).site(path, port, call).tensors)[leaf]
    site = Site(path, port, call, invoke=invoke, step=step)
    return Read(site=site, leaf=leaf, shape=tuple(aval.shape), dtype=dtype_name(aval.dtype))
