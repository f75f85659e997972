"""A trial of a model: are prompts, beside hostile neighbours, what they are alone?

Once for each model, before any of its forwards is shared. Two prompts stand first and last in a
batch with an over-long one and with three whose hidden states are NaN, infinite and 1e30 from the
embedding on. At every site that can be offered their part must be what it is when they run alone.
A site where it is not is never offered; where the model's own result is not, nothing is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from weft.families.forward import LanguageFacts
from weft.graph.node import AnyNode, Call, Graph, Name, Read, Ref, Save, Write
from weft.graph.site import Leaf, Site
from weft.kernels.aval import Aval, dtype_name
from weft.run.invokes import run_all
from weft.run.part import ModuleCall
from weft.run.rows import Lot
from weft.run.trunk import Station
from weft.signatures.signature import Signature

Key = tuple[str, str, int, Leaf]
"""(path, port, call, leaf) of a tensor at a site, whosever it is."""

Refused = set[Key]
"""Tensors that are not offered."""

LENGTHS = (5, 23, 4, 6, 3, 7)
VICTIMS = (0, 5)
POISON = {2: Name("float", "nan"), 3: Name("float", "inf"), 4: 1e30}

_PART = 1e-5
_HALF_STEPS = 8


class Merging(Protocol):
    """What a trial needs of the merger it is for."""

    def offered(
        self,
        invokes: Sequence[int],
        calls: Sequence[ModuleCall],
        leaves: Mapping[Site, Sequence[Leaf]],
        refused: Refused,
    ) -> tuple[Lot | None, set[int]]: ...

    def order(self, calls: Sequence[ModuleCall]) -> Callable[[Site], int]: ...

    def grown(
        self,
        lot: Lot,
        calls: Sequence[ModuleCall],
        edited: Collection[Site],
        module: nn.Module,
    ) -> Lot: ...

    def stations(self, call: ModuleCall, module: nn.Module) -> tuple[Station, ...]: ...

    def _signature(self, call: ModuleCall) -> Signature: ...


def trial(merging: Merging, module: nn.Module, facts: LanguageFacts) -> Refused | None:
    """The tensors that must not be offered; None where no forward of the model may be shared."""
    calls = prompts(facts, device_of(module), LENGTHS)
    signatures = [merging._signature(call) for call in calls]
    offered, refused = _sites(merging, calls, signatures)
    poisoned = _poisoned(signatures[0], offered)
    if poisoned is None:
        return None
    try:
        alone = run_graph(module, calls, _reads(signatures, offered), None)
        graph = _reads(signatures, offered, poisoned)
        together = run_graph(module, calls, graph, Given(merging, refused))
    except (RuntimeError, ValueError, TypeError, LookupError):
        return None  # a model that cannot even take the batch is not shared
    bad: Refused = set()
    for name, key in _names(offered).items():
        pairs = [(together[f"{v} {name}"], alone[f"{v} {name}"]) for v in VICTIMS]
        if not all(agree(*pair) for pair in pairs):
            bad.add(key)
    results = [key for key in offered if key[0] == "" and key[1] == "output"]
    if not results or not bad.isdisjoint(results):
        return None
    return refused | bad


def device_of(module: nn.Module) -> torch.device:
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def prompts(facts: LanguageFacts, device: torch.device, lengths: Sequence[int]) -> list[ModuleCall]:
    """Prompts of random tokens, the same each time."""
    draw = torch.Generator().manual_seed(0)
    keywords: dict[str, Any] = {"use_cache": False} if "use_cache" in facts.takes else {}
    longest = facts.positions or max(lengths)
    lengths = [min(length, longest) for length in lengths]
    ids = [torch.randint(facts.vocab, (1, n), generator=draw).to(device) for n in lengths]
    return [((), {"input_ids": one, **keywords}) for one in ids]


def _sites(
    merging: Merging, calls: list[ModuleCall], signatures: list[Signature]
) -> tuple[set[Key], Refused]:
    """The tensors whose rows the formulas know, and all others."""
    offered: set[Key] = set()
    refused: Refused = set()
    for path, port, call in signatures[0].order:
        for leaf, _ in signatures[0].site(path, port, call).tensors:
            leaves = {Site(path, port, call, invoke=n): (leaf,) for n in (0, 1)}
            lot, _ = merging.offered((0, 1), calls, leaves, set())
            (refused if lot is None else offered).add((path, port, call, leaf))
    return offered, refused


def _poisoned(signature: Signature, offered: set[Key]) -> Key | None:
    """Where neighbours are poisoned: the first hidden states of the pass."""
    for path, port, call in signature.order:
        for leaf, aval in signature.site(path, port, call).tensors:
            key = path, port, call, leaf
            if port == "output" and aval.dtype.is_floating_point and key in offered:
                return key
    return None


def _reads(signatures: list[Signature], offered: set[Key], poisoned: Key | None = None) -> Graph:
    """A graph that saves all tensors of the victims, and poisons the neighbours."""
    nodes: list[AnyNode] = []
    for victim in VICTIMS:
        for name, key in _names(offered).items():
            nodes.append(read_of(signatures[victim], victim, key))
            nodes.append(Save(name=f"{victim} {name}", value=Ref(len(nodes) - 1)))
    if poisoned is not None:
        nodes += _poison(signatures, poisoned, len(nodes))
    return Graph(nodes=tuple(nodes))


def _poison(signatures: list[Signature], key: Key, first: int) -> list[AnyNode]:
    nodes: list[AnyNode] = []
    nodes.append(read_of(signatures[1], 1, key))  # the over-long one takes part
    nodes.append(Save(name="long", value=Ref(first)))
    for invoke, value in POISON.items():
        read = read_of(signatures[invoke], invoke, key)
        at = first + len(nodes)
        nodes += [
            read,
            Call(op="mul", args=(Ref(at), value)),
            Write(site=read.site, leaf=key[3], value=Ref(at + 1)),
        ]
    return nodes


def read_of(signature: Signature, invoke: int, key: Key) -> Read:
    path, port, call, leaf = key
    aval: Aval = dict(signature.site(path, port, call).tensors)[leaf]
    site = Site(path, port, call, invoke=invoke)
    return Read(site=site, leaf=leaf, shape=tuple(aval.shape), dtype=dtype_name(aval.dtype))


def _names(offered: set[Key]) -> dict[str, Key]:
    ordered = sorted(offered, key=repr)
    return {str(number): key for number, key in enumerate(ordered)}


def run_graph(
    module: nn.Module, calls: list[ModuleCall], graph: Graph, merger: Any
) -> dict[str, torch.Tensor]:
    return run_all(graph, {}, module, calls, merger=merger).saved


class Given:
    """A merger that puts all into one lot; with a `module` one whose rows grow."""

    def __init__(self, merging: Merging, refused: Refused, grows: nn.Module | None = None) -> None:
        self._merging = merging
        self._refused = refused
        self._grows = grows

    def keys(self, calls: Sequence[ModuleCall], module: nn.Module) -> list[str]:
        return ["trial"] * len(calls)

    def order(self, calls: Sequence[ModuleCall]) -> Callable[[Site], int]:
        return self._merging.order(calls)

    def lot(
        self,
        invokes: Sequence[int],
        calls: Sequence[ModuleCall],
        leaves: Mapping[Site, Sequence[Leaf]],
        edited: Collection[Site],
        module: nn.Module,
    ) -> tuple[Lot | None, set[int]]:
        lot, alone = self._merging.offered(invokes, calls, leaves, self._refused)
        if lot is None or alone:
            raise LookupError("not all sites have formulas at this size")
        if self._grows is not None:
            lot = self._merging.grown(lot, calls, edited, self._grows)
            if lot.growth is None:
                raise LookupError("the rows of the trial do not grow")
        return lot, alone


def agree(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two are the same within the bound for their dtype; NaN is never."""
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    a, b = got.double(), expected.double()
    part = _PART
    if expected.dtype not in (torch.float32, torch.float64):
        part = _HALF_STEPS * torch.finfo(expected.dtype).eps
    infinite = ~b.isfinite()
    if not torch.equal(a[infinite], b[infinite]):
        return False
    gap = (a - b)[~infinite].abs()
    scale = b[~infinite].abs()
    return not gap.numel() or bool(gap.max() <= part * scale.max())
