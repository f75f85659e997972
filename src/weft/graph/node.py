"""The noun: an intervention graph, an ordered tuple of frozen nodes.

A node's id is its position. Its arguments are plain data (`Arg`): scalars, `Ref`s to results of
earlier nodes, and the few containers below. A graph holds no tensor and no callable: constants are
named by `Const.key` and their bytes travel beside the graph.

Order carries meaning where nodes touch the same storage or the same site; everywhere else a node
runs at the earliest moment at which what it needs exists. See `graph.check` for the grammar, and
`graph.gradients` for what gradients add to it.

    Read(site=Site("h.5", "output"), leaf=(), shape=(1, 9, 768), dtype="float32")
    Call(op="Tensor.mul", args=(Ref(0), 2.0))
    Write(site=Site("h.5", "output"), leaf=(), value=Ref(1))
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from .site import Leaf, Site, Where

VERSION = 1

DRAWS = 1 << 32
"""Draws are numbered within an invoke, `invoke * DRAWS` apart: each draws what it draws alone."""

STEP_DRAWS = 1 << 16
"""And within a step of a generation, `step * STEP_DRAWS` apart."""


class Data(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What arguments are made of. A field that nobody reads is refused, as in every node."""


class Ref(Data, frozen=True, omit_defaults=True, tag="ref"):
    """Tensor number `out` among the results of node `node`."""

    node: int
    out: int = 0


class Seq(Data, frozen=True, tag="seq"):
    """A tuple, list or `torch.Size` of arguments; `form` says which."""

    form: str
    items: tuple[Arg, ...]


class Map(Data, frozen=True, tag="map"):
    """A dict of arguments with text keys, in order."""

    keys: tuple[str, ...]
    values: tuple[Arg, ...]


class Slice(Data, frozen=True, tag="slice"):
    start: Arg = None
    stop: Arg = None
    step: Arg = None


class Name(Data, frozen=True, tag="name"):
    """A value that has a name and no other data.

    `form` is one of `dtype`, `memory_format`, `layout` (name as in `torch.<name>`), `ellipsis`,
    or `float` for `inf`, `-inf` and `nan`.
    """

    form: str
    name: str = ""


class Complex(Data, frozen=True, tag="complex"):
    real: float
    imag: float


class Shape(Data, frozen=True, tag="shape"):
    """The sizes that `of` has when the graph runs (`torch.zeros(h.shape)`), as a `torch.Size`."""

    of: Ref


Arg = None | bool | int | float | str | Ref | Seq | Map | Slice | Name | Complex | Shape

NAME_FORMS = ("dtype", "memory_format", "layout", "ellipsis", "float")
SEQ_FORMS = ("tuple", "list", "size")


class Node(
    Struct,
    frozen=True,
    omit_defaults=True,
    forbid_unknown_fields=True,
    tag_field="kind",
    kw_only=True,
):
    """What all nodes share: `at`, the index of the user's line in `Graph.where`."""

    at: int = 0


class Read(Node, frozen=True, tag="read"):
    """The tensor at a leaf of a site, with the shape and dtype it was recorded with."""

    site: Site
    leaf: Leaf = ()
    shape: tuple[int, ...] = ()
    dtype: str = "float32"


class Write(Node, frozen=True, tag="write"):
    """Rebinds one leaf of a site to `value`; nothing else that shares the old tensor sees it."""

    site: Site
    value: Ref
    leaf: Leaf = ()


class Fill(Node, frozen=True, tag="fill"):
    """Copies `value`, an edited read of this leaf, into the model's own tensor at the site."""

    site: Site
    value: Ref
    leaf: Leaf = ()


class Skip(Node, frozen=True, tag="skip"):
    """The module of this output site is not run in this call: `values` are the tensors it gives.

    They stand at `leaves` of its output, one for each tensor there. No site inside it fires.
    """

    site: Site
    values: tuple[Ref, ...]
    leaves: tuple[Leaf, ...] = ((),)


