"""Whether a stranger's graph may run, and what it costs: decided on shapes, before anything runs.

    price = admit(graph, call, known, limits)      # raises a WeftError with the user's line

Nothing that the graph declares is believed. It is played through (`run.play`) on what the model's
sites really look like, and whatever it says of itself is held against what is found: the shapes
and dtypes of sites, weights and applied modules, how many tensors an operation gives, whose memory
they share, and which arguments it changes.

Not counted: the model's own pass (only the largest tensor at its sites is looked at), what its
modules need inside when they are applied, and most of what an operation needs beside its arguments
and results (see `bounds.inner_bytes`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from weft.errors import GraphError, LimitError, ResultTooLargeError, WeftError
from weft.families.call import ModelCall
from weft.graph.check import check
from weft.graph.frame import ITEM_SIZES, frame_bytes
from weft.graph.inside import inside_of_graph
from weft.graph.loops import results_in, unrolled
from weft.graph.node import Bound, Const, Graph, Guard, Log, Ref, Regrad, Skip, Stop, Write
from weft.graph.ops import is_effect
from weft.graph.passes import invokes_of
from weft.kernels.abstract import DataDependentError, Outcome
from weft.kernels.aval import Aval, dtype_name
from weft.run.compare import check_bound, check_look
from weft.run.lower import lower
from weft.run.play import Play
from weft.run.price import price_of, short
from weft.run.steps import Step, line_of
from weft.run.structure import tensors
from weft.signatures.signature import Signature
from weft.wire.messages import VALUE_BYTES, Limits, PriceInfo

from .bounds import inner_bytes, refuse_bombs, tensor_refs, unknown_bytes
from .generation import Samplings, check_generation
from .gradients import KeptForBackward, check_asked, check_losses, check_regrad, pass_flops
from .known import Known
from .leaving import Leaving
from .outcomes import outcome_of
from .places import Places, tree_of
from .refusals import at_line, foreign, over, text_of
from .skips import check_values
from .steps import Steps
from .telling import too_much

_SHOWN = 5
_ROW = 1 << 20
_LOOKED_AT = frozenset((Write, Skip, Stop, Guard, Log, Regrad))


def admit(
    graph: Graph,
    call: ModelCall,
    known: Known,
    limits: Limits,
    strict: bool = True,
    further: Sequence[ModelCall] = (),
    sampling: Samplings = None,
    keeps: frozenset[str] = frozenset(),
    leaving: Leaving | None = None,
) -> PriceInfo:
    """The price of a graph on this call of a model; `further` are those of its other invokes.

    With `sampling` (of each call) a call is the prompt of a generation, and the price that of all
    its steps. `keeps` are the saves that stay in a session: they count for `session_bytes`.

    Raises `GraphError` and its kin for a graph that does not fit the model or itself, and
    `LimitError` for one that asks for too much.
    """
    check(graph)
    _check_size(graph, limits)
    if graph.root != known.root:
        raise GraphError(
            f"the graph is of {_root(graph.root)}, and what runs here is {_root(known.root)}",
            fix="run it where it was recorded: Experiment.run(model, ...) with a model of this "
            "machine",
        )
    calls = (call, *further)
    graph = unrolled(graph)
    check_generation(graph, calls, sampling, limits)
    steps = Steps.of(known, calls, sampling, graph)
    known.signatures.inside.check(graph, calls, steps and steps.forward)
    signatures = _signatures(graph, calls, known, limits, steps)
    places = Places(tree_of(known), signatures, strict, steps)
    places.check(graph)
    admission = Admission(graph, places, limits, strict, keeps)
    if not admission.plan.count:
        raise GraphError("the graph has nothing to do", fix="save a value: x.save()")
    if admission.plan.backwards:
        admission.backwards.model = pass_flops(tree_of(known), calls)
    admission.run(places.index)
    admission.check_saved()
    if leaving is not None:
        leaving.check(graph, admission.leaves(), limits.log_bytes)
    if any(_is_long(one, limits) for one in calls):
        admission.check_pass()
    return PriceInfo(**price_of(admission)._asdict())


def _root(method: str | None) -> str:
    return "a forward" if method is None else f"a call of {method!r}"


def _signatures(
    graph: Graph,
    calls: Sequence[ModelCall],
    known: Known,
    limits: Limits,
    steps: Steps | None,
) -> dict[int, Signature]:
    """What the sites of each invoke look like, of those that the graph names; of a generation those
    of its step 0."""
    until = time.monotonic() + limits.price_seconds
    found: dict[int, Signature] = {}
    named, seconds = inside_of_graph(graph), f"{limits.price_seconds:g} s"

    def look() -> None:
        if time.monotonic() > until:
            raise over("price_seconds", seconds, "the sources take longer to price")

    for invoke in sorted(invokes_of(graph) | {0}):
        if invoke >= len(calls):
            raise GraphError(f"the graph has an invoke {invoke}, for which there is no input")
        if found and time.monotonic() > until:
            raise over("price_seconds", seconds, "the invokes take longer to price")
        call = calls[invoke]
        if steps is not None:
            found[invoke] = steps.at(invoke, 0)
            continue
        found[invoke] = known.signatures.for_call(call.args, dict(call.kwargs))
        for path, way in named.get(invoke, ()):
            look()
            known.signatures.inside.learn(found[invoke], call, path, way)
    if steps is not None:
        steps.learn(graph, look)
    return found


def _check_size(graph: Graph, limits: Limits) -> None:
    count = results_in(graph)
    if count > limits.nodes:
        raise over("nodes", f"{limits.nodes}", f"nodes and their results are {count}")
    for node in graph.nodes:
        if isinstance(node, Const):
            size = frame_bytes(node.dtype, node.shape)
            if size > limits.constant_bytes:
                limit, asked = _bytes(limits.constant_bytes), f"a constant takes {_bytes(size)}"
                raise over("constant_bytes", limit, asked, line=_where(graph, node))


class Admission(Play):
    """A play that believes nothing."""

    def __init__(
        self,
        graph: Graph,
        places: Places,
        limits: Limits,
        strict: bool,
        keeps: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(graph, strict)
        self._keeps = keeps
        self._staying = 0
        self._places = places
        self._limits = limits
        self._strict = strict
        self._until = time.monotonic() + limits.price_seconds
        self._kept: KeptForBackward | None = None
        self._guessed: set[int] = set()  # slots whose strides depend on numbers
        self._saves: list[tuple[int, Step]] = []
        self._logged: list[tuple[int, int]] = []
        self._streamed = 0
        self._bounds: dict[int, list[Bound]] = {}
        for bound in graph.bounds:
            self._bounds.setdefault(bound.value.node, []).append(bound)

    def step(self, step: Step) -> None:
        if time.monotonic() > self._until:
            seconds = f"{self._limits.price_seconds:g} s"
            raise self._over("price_seconds", seconds, "the graph takes longer to price", step)
        if step.kind in _LOOKED_AT:
            self._check_use(step)
        super().step(step)
        self._check_memory(step, 0)
        if self.flops > self._limits.flops:
            limit, asked = short(self._limits.flops, 1000, ""), short(self.flops, 1000, "")
            raise self._over("flops", limit, f"up to here the graph takes {asked}", step)

    def backward(self, step: Step) -> None:
        line = self.line(step)
        check_losses(step, self.env, line)
        check_asked(step, self.plan.steps, self.env, line)
        super().backward(step)
        if self._kept is None:
            self._kept = KeptForBackward(self._places.signatures, self.plan)
        kept = self._kept.bytes(self.fired)
        gradients = sum([self.env[slot].nbytes for slot in step.uses])
        self._check_memory(step, kept + gradients)
        self.memory.peak = max(self.memory.peak, self.memory.now + kept + gradients)

    def _check_use(self, step: Step) -> None:
        """What can be said of a write, a guard or a log before anything runs."""
        node, avals = step.node, [self.env[slot] for slot in step.uses]
        if step.kind is Write:
            self._places.check_write(node, avals[0], self.line(step))
        elif step.kind is Skip:
            given = [self.env[slot] for _, slot in step.args.slots]  # type: ignore[union-attr]
            check_values(node, given, self._places, self.line(step))
        elif step.kind is Stop:
            if avals and avals[0].meta.numel() != 1:
                raise GraphError(
                    f"a stop depends on one number, not on {avals[0]!r}", line=self.line(step)
                )
        elif step.kind is Regrad:
            check_regrad(avals[0], self.backwards.of(step), self.line(step))
        elif step.kind is Guard:
            expected, _ = lower(node.expected, (), [])
            check_look(node.look, expected, avals[0].shape, self.line(step))
            shape = node.look == "shape"
            told = 8 * len(avals[0].shape) if shape else avals[0].nbytes
            self._logged.append((step.index, told))
        else:
            self._check_memory(step, max([aval.nbytes for aval in avals], default=0))
            self._logged.append((step.index, sum([aval.nbytes for aval in avals])))
            if node.stream is not None:
                self._check_streamed(step, avals)

    def _results(self, step: Step) -> list[Aval]:
        found = super()._results(step)
        for bound in self._bounds.get(step.index, ()):
            check_bound(bound, found[bound.value.out].shape, line_of(self.graph, bound))
        return found

    def _check_memory(self, step: Step, inner: int) -> None:
        asked, limit = self.memory.now + inner, self._limits.memory_bytes
        if asked > limit:
            what = f"here the graph holds {_bytes(asked)}"
            fix = "save and keep less at once, or work on slices"
            raise self._over("memory_bytes", _bytes(limit), what, step, fix)

    def _over(
        self, name: str, limit: str, asked: str, step: Step, fix: str | None = None
    ) -> LimitError:
        return over(name, limit, asked, line=self.line(step), fix=fix)

    # Sites, weights, modules: what they are, not what the graph says

    def read(self, step: Step) -> Aval:
        return self._places.leaf(step.node)

    def param(self, step: Step) -> Aval:
        return self._places.weight(step.node.path)

    def applied(self, step: Step) -> list[Aval]:
        node, line = step.node, self.line(step)
        args, kwargs = self.arguments(step)
        try:
            found = self._places.applied(node.path, args, kwargs)
        except WeftError as error:
            raise at_line(error, line) from None
        except Exception as error:  # noqa: BLE001 (a module may raise anything)
            raise foreign(f"the module {node.path!r}", error, line) from None
        if len(found) != node.outs or not self._are_as_said(found, node.types):
            raise GraphError(
                f"the module {node.path!r} gives {_list(found)} here, not what the graph says",
                line=line,
            )
        self._check_memory(step, sum([aval.nbytes for aval in found]))
        self.flops += self._places.flops_of(node.path, args, kwargs)
        return found

    def _are_as_said(
        self, found: list[Aval], types: tuple[tuple[str, tuple[int, ...]], ...]
    ) -> bool:
        if len(found) != len(types):
            return False
        pairs = zip(found, types, strict=True)
        return all(self._places.is_as_said(aval, *said) for aval, said in pairs)

    # Operations

    def called(self, step: Step) -> list[Aval]:
        try:
            return super().called(step)
        except WeftError as error:
            raise at_line(error, self.line(step)) from None
        except Exception as error:  # noqa: BLE001 (torch may raise anything)
            raise foreign(f"torch.{step.node.op}", error, self.line(step)) from None

    def outcome(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
        name = step.node.op
        refuse_bombs(name, args, kwargs)
        refs = tensor_refs(step.node)
        try:
            found = outcome_of(name, args, kwargs)
        except DataDependentError:
            self._check_looked(step, refs)
            self._check_memory(step, unknown_bytes(name, args, kwargs))
            raise
        sources = [None if leaf.alias is None else refs[leaf.alias] for leaf in found.leaves]
        self._check_declared(step, len(found.leaves), sources, [refs[i] for i in found.writes])
        made = sum([leaf.aval.nbytes for leaf in found.leaves if leaf.alias is None])
        self._check_memory(step, made + inner_bytes(name, args, kwargs, found))
        return found

    def _check_declared(
        self, step: Step, outs: int, sources: list[Ref | None], writes: list[Ref]
    ) -> None:
        """Holds what the graph says of an operation against what it really does."""
        node = step.node
        if outs != node.outs:
            raise GraphError(f"torch.{node.op} gives {outs} tensors here, not {node.outs}")
        if {self._slot(ref) for ref in writes} != set(step.targets):
            raise GraphError(f"torch.{node.op} changes other arguments than the graph says")
        if not self._guessed.isdisjoint(step.uses):
            self._guessed.update(range(step.slot, step.slot + outs))
        elif self._strict:  # on other sizes or strides, the run itself copies or refuses
            families = self.plan.family
            found = [None if ref is None else families[self._slot(ref)] for ref in sources]
            said = [None if slot is None else families[slot] for slot in step.sources]
            if found != (said or [None] * outs):
                raise GraphError(f"torch.{node.op} shares memory otherwise than the graph says")

    def _slot(self, ref: Ref) -> int:
        step: Any = self.plan.steps[ref.node]
        return step.slot + ref.out

    def _check_looked(self, step: Step, refs: list[Ref]) -> None:
        """An operation whose result depends on numbers: a guard on each shape directly follows."""
        node, index = step.node, step.index
        following = self.graph.nodes[index + 1 : index + 1 + node.outs]
        for out, guard in enumerate(following):
            told = isinstance(guard, Guard) and guard.look == "shape"
            if not told or guard.value != Ref(index, out):  # type: ignore[union-attr]
                raise self._untold(step)
        if len(following) < node.outs:
            raise self._untold(step)
        self._guessed.update(range(step.slot, step.slot + node.outs))
        target = refs[:1] if is_effect(node.op) else []
        if {self._slot(ref) for ref in target} != set(step.targets):
            raise GraphError(f"torch.{node.op} changes other arguments than the graph says")

    def _untold(self, step: Step) -> GraphError:
        return GraphError(
            f"the shape of torch.{step.node.op} depends on numbers, and no guard directly after "
            "it tells the shape"
        )

    # Saves

    def save(self, step: Step) -> None:
        before = self.saved
        self._check_dtypes(step)
        super().save(step)
        if step.node.name in self._keeps:
            self._check_staying(self.saved - before, step)
            self.saved = before
            return
        self._saves.append((self.saved - before, step))

    def _check_staying(self, size: int, step: Step) -> None:
        self._staying += size
        limit = self._limits.session_bytes
        if self._staying > limit:
            asked = f"this block leaves {_bytes(self._staying)} there"
            fix = "hold less: let go of variables (del h), or keep slices"
            raise self._over("session_bytes", _bytes(limit), asked, step, fix)

    def _check_dtypes(self, step: Step) -> None:
        for slot in step.uses:
            name = dtype_name(self.env[slot].dtype)
            if name not in ITEM_SIZES:
                raise GraphError(
                    f"a tensor of {name} cannot be brought back",
                    line=self.line(step),
                    fix="save it as another dtype: x.float()",
                )

    def _check_streamed(self, step: Step, avals: list[Aval]) -> None:
        self._check_dtypes(step)
        size = sum([aval.nbytes for aval in avals])
        self._streamed += size
        if size > VALUE_BYTES or self._streamed > self._limits.stream_bytes:
            limit = self._limits.stream_bytes
            raise too_much(size, self._streamed, limit, self.line(step))

    def check_saved(self) -> None:
        limit = self._limits.result_bytes
        if self.saved <= limit:
            return
        rows = sorted(self._saves, key=lambda save: -save[0])[:_SHOWN]
        each = "; ".join([f"{text_of(s.node.name)} {_bytes(size)}" for size, s in rows])
        raise over(
            "result_bytes",
            _bytes(limit),
            f"the graph saves {_bytes(self.saved)}: {each}",
            line=self.line(rows[0][1]),
            fix="save a slice (x[:, -1]), a narrower dtype, or fewer values",
            kind=ResultTooLargeError,
        )

    def leaves(self) -> list[tuple[int, int]]:
        """Bytes of saves, logs and guards, by node."""
        return [*[(step.index, size) for size, step in self._saves], *self._logged]

    # The model's own pass

    def check_pass(self) -> None:
        """Refuses an input so long that one tensor at a site is more than a graph may hold."""
        lasts = {site.invoke: site for site in self.sites}.values()
        largest = max([self._places.largest(last) for last in lasts], default=0)
        if largest > self._limits.memory_bytes:
            raise over(
                "memory_bytes",
                _bytes(self._limits.memory_bytes),
                f"on this input a tensor of the model itself takes {_bytes(largest)}",
                fix="give a smaller input",
            )


def _is_long(call: ModelCall, limits: Limits) -> bool:
    """Whether the model may make something large of this input; then all its sites are looked at.

    Of one number it makes a row of logits, or a row of each pattern: a megabyte at most.
    """
    given = sum([tensor.numel() for tensor in tensors((call.args, dict(call.kwargs)))])
    return given * _ROW > limits.memory_bytes


def _where(graph: Graph, node: Const) -> Any:
    return graph.where[node.at] if node.at < len(graph.where) else None


def _bytes(size: int) -> str:
    return short(size, 1024, "B")


def _list(avals: list[Aval]) -> str:
    return ", ".join(map(repr, avals[:_SHOWN])) or "no tensor"
