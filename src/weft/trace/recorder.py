"""The recorder: operations on `Value`s in one block become the nodes of one graph.

    recorder = Recorder(signature, run_prefix=..., device=...)
    with recorder:                        # binds it to this thread and task
        h = recorder.read("h.5", "output")
        (h * 2).save()
    graph, constants = recorder.freeze()
    recorder.deliver({"line 3": tensor})  # handles become plain tensors

It runs nothing. Where a number is needed while recording (`if h.norm() > 10`), the backend's
`run_prefix(graph, constants)` gets the graph so far. See `looks`, `clients`, `sites`, `saves` for
the parts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from weft.errors import (
    FailedRunError,
    NotSavedError,
    OutsideTraceError,
    ReadOnlyError,
    RecordingError,
    UnsupportedOperationError,
)
from weft.graph.node import AnyNode, Apply, Bound, Call, Graph, Log, Param, Ref
from weft.graph.ops import OPS
from weft.graph.site import Where
from weft.kernels.abstract import OUTCOMES, DataDependentError, Outcome, rebuild
from weft.kernels.aval import Aval, dtype_name
from weft.kernels.quick import outcome as abstract_outcome
from weft.kernels.table import NAMES, reason

from . import special
from .arguments import Walk, abstract, has
from .clients import Client, Clients
from .current import CURRENT, enter_watch, leave_watch
from .lines import frames_within, user_line, where
from .looks import Looks
from .saves import Saves
from .sites import Sites
from .structure import Plain
from .value import Family, Sizes, Value, make, short

if TYPE_CHECKING:
    from .signature import Signature

_ANSWERED = frozenset(("look", "hint", "asked"))
_TO_CALL = {name: op.kind for name, op in OPS.items()}
FACTORIES = frozenset(func for func, name in NAMES.items() if "factory" in _TO_CALL[name])

RunPrefix = Callable[[Graph, dict[str, torch.Tensor]], dict[str, torch.Tensor]]


class Recorder:
    """Records one block. `device` is where results will live."""

    def __init__(
        self,
        signature: Signature,
        *,
        run_prefix: RunPrefix | None = None,
        device: torch.device | None = None,
        was_tuple: frozenset[str] = frozenset(),
        seed: int | None = None,
        owner: object = None,
    ) -> None:
        self.signature = signature
        self.device = device or torch.device("cpu")
        self.was_tuple = was_tuple
        self.seed = seed
        self.owner = owner
        self.open = False
        self.entered = False
        self.failure: BaseException | str | None = None
        self.nodes: list[AnyNode] = []
        self.lines: dict[tuple[str, int], int] = {}
        self.bounds: dict[tuple[Ref, int], Bound] = {}
        self.edits: list[tuple[int, int]] = []
        self.draws = 0
        self.clients = Clients(self)
        self.sites = Sites(self)
        self.looks = Looks(self, run_prefix)
        self.saves = Saves(self)

    # -- the block ---------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        if CURRENT.get() is not None:
            raise RecordingError(
                "a block was opened inside another block",
                line=where(user_line()),
                fix="close the outer block first; a saved tensor can be used in the next one",
            )
        if self.entered:
            raise self.refusal("a block was opened a second time", "call model.trace(...) again")
        self.entered = True
        self.thread = threading.get_ident()
        self._token = CURRENT.set(self)
        self.open = True
        enter_watch()
        return self

    def __exit__(self, *exc: object) -> None:
        leave_watch()
        CURRENT.reset(self._token)
        self.open = False

    # -- nodes and lines ---------------------------------------------------------------------

    def append(self, node: AnyNode) -> Ref:
        """Adds a node; returns the reference to its first result."""
        self.nodes.append(node)
        return Ref(len(self.nodes) - 1)

    def line(self) -> tuple[str, int]:
        return user_line()

    def here(self) -> int:
        """The index of the user's current line."""
        line = user_line()
        found = self.lines.get(line)
        if found is None:
            found = self.lines[line] = len(self.lines)
        return found

    def line_of(self, at: int) -> tuple[str, int]:
        return list(self.lines)[at]

    def refusal(self, message: str, fix: str) -> RecordingError:
        return RecordingError(message, line=where(user_line()), fix=fix)

    # -- operations --------------------------------------------------------------------------

    def observe(self, func: Any, types: Any, args: tuple, kwargs: dict) -> Any:
        """A torch call seen by the mode: ours if it holds a value, a dirty tensor or `Sizes`."""
        if Value in types:
            return self.dispatch(func, args, kwargs)
        if func in special.HOLDS_LISTS and has(Value, args):
            return self.dispatch(func, args, kwargs)
        if func in FACTORIES and self._own_task() and has(Sizes, (args, kwargs)):
            return self.dispatch(func, args, kwargs)
        if self.clients.dirty and self._touches_dirty(args, kwargs):
            return self.dispatch(func, args, kwargs)
        return func(*args, **kwargs)

    def dispatch(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """One torch call that concerns this recorder."""
        if not self.open:
            return self._after(func, args, kwargs)
        if threading.get_ident() != self.thread:
            raise OutsideTraceError(
                "a value was used on another thread than the one that records the block",
                line=where(user_line()),
                fix="open a block of its own on each thread",
            )
        self._refuse_transforms()
        handler = special.HANDLERS.get(func)
        if handler is not None:
            return handler(self, func, args, kwargs)
        name = NAMES.get(func)
        if name is None:
            raise self._unsupported(func)
        return self.record(name, func, args, kwargs)

    def record(self, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
        """Records operation `name` of the table; returns what the user sees."""
        kind = _TO_CALL[name]
        if kind in _ANSWERED:
            return self._answer(name, kind, func, args, kwargs)
        before = len(self.nodes)
        walk = Walk(self, name)
        lowered = tuple([walk.lower(arg) for arg in args])
        lowered_kw = ()
        if kwargs:
            kwargs = self._without_hints(kwargs)
            lowered_kw = tuple([(key, walk.lower(value)) for key, value in kwargs.items()])
            walk.key.append(tuple(kwargs))
        outcome = self._outcome(name, walk, args, kwargs)
        if outcome is None:
            return self.looks.shapes(name, args, kwargs, lowered, lowered_kw, walk.tensors)
        if kind == "plain" and not outcome.leaves:
            return self._plain(name, outcome, walk)
        if outcome.writes and self._soils(outcome, walk, before):
            return self.record(name, func, args, kwargs)
        return self._commit(name, kind, lowered, lowered_kw, outcome, walk, args)

    def _answer(self, name: str, kind: str, func: Any, args: tuple, kwargs: dict) -> Any:
        """A call that leaves no node: numbers are looked at, placement is answered here."""
        if kind == "look":
            return self.looks.call(func, args, kwargs)
        return args[0] if kind == "hint" else special.ASKED[name](self.device)

    def _without_hints(self, kwargs: dict) -> dict:
        if kwargs.get("out") is not None:
            raise self.refusal("out= cannot be recorded", "use the result that is returned")
        return {key: value for key, value in kwargs.items() if key not in special.HINTS}

    def _outcome(self, name: str, walk: Walk, args: tuple, kwargs: dict) -> Outcome | None:
        """The abstract result, cached; None where its shape depends on numbers."""
        try:
            key = tuple(walk.key)
            found = OUTCOMES.get(key)
        except TypeError:
            key, found = None, None
        if found is not None:
            return found
        tensors = iter([tensor._aval for tensor in walk.tensors])
        lent = abstract(list(args), tensors), abstract(kwargs, tensors)
        try:
            found = abstract_outcome(name, tuple(lent[0]), lent[1])
        except DataDependentError:
            return None
        except UnsupportedOperationError as error:
            raise self._at_line(error) from None
        if key is not None:
            OUTCOMES.put(key, found)
        return found

    def _plain(self, name: str, outcome: Outcome, walk: Walk) -> Any:
        """An answer that needs no tensor: sizes bind the graph."""
        value = walk.tensors[0]
        if isinstance(value, Value) and name in special.SIZE_READS:
            dims = range(len(value._aval.shape))
            which = [arg for arg in walk.key[2:] if type(arg) is int]
            if name == "Tensor.size" and not which:
                return value.shape
            chosen = [dims[which[-1]]] if name == "Tensor.size" and which else list(dims)
            self.bind(value, tuple(chosen))
        return rebuild(outcome.tree, [])

    def _soils(self, outcome: Outcome, walk: Walk, before: int) -> bool:
        """Makes written client tensors dirty; True if the call must be walked anew."""
        targets = [walk.tensors[index] for index in outcome.writes]
        clean = [
            target.tensor
            for target in targets
            if isinstance(target, Client) and not self.clients.is_dirty(target.tensor)
        ]
        if clean:
            self.clients.forget(before)
            del self.nodes[before:]
        for tensor in clean:
            self.clients.soil(tensor)
        return bool(clean)

    def _commit(
        self,
        name: str,
        kind: str,
        args: tuple,
        kwargs: tuple,
        outcome: Outcome,
        walk: Walk,
        given: tuple,
    ) -> Any:
        tensors = walk.tensors
        time, latest = _latest(tensors)
        for index in outcome.writes:
            self._check_write(tensors[index]._family, time, latest)
        draw = self._draw() if "random" in kind else None
        at = self.here()
        leaves = outcome.leaves
        alias = tuple([None if o.alias is None else tensors[o.alias]._ref for o in leaves])
        node = Call(
            op=name,
            args=args,
            kwargs=kwargs,
            outs=len(leaves),
            alias=alias if any(alias) else (),
            writes=tuple([tensors[index]._ref for index in outcome.writes]),
            draw=draw,
            grad=torch.is_grad_enabled(),
            at=at,
        )
        self.nodes.append(node)
        number = len(self.nodes) - 1
        for index in outcome.writes:
            family = tensors[index]._family
            family.time = max(family.time, time)
            family.written = at
            self.sites.filled(family, at)
        values = self._values(outcome, tensors, number, time, at)
        return rebuild(outcome.tree, values)

    def _draw(self) -> int:
        """The number of the next random draw; without a seed, PyTorch's own generator gives one."""
        if self.seed is None:
            self.seed = int(torch.randint(2**62, ()))
        self.draws += 1
        return self.draws - 1

    def _values(
        self, outcome: Outcome, tensors: list, number: int, time: int, at: int
    ) -> list[Any]:
        values = []
        for out, leaf in enumerate(outcome.leaves):
            if leaf.same is not None:
                values.append(_original(tensors[leaf.same]))
                continue
            ref = Ref(number, out)
            family = Family(ref, time, at) if leaf.alias is None else tensors[leaf.alias]._family
            values.append(make(self, ref, leaf.aval, family, time, at))
        return values

    def _check_write(self, family: Family, time: int, latest: Any) -> None:
        if family.readonly is not None:
            raise ReadOnlyError(
                f"{family.readonly} is a weight of the model; a block cannot change it",
                line=where(user_line()),
                fix="work on a .clone() of it, or edit the module's output",
            )
        self.sites.check_writable(family, time, latest)

    # -- sites, weights, modules -------------------------------------------------------------

    def read(self, path: str, port: str, call: int | None = None) -> Any:
        """What a site holds (`port` is `input`, `inputs` or `output`), as handles."""
        if port == "input":
            return self.sites.read_leaf(self._input(path, call))
        state = self.sites.state(path, port, call)
        got = self.sites.read(state)
        if path in self.was_tuple and isinstance(got, Value) and port == "output":
            got._bare = path
        return got

    def write(self, path: str, port: str, value: Any, call: int | None = None) -> None:
        """`module.<port> = value`."""
        if port == "input":
            self.sites.write_leaf(self._input(path, call), value)
        else:
            self.sites.write(self.sites.state(path, port, call), value)

    def _input(self, path: str, call: int | None) -> Any:
        state = self.sites.state(path, "inputs", call)
        first = state.first()
        if first is None:
            raise self.refusal(f"{path} has no tensor among its inputs", "use .inputs")
        return state.tensors[first]

    def param(self, path: str, aval: Aval) -> Value:
        """A weight or buffer of the model, read-only."""
        at = self.here()
        dtype = dtype_name(aval.dtype)
        ref = self.append(Param(path=path, shape=tuple(aval.shape), dtype=dtype, at=at))
        family = Family(ref, -1, at)
        family.readonly = path
        return make(self, ref, aval, family, -1, at)

    def apply(self, path: str, module: Any, args: tuple, kwargs: dict) -> Any:
        """Runs one of the model's own modules on given values; fires no site."""
        walk = Walk(self, path)
        lowered = tuple([walk.lower(arg) for arg in args])
        lowered_kw = tuple([(key, walk.lower(value)) for key, value in kwargs.items()])
        tensors = iter([tensor._aval for tensor in walk.tensors])
        given = abstract(list(args), tensors), abstract(kwargs, tensors)
        shape = self.signature.apply(module, path, tuple(given[0]), given[1])
        time, _ = _latest(walk.tensors)
        at = self.here()
        avals = [what for _, what in shape.leaves if isinstance(what, Aval)]
        node = Apply(
            path=path,
            args=lowered,
            kwargs=lowered_kw,
            outs=len(avals),
            types=tuple([(dtype_name(a.dtype), tuple(a.shape)) for a in avals]),
            grad=torch.is_grad_enabled(),
            at=at,
        )
        ref = self.append(node)
        values, out = [], 0
        for _, what in shape.leaves:
            if isinstance(what, Aval):
                one = Ref(ref.node, out)
                values.append(make(self, one, what, Family(one, time, at), time, at))
                out += 1
            else:
                values.append(what.value if isinstance(what, Plain) else None)
        return shape.rebuild(values)

    # -- what values ask ---------------------------------------------------------------------

    def bind(self, value: Value, dims: tuple[int, ...]) -> None:
        """The recording read sizes of `value` as numbers."""
        if value._time < 0 or not self.open:
            return
        for dim in dims:
            key = (value._ref, dim)
            if key not in self.bounds:
                size = int(value._aval.shape[dim])
                self.bounds[key] = Bound(value._ref, dim, size, self.here())

    def handle(self, value: Value) -> Value:
        """Another handle on the same result."""
        return make(self, value._ref, value._aval, value._family, value._time, value._at)

    def number(self, value: torch.Tensor) -> torch.Tensor:
        """The tensor behind `value` now, by a look where it has none yet."""
        if isinstance(value, Value):
            return self.looks.tensor(value)
        return value

    def save_value(self, value: Value, name: str | None) -> Any:
        if not self.open:
            if value._real is not None:
                return value
            raise self._ended(value)
        return self.saves.value(value, name)

    def log(self, parts: tuple) -> None:
        """Prints `parts` when they exist."""
        walk = Walk(self, "log")
        self.append(Log(parts=tuple([walk.lower(part) for part in parts]), at=self.here()))

    def describe(self, value: Value) -> str:
        node = self.nodes[value._ref.node]
        origin = str(
            getattr(node, "site", "") or getattr(node, "op", "") or node.__class__.__name__
        )
        state = "" if self.open else " (not saved)"
        return f"{short(value._aval)} from {origin}{state}, {where(self.line_of(value._at))}"

    # -- the end -----------------------------------------------------------------------------

    def freeze(self) -> tuple[Graph, dict[str, torch.Tensor]]:
        """The finished graph and its constants. Call once, when the block has been left."""
        self.clients.check()
        self.saves.close()
        return self.graph(), self.clients.constants

    def graph(self, extra: tuple = ()) -> Graph:
        """The graph so far, with `extra` nodes."""
        lines = tuple([where(line) for line in self.lines])
        bounds = tuple(self.bounds.values())
        nodes = (*self.nodes, *extra)
        return Graph(nodes=nodes, where=lines, bounds=bounds, seed=self.seed)

    def unused_edits(self) -> list[Where]:
        """Lines of edits at sites that fire after all that is brought back."""
        last = max((self.saves.time, self.looks.index))
        return [where(self.line_of(at)) for index, at in self.edits if index > last]

    def deliver(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Turns saved handles into the plain tensors of `saved`; returns results by name."""
        self.looks.run_prefix = None  # leads to the tracer, and with it to its results
        return self.saves.deliver(saved)

    def fail(self, cause: BaseException | str) -> None:
        """Marks every handle as never filled."""
        self.failure = cause

    # -- refusals ----------------------------------------------------------------------------

    def _after(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """A torch call on handles of a block that has ended."""
        reals = special.forward(args), special.forward(kwargs)
        left = special.find_unreal(reals)
        if left is not None:
            raise left._rec._ended(left)
        return func(*reals[0], **reals[1])

    def _ended(self, value: Value) -> Exception:
        made = where(self.line_of(value._at))
        if self.failure is not None:
            return FailedRunError(
                f"this value has no numbers, because its block did not finish: {self.failure}",
                line=made,
                fix="mend the cause and run the block again",
            )
        return NotSavedError(
            "this value was used after its block, but it was not saved",
            line=made,
            fix="add .save() to it in the block",
        )

    def own(self, value: Value) -> Any:
        """`value` as this block may use it: the tensor, where an earlier block has filled it."""
        if value._rec is self:
            return value
        if value._real is None:
            raise self._foreign(value)
        return value._real

    def _foreign(self, value: Value) -> Exception:
        other = value._rec
        if not other.open:
            return other._ended(value)
        return self.refusal("a value of another open block was used", "save it there first")

    def _unsupported(self, func: Any) -> Exception:
        shown = getattr(func, "__qualname__", None) or getattr(func, "__name__", repr(func))
        why = reason(func) or "it is not in the operation table"
        return UnsupportedOperationError(
            f"{shown} cannot be recorded: {why}",
            line=where(user_line()),
            fix="use another operation, or save the value and go on after the block",
        )

    def _at_line(self, error: UnsupportedOperationError) -> Exception:
        """A refusal of the kernels, which know no lines, with the user's."""
        return UnsupportedOperationError(error.message, line=where(user_line()), fix=error.fix)

    def _refuse_transforms(self) -> None:
        what = special.active_transform()
        if what is None and not torch.is_grad_enabled() and frames_within("utils/checkpoint.py"):
            what = "torch.utils.checkpoint"
        if what is not None:
            raise self.refusal(
                f"{what} cannot be recorded: it would act on the recording, not on the numbers",
                "call the function directly in the block, or use the saved tensor after it",
            )

    def _own_task(self) -> bool:
        return threading.get_ident() == self.thread

    def _touches_dirty(self, args: tuple, kwargs: dict) -> bool:
        found: list[torch.Tensor] = []
        special.tensors_in((args, kwargs), found)
        return any(self.clients.is_dirty(tensor) for tensor in found)


def _latest(tensors: list) -> tuple[int, Any]:
    """When all of `tensors` exist, and the last of them."""
    time, latest = -1, None
    for tensor in tensors:
        one = max(tensor._time, tensor._family.time)
        if one > time or latest is None:
            time, latest = one, tensor
    return time, latest


def _original(tensor: Any) -> Any:
    return tensor.tensor if isinstance(tensor, Client) else tensor
