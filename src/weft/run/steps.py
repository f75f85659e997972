"""The nouns of a run: a step, the steps of a site, a plan. See `plan` for how they come about."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from weft.graph.node import AnyNode, Bound, Graph
from weft.graph.site import Leaf, Site, Where

from .lower import Args, Hole


class Step:
    """One node, lowered."""

    outs = 0
    waits = 0  # what it waits for: its deps, and its site
    args: Args | None = None
    function: Callable[..., Any] | None = None  # None: it needs more than its arguments
    value: tuple[Any, Hole] = (None, None)  # of a save; for a write or fill, its slot
    dtype: torch.dtype | None = None
    targets: tuple[int, ...] = ()  # slots that it writes into, as recorded
    changes: tuple[int, ...] = ()  # slots that its operation changes, whatever was recorded
    sources: tuple[int | None, ...] = ()  # of each result: the slot whose storage it shares
    bounds: Sequence[Bound] = ()
    older: Sequence[tuple[int, int]] = ()  # (step, slot) to copy, if waiting, before it writes
    clones: Collection[int] = ()  # slots that a save must copy
    direct = False  # a read whose edits may act on the model's own tensor
    watch = False  # its results may be the model's own tensors
    verify = False  # shared storage must be as recorded, or results are cut out
    cuts: Collection[int] = ()  # results that only wait to be saved (`cuts`)
    # Gradients (`gradlink`):
    of = -1  # of a gradient: the slot that it is the gradient of
    losses: tuple[tuple[int, int | None], ...] = ()  # of a backward: slots of losses and seeds
    asked: Sequence[int] = ()  # of a backward: the gradients that name it
    arrivals: Sequence[int] = ()  # those of them that are live: steps that wait for a gradient
    taps = False  # whether gradients are replaced while they flow
    follows: Collection[int] = ()  # slots that must have a history from here on
    captures: Sequence[tuple[int, int]] = ()  # (backward, slot): what it is the gradient of

    def __init__(self, index: int, node: AnyNode, slot: int) -> None:
        self.index = index
        self.node: Any = node
        self.kind = type(node)
        self.slot = slot  # of the first result
        self.uses: list[int] = []  # slots that it needs, each once
        self.deps: set[int] = set()  # steps that run before it
        self.kids: list[int] = []  # steps that wait for it


class SitePlan:
    """The steps of one site in program order, and those among them that change it."""

    __slots__ = ("changes", "effects", "follow", "leaves", "steps", "taken")

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.effects: list[int] = []
        self.leaves: Sequence[Leaf] | None = None  # `rows.leaves_of`, once it was asked
        self.changes: Mapping[Leaf, bool] | None = None  # `rows.changed_leaves`
        self.follow = False  # whether what the model does with its tensors is followed from here
        self.taken: Any = None  # where nothing else happens: what is read and saved (`taken`)


class Plan:
    """What `Interpreter` runs. See the module's text."""

    __slots__ = (
        "backwards",
        "count",
        "family",
        "fills",
        "nodes",
        "left",
        "logs",
        "maker",
        "members",
        "params",
        "quick",
        "sites",
        "skips",
        "steps",
        "strict",
        "taken",
        "waits",
        "written",
    )

    def __init__(self, nodes: tuple[AnyNode, ...], strict: bool) -> None:
        self.nodes = nodes
        self.strict = strict
        self.steps: list[Step | None] = []  # by node; None where nothing needs it
        self.family: list[int] = []  # by slot
        self.maker: list[int] = []  # by slot: the node
        self.left: list[int] = []  # by slot: how many steps use it
        self.waits: list[int] = []  # by node
        self.written: dict[int, int] = {}  # family -> the last node that writes into it
        self.members: dict[int, list[int]] = {}  # families handed to the model -> their slots
        self.sites: dict[Site, SitePlan] = {}
        self.skips: dict[Site, Site] = {}  # outputs of skipped modules -> where they begin
        self.taken: frozenset[int] = frozenset()  # slots of sites that are only read and saved
        self.quick: dict[Site, Any] = {}  # those of them where it is the whole of one output
        self.logs: tuple[int, ...] = ()  # the nodes that print, in the order of what they print
        self.count = 0
        self.fills = False  # whether anything is copied into the model's own tensors
        self.backwards: list[int] = []  # live ones
        self.params: list[str] = []  # weights whose gradients are asked for

    def source(self, slot: int) -> AnyNode:
        """The node whose result owns the storage of a slot."""
        return self.nodes[self.maker[self.family[slot]]]

    def is_written_after(self, slot: int, index: int) -> bool:
        """Whether a later node than `index` writes into the storage of a slot."""
        return self.written.get(self.family[slot], -1) > index


def line_of(graph: Graph, node: AnyNode | Bound) -> Where | None:
    """The user's line of a node."""
    return graph.where[node.at] if node.at < len(graph.where) else None