class Call(Node, frozen=True, tag="call"):
    """An operation of the closed table (`graph.ops`).

    `outs` is the number of tensors it returns, in order of the returned structure. `alias[i]` is
    the argument whose storage output `i` shares (decided when recorded), `writes` the arguments
    that it changes in place. `draw` numbers the random draws of a graph; `seed` keys this one, in
    place of the graph's own. `grad` is the grad mode.
    """

    op: str
    args: tuple[Arg, ...] = ()
    kwargs: tuple[tuple[str, Arg], ...] = ()
    outs: int = 1
    alias: tuple[Ref | None, ...] = ()
    writes: tuple[Ref, ...] = ()
    draw: int | None = None
    grad: bool = True
    seed: int | None = None


class Apply(Node, frozen=True, tag="apply"):
    """One of the model's own modules, run on given values. It fires no site.

    `types` gives `(dtype, shape)` of each result, as recorded.
    """

    path: str
    args: tuple[Arg, ...] = ()
    kwargs: tuple[tuple[str, Arg], ...] = ()
    outs: int = 1
    types: tuple[tuple[str, tuple[int, ...]], ...] = ()
    grad: bool = True


class Param(Node, frozen=True, tag="param"):
    """A weight or buffer of the model, read-only."""

    path: str
    shape: tuple[int, ...] = ()
    dtype: str = "float32"


class Const(Node, frozen=True, tag="const"):
    """A tensor from the client. `key` names its bytes, which travel beside the graph."""

    key: str
    shape: tuple[int, ...]
    dtype: str


class Guard(Node, frozen=True, tag="guard"):
    """A look: the recording depended on `value` being `expected`.

    `look` says what was looked at: `value` (numbers; floats within the bound of `weft.same`),
    or `shape` (only the shape of a result whose shape depends on numbers).
    """

    value: Ref
    expected: Arg
    look: str = "value"


class Save(Node, frozen=True, tag="save"):
    """Brings `value` (tensors in containers) back under `name`."""

    name: str
    value: Arg


class Log(Node, frozen=True, tag="log"):
    """Prints `parts` (text and values) when they exist, below what the logs before it print.

    What is only text, in a step of a generation, belongs to it by `after`: it is printed when that
    value is there, and never if that never happens. With `stream` nothing is printed: the parts are
    handed out, whole and at once, to who listens to that number.
    """

    parts: tuple[Arg, ...]
    after: Ref | None = None
    stream: int | None = None


class Stop(Node, frozen=True, tag="stop"):
    """Ends the model's forward once the sites named before it have fired.

    With a `condition`, a tensor of one number, only if it is not zero. `invoke` says whose forward
    is meant; None: those of all. In a generation it stands in one `step`, waits for sites of this
    and of earlier ones only, and ends the generation.
    """

    condition: Ref | None = None
    invoke: int | None = None
    step: int | None = None


class Backward(Node, frozen=True, tag="backward"):
    """The gradients of `losses`, as `Grad` nodes ask for them.

    `seeds` are the gradients of the losses themselves (None: of a loss that is one number, 1).
    `since` are the sites from which on the run follows what the model does with its tensors.
    `create`: the gradients have gradients too.
    """

    losses: tuple[Ref, ...]
    seeds: tuple[Ref | None, ...] = ()
    since: tuple[Site, ...] = ()
    create: bool = False


class Grad(Node, frozen=True, tag="grad"):
    """The gradient of node `backward`'s losses with respect to `of`, as it arrives there.

    `zeros`: a value that the losses do not depend on has zeros; else that is an error.
    """

    backward: int
    of: Ref
    zeros: bool = False


class Regrad(Node, frozen=True, tag="regrad"):
    """Rebinds the gradient that arrives at `of` to `value`: what flows on from there is this."""

    backward: int
    of: Ref
    value: Ref


