"""Operations: what one torch call on values adds to the graph, and what the user gets for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from weft.errors import ReadOnlyError, RecordingError
from weft.graph.check import MAX_INVOKES, RESERVED
from weft.graph.node import DRAWS, STEP_DRAWS, Apply, Call, Name, Param, Ref
from weft.graph.ops import OPS
from weft.kernels.abstract import OUTCOMES, DataDependentError, Outcome, rebuild
from weft.kernels.aval import Aval, dtype_name
from weft.kernels.forms import INDEXED, pinned
from weft.kernels.quick import outcome as abstract_outcome
from weft.signatures.structure import Plain

from . import special
from .arguments import Walk, abstract
from .clients import Client
from .lines import user_line, where
from .value import Family, Value, make

if TYPE_CHECKING:
    from .recorder import Recorder

KINDS = {name: op.kind for name, op in OPS.items()}
Skeleton = Callable[[], torch.nn.Module]
_REMEMBERED = 4096
_FACTORIES = frozenset(("factory", "random_factory"))
_ANSWERED = frozenset(("look", "hint", "asked"))


class Operations:
    """The operations of one recording."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.draws: dict[int, int] = {}  # by the number of their first
        self.seeded = recorder.seed is not None
        self.seeds: dict[int, int] = {}
        """Of invokes with a seed of their own."""

    def record(self, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
        """Records operation `name` of the table; returns what the user sees."""
        kind = KINDS[name]
        if kind in _ANSWERED:
            return self._answer(name, kind, func, args, kwargs)
        if kwargs.get("inplace"):
            return self._inplace(name, func, args, kwargs)
        before = len(self.recorder.nodes)
        walk = Walk(self.recorder, name)
        lowered = tuple([walk.lower(arg) for arg in args])
        lowered_kw = ()
        if kwargs:
            kwargs = self._without_hints(kwargs)
            lowered_kw = tuple([(key, walk.lower(value)) for key, value in kwargs.items()])
            walk.key.append(tuple(kwargs))
        if kind in _FACTORIES and "dtype" not in kwargs:
            walk.key.append(torch.get_default_dtype())
        outcome = self._outcome(name, walk, args, kwargs)
        looked = outcome is None
        if outcome is None:
            outcome = self.recorder.looks.outcome(name, args, kwargs, walk.tensors)
        if kind == "plain" and not outcome.leaves:
            return self._plain(name, outcome, walk)
        if outcome.writes and self._soils(outcome, walk, before):
            return self.record(name, func, args, kwargs)
        if kind in _FACTORIES and "dtype" not in kwargs:  # the default here, not where it runs
            named = Name("dtype", dtype_name(outcome.leaves[0].aval.dtype))
            lowered_kw = (*lowered_kw, ("dtype", named))
        number = len(self.recorder.nodes)
        result = self._commit(name, kind, lowered, lowered_kw, outcome, walk)
        if looked:
            self.recorder.looks.guard_shapes(number, outcome)
        return result

    def _answer(self, name: str, kind: str, func: Any, args: tuple, kwargs: dict) -> Any:
        """A call that leaves no node: numbers are looked at, placement is answered here."""
        if kind == "look":
            return self.recorder.looks.call(func, args, kwargs)
        return args[0] if kind == "hint" else special.ASKED[name](self.recorder.device)

    def _inplace(self, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
        """`F.relu(x, inplace=True)`: the result, copied into the argument."""
        target = args[0]
        result = self.record(name, func, args, {**kwargs, "inplace": False})
        self.record("Tensor.copy_", torch.Tensor.copy_, (target, result), {})
        return target

    def _without_hints(self, kwargs: dict) -> dict:
        if kwargs.get("out") is not None:
            raise self.recorder.refusal(
                "out= cannot be recorded", "use the result that is returned"
            )
        return {
            key: value
            for key, value in kwargs.items()
            if key not in special.HINTS and (value is not None or key not in RESERVED)
        }

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
        if name in INDEXED:
            lent = [lent[0][0], pinned(lent[0][1]), *lent[0][2:]], lent[1]
        try:
            found = abstract_outcome(name, tuple(lent[0]), lent[1])
        except DataDependentError:
            return None
        except RecordingError as error:
            raise self.recorder.at_line(error) from None
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
            self.recorder.bind(value, tuple(chosen))
        return rebuild(outcome.tree, [])

    def _soils(self, outcome: Outcome, walk: Walk, before: int) -> bool:
        """Makes written client tensors dirty; True if the call must be walked anew."""
        targets = [walk.tensors[index] for index in outcome.writes]
        clean = [
            target.tensor
            for target in targets
            if isinstance(target, Client) and not self.recorder.clients.is_dirty(target.tensor)
        ]
        if clean:
            self.recorder.clients.forget(before)
            del self.recorder.nodes[before:]
        for tensor in clean:
            self.recorder.clients.soil(tensor)
        return bool(clean)

    def _commit(
        self,
        name: str,
        kind: str,
        args: tuple,
        kwargs: tuple,
        outcome: Outcome,
        walk: Walk,
    ) -> Any:
        tensors = walk.tensors
        time, latest = _latest(tensors)
        for index in outcome.writes:
            self._check_write(tensors[index]._family, time, latest)
        draw = self._draw() if "random" in kind else None
        at = self.recorder.here()
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
            seed=None if draw is None else self._seed(),
            at=at,
        )
        self.recorder.nodes.append(node)
        number = len(self.recorder.nodes) - 1
        for index in outcome.writes:
            family = tensors[index]._family
            family.time = max(family.time, time)
            family.written = at
            self.recorder.sites.filled(family, at)
        values = self._values(outcome, tensors, number, time, at)
        return rebuild(outcome.tree, values)

    def _draw(self) -> int:
        """The number of the next random draw; without a seed, PyTorch's own generator gives one."""
        if self.recorder.seed is None and self._seed() is None:
            self.recorder.seed = int(torch.randint(2**62, ()))
        first = self._first_draw()
        number = self.draws.get(first, 0)
        self.draws[first] = number + 1
        return first + number

    def _seed(self) -> int | None:
        """That of the invoke, where it has one of its own."""
        return self.seeds.get(self.recorder.invoke) if self.seeds else None  # type: ignore[arg-type]

    def _first_draw(self) -> int:
        """With a seed an invoke draws what it draws alone; without one no two draw the same."""
        invoke, steps = self.recorder.invoke, self.recorder.steps
        first = 0 if steps is None or steps.now is None else steps.first_draw(steps.now)
        if self.recorder.replayed is not None:
            first += (DRAWS if steps is None else STEP_DRAWS) // 4  # so the block's own stay
        if self._seed() is not None:  # as in a block of its own; apart from all others
            return (MAX_INVOKES + (invoke or 0)) * DRAWS + first
        if not self.seeded:
            return first
        if steps is not None and invoke is not None:
            return invoke * DRAWS + first
        return DRAWS // 2 if invoke is None else invoke * DRAWS + first

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
            values.append(make(self.recorder, ref, leaf.aval, family, time, at))
        return values

    def _check_write(self, family: Family, time: int, latest: Any) -> None:
        if family.readonly is not None:
            raise ReadOnlyError(
                f"{family.readonly} is a weight of the model; a block cannot change it",
                line=where(user_line()),
                fix="work on a .clone() of it, or edit the module's output",
            )
        self.recorder.sites.check_writable(family, time, latest)

    def param(self, path: str, aval: Aval) -> Value:
        """A weight or buffer of the model, read-only."""
        at = self.recorder.here()
        dtype = dtype_name(aval.dtype)
        ref = self.recorder.append(Param(path=path, shape=tuple(aval.shape), dtype=dtype, at=at))
        family = Family(ref, -1, at)
        family.readonly = path
        return make(self.recorder, ref, aval, family, -1, at)

    def apply(self, path: str, module: Skeleton, args: tuple, kwargs: dict) -> Any:
        """Runs one of the model's own modules on given values; fires no site."""
        if not path and self.recorder.root is not None:
            raise self.recorder.refusal(
                f"the model itself was called in a block of its method {self.recorder.root!r}",
                "call one of its modules, or open a block without fn=",
            )
        walk = Walk(self.recorder, path)
        lowered = tuple([walk.lower(arg) for arg in args])
        lowered_kw = tuple([(key, walk.lower(value)) for key, value in kwargs.items()])
        walk.key.append(tuple(kwargs))
        shape, types = self._applied(path, module, walk, args, kwargs)
        time, _ = _latest(walk.tensors)
        at = self.recorder.here()
        node = Apply(
            path=path,
            args=lowered,
            kwargs=lowered_kw,
            outs=len(types),
            types=types,
            grad=torch.is_grad_enabled(),
            at=at,
        )
        number = self.recorder.append(node).node
        values, out = [], 0
        for _, what in shape.leaves:
            if isinstance(what, Aval):
                one = Ref(number, out)
                values.append(make(self.recorder, one, what, Family(one, time, at), time, at))
                out += 1
            else:
                values.append(what.value if isinstance(what, Plain) else None)
        return shape.rebuild(values)

    def _applied(
        self,
        path: str,
        module: Callable[[], torch.nn.Module],
        walk: Walk,
        args: tuple,
        kwargs: dict,
    ) -> tuple[Any, tuple]:
        """What a module gives for such arguments: its signature, and the types of its tensors."""
        signature = self.recorder.signature
        if signature is None:
            raise self.recorder.refusal(
                f"{path} was applied before the block's first invoke",
                "apply it in a `with tracer.invoke(prompt):`, or after the first one",
            )
        key = tuple(walk.key)
        found = signature.applied.get(key)
        if found is None:
            tensors = iter([tensor._aval for tensor in walk.tensors])
            given = abstract(list(args), tensors), abstract(kwargs, tensors)
            shape = signature.apply(module(), path, tuple(given[0]), given[1])
            avals = [what for _, what in shape.leaves if isinstance(what, Aval)]
            found = shape, tuple([(dtype_name(a.dtype), tuple(a.shape)) for a in avals])
            if len(signature.applied) > _REMEMBERED:
                signature.applied.clear()
            signature.applied[key] = found
        return found


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