class Loop(Node, frozen=True, tag="loop"):
    """The same nodes at each of the steps `range(start, stop, by)` of a generation.

    In the body results have numbers of their own: first those that it `takes` from before the loop
    (the same at every step), then those `along`: of an earlier loop over the same steps, of the
    same step; then the body's nodes. Sites in it are at step 0, which stands for the loop's. Nodes
    after the loop may use what it `gives`: number `i` of turn `t` is result `t * len(gives) + i`.
    `along` names number `i` of a loop alone: `Ref(loop, i)`.
    """

    start: int
    stop: int
    body: tuple[BodyNode, ...]
    by: int = 1
    takes: tuple[Ref, ...] = ()
    along: tuple[Ref, ...] = ()
    gives: tuple[Ref, ...] = ()

    @property
    def steps(self) -> range:
        return range(self.start, self.stop, self.by)


BodyNode = Read | Write | Fill | Call | Apply | Log | Skip | Stop

AnyNode = (
    Read
    | Write
    | Fill
    | Call
    | Apply
    | Param
    | Const
    | Guard
    | Save
    | Log
    | Skip
    | Stop
    | Backward
    | Grad
    | Regrad
    | Loop
)

EFFECTS = (Write, Fill, Skip, Guard, Save, Log, Stop, Loop)


class Bound(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The recording read dimension `dim` of `value` as the number `size`, at line `at`."""

    value: Ref
    dim: int
    size: int
    at: int = 0


class Mark(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The hash of a source whose operations the graph names: of the `forward` of the module at
    `path`, or of what is called inside it, by operation after operation."""

    path: str
    digest: str
    inside: tuple[str, ...] = ()


class Graph(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """An experiment: nodes in program order, and the lines they came from.

    `seed` keys the random draws: the same graph with the same seed draws the same numbers.
    `sources` has a mark for every source that a site is inside of. `root` is the method of the
    model whose call is the pass; None is its forward.
    """

    nodes: tuple[AnyNode, ...]
    where: tuple[Where, ...] = ()
    bounds: tuple[Bound, ...] = ()
    seed: int | None = None
    version: int = VERSION
    sources: tuple[Mark, ...] = ()
    root: str | None = None


def refs(arg: object) -> list[Ref]:
    """Every `Ref` in an argument, in order. Not by recursion: a stranger's may be nested deeply."""
    found: list[Ref] = []
    waiting = [arg]
    while waiting:
        part: Any = waiting.pop()
        kind = type(part)
        if kind is Ref:
            found.append(part)
        elif kind is tuple:
            waiting += part[::-1]
        elif kind is Seq:
            waiting += part.items[::-1]
        elif kind is Map:
            waiting += part.values[::-1]
        elif kind is Shape:
            found.append(part.of)
        elif kind is Slice:
            waiting += (part.step, part.stop, part.start)
    return found


def inputs_of(node: AnyNode) -> list[Ref]:
    """The results a node needs before it can run."""
    if isinstance(node, (Call, Apply)):
        return refs(node.args) + refs(tuple(value for _, value in node.kwargs))
    if isinstance(node, (Write, Fill, Guard, Save)):
        return refs(node.value)
    if isinstance(node, Log):
        return refs(node.parts) if node.after is None else [*refs(node.parts), node.after]
    if isinstance(node, Skip):
        return list(node.values)
    if isinstance(node, Stop):
        return [] if node.condition is None else [node.condition]
    if isinstance(node, Backward):
        return [*node.losses, *[ref for ref in node.seeds if ref is not None]]
    if isinstance(node, Grad):
        return [node.of]
    if isinstance(node, Loop):
        return [*node.takes, *node.along]
    return [node.of, node.value] if isinstance(node, Regrad) else []


def outs_of(node: AnyNode) -> int:
    """How many tensors a node gives."""
    if isinstance(node, (Call, Apply)):
        return node.outs
    if isinstance(node, Loop):
        return len(node.steps) * len(node.gives)
    return int(isinstance(node, (Read, Param, Const, Grad)))
