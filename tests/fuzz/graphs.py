"""Random graphs that are mostly admitted: what a diligent user could have recorded.

    maker = Maker(target, random.Random(7))
    graph, frames = maker.make()

Each is a walk through the model's sites with calls of any operation of the table between them, in
place and views too, on what was read, on weights, on constants and on each other's results.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
import torch

from tests.fuzz.samples import samples
from tests.fuzz.targets import Target
from tests.kernels.opdb import Sample
from tests.run.graphs import Builder, _lowered
from weft.engine.outcomes import outcome_of
from weft.graph.frame import Frame
from weft.graph.node import (
    Apply,
    Call,
    Complex,
    Const,
    Fill,
    Graph,
    Read,
    Ref,
    Save,
    Write,
    inputs_of,
)
from weft.graph.ops import EFFECTS, OPS, RANDOM
from weft.graph.site import Leaf, Site, Where
from weft.kernels.abstract import DataDependentError, flatten
from weft.kernels.aval import Aval, aval_of, dtype_name
from weft.kernels.execute import call
from weft.kernels.frames import to_frame

STEPS = 3, 14
"""How long a walk is."""
FROM_MODEL = 0.6
"""How often an argument is made of what there is, not a constant."""
NUMBERS = (torch.float32, torch.int64, torch.bool, torch.complex64)


@dataclass(frozen=True)
class Value:
    """A tensor of the graph. `site` and `leaf`: where it was read, of a read itself."""

    ref: Ref
    aval: Aval
    weight: bool = False
    site: Site | None = None
    leaf: Leaf = ()


class Maker:
    """Makes graphs for one target, each another."""

    def __init__(self, target: Target, chance: random.Random) -> None:
        self._target = target
        self._chance = chance
        self._samples = samples()

    def make(self) -> tuple[Graph, dict[str, Frame]]:
        """One graph and its constants, not checked."""
        self._g = Builder(seed=self._chance.randrange(1000))
        self._numbers = torch.Generator().manual_seed(self._chance.randrange(1000))
        self._pool: list[Value] = []
        self._at = 0
        self._draws = 0
        self._read()
        for _ in range(self._chance.randint(*STEPS)):
            self._step()
        if self._chance.random() < 0.3:
            self._differentiate()
        self._save()
        kept = {node.key for node in self._g.nodes if isinstance(node, Const)}
        constants = {key: self._g.constants[key] for key in kept}
        frames = {key: to_frame(tensor) for key, tensor in sorted(constants.items())}
        where = tuple([Where("user.py", line) for line in range(len(self._g.nodes))])
        return Graph(tuple(self._g.nodes), where, (), self._g.seed), frames

    def _step(self) -> None:
        """One more thing. What the operations themselves refuse is left out."""
        chances = {
            self._read: 2,
            self._operate: 8,
            self._edit: 2,
            self._replace: 1,
            self._take_weight: 1,
            self._apply: 1,
            self._log: 0.3,
        }
        (act,) = self._chance.choices(list(chances), list(chances.values()))
        before = len(self._g.nodes)
        try:
            act()
        except Exception:  # noqa: BLE001 (torch's own refusals of arguments have no common class)
            del self._g.nodes[before:]
            self._pool = [value for value in self._pool if value.ref.node < before]

    # -- the model -----------------------------------------------------------------------------

    def _read(self) -> None:
        """Reads a site that fires later than those before, nearly always."""
        late = self._chance.random() < 0.97
        sites = self._target.sites
        span = range(self._at if late else 0, len(sites))
        place = self._chance.choice([n for n in span if n < self._at + 6] or [self._at])
        self._at = max(self._at, place)
        path, port, call = sites[place]
        signature = self._target.signature.site(path, port, call)
        leaf, aval = self._chance.choice(signature.tensors)
        site = Site(path, port, call)
        shape, dtype = tuple(aval.shape), dtype_name(aval.dtype)
        ref = self._g.add(Read, site=site, leaf=leaf, shape=shape, dtype=dtype)
        self._pool.append(Value(ref, aval, site=site, leaf=leaf))

    def _edit(self) -> None:
        """Changes what was read last in place, or a view of it, and puts it back."""
        read = self._last_read()
        if not read.aval.dtype.is_floating_point and self._chance.random() < 0.9:
            return  # most of what is done in place makes fractions
        part = read
        if self._chance.random() < 0.5 and read.aval.shape:
            dim = self._chance.randrange(len(read.aval.shape))
            (part,) = self._emit(
                "select", (read, dim, self._chance.randrange(read.aval.shape[dim]))
            )
        sample = self._sample(self._chance.choice(_names(writing=True)))
        rest = [self._given(arg) for arg in sample.args[1:]]
        if self._chance.random() < 0.7:
            self._emit("Tensor.mul_", (part, self._chance.choice([0.5, -1.0, 2.0])))
        else:
            self._emit(sample.name, (part, *rest), sample.kwargs)
        self._g.add(Fill, site=read.site, leaf=read.leaf, value=read.ref)

    def _last_read(self) -> Value:
        return next(value for value in reversed(self._pool) if value.site is not None)

    def _replace(self) -> None:
        """Writes something of the right shape to the site that was read last."""
        read = self._last_read()
        value = self._shaped(tuple(read.aval.shape), read.aval.dtype)
        self._g.add(Write, site=read.site, leaf=read.leaf, value=value.ref)

    def _take_weight(self) -> None:
        path, weight = self._chance.choice(self._target.weights)
        ref = self._g.param(path, weight)
        self._pool.append(Value(ref, aval_of(weight.detach()), weight=True))

    def _apply(self) -> None:
        path, module = self._chance.choice(self._target.modules)
        if isinstance(module, torch.nn.Embedding):
            given = self._constant(torch.tensor([[1, 2], [0, 3]]))
        else:
            width = module.weight.shape[-1]
            given = self._shaped((self._chance.randint(1, 3), width), torch.float32)
        found = self._target.signature.apply(module, path, (given.aval.meta,), {})
        types = tuple((dtype_name(a.dtype), tuple(a.shape)) for a in _avals(found))
        ref = self._g.add(Apply, path=path, args=(given.ref,), outs=len(types), types=types)
        for out, aval in enumerate(_avals(found)):
            self._pool.append(Value(Ref(ref.node, out), aval))

    def _differentiate(self) -> None:
        """Gradients of a sum with respect to what was read and made before."""
        able = [v for v in self._pool if v.aval.dtype is torch.float32 and not v.weight]
        if not able:
            return
        loss = self._chance.choice(able[-4:])
        (total,) = self._emit("sum", (loss,))
        before = self._behind(total.ref)
        able = [value for value in able if value.ref.node in before]
        since = tuple([value.site for value in able if value.site is not None][:1])
        backward = self._g.backward(total.ref, since=since)
        for value in self._chance.sample(able, min(2, len(able))):
            ref = self._g.grad(backward, value.ref, zeros=True)
            self._pool.append(Value(ref, value.aval))

    def _behind(self, ref: Ref) -> set[int]:
        """The nodes that a result is made of."""
        found: set[int] = set()
        waiting = [ref.node]
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += [one.node for one in inputs_of(self._g.nodes[node])]
        return found

    def _log(self) -> None:
        self._g.log("here", self._chance.choice(self._pool).ref)

    def _save(self) -> None:
        for number in range(self._chance.randint(1, 4)):
            value = self._chance.choice(self._pool).ref
            self._g.add(Save, name=f"s{number}", value=value)

    # -- operations ----------------------------------------------------------------------------

    def _operate(self) -> None:
        sample = self._sample(self._chance.choice(_names()))
        args = tuple([self._given(arg) for arg in sample.args])
        kwargs = {name: self._given(arg) for name, arg in sample.kwargs.items()}
        writes = OPS[sample.name].kind in EFFECTS
        if writes and type(args[0]) is Value and args[0].weight and self._chance.random() < 0.9:
            args = (*self._emit("clone", (args[0],)), *args[1:])  # else it has to be refused
        self._emit(sample.name, args, kwargs)

    def _sample(self, name: str) -> Sample:
        return self._chance.choice(self._samples[name])

    def _given(self, arg: Any) -> Any:
        """An argument of a sample with values in place of tensors."""
        if isinstance(arg, torch.Tensor):
            shape = tuple(arg.shape)
            if arg.dtype is torch.float32 and self._chance.random() < FROM_MODEL:
                return self._shaped(shape, arg.dtype)
            return self._constant(arg)
        if type(arg) in (tuple, list):
            return type(arg)(self._given(item) for item in arg)
        if isinstance(arg, dict):
            return {key: self._given(value) for key, value in arg.items()}
        if isinstance(arg, slice):
            return slice(*(self._given(part) for part in (arg.start, arg.stop, arg.step)))
        return arg

    def _constant(self, tensor: torch.Tensor) -> Value:
        tensor = tensor.detach().resolve_conj().resolve_neg().contiguous().clone()
        return Value(self._g.const(tensor), aval_of(tensor))

    def _shaped(self, shape: tuple[int, ...], dtype: torch.dtype) -> Value:
        """A value of that shape: what there is, as it is or cut to it, or a constant."""
        able = [v for v in self._pool if v.aval.dtype is dtype]
        same = [v for v in able if tuple(v.aval.shape) == shape]
        if same and self._chance.random() < 0.7:
            return self._chance.choice(same)
        count = math.prod(shape)
        able = [v for v in able if math.prod(v.aval.shape) >= count > 0]
        if not able:
            return self._constant(torch.randn(shape, generator=self._numbers).to(dtype))
        value = self._chance.choice(able)
        (value,) = self._emit("reshape", (value, (-1,)))
        (value,) = self._emit("narrow", (value, 0, 0, count))
        (value,) = self._emit("reshape", (value, shape))
        return value

    def _emit(self, name: str, args: tuple[Any, ...], kwargs: Any = None) -> list[Value]:
        """Adds a call, as the recorder would have written it."""
        kwargs = kwargs or {}
        try:
            outcome = outcome_of(name, _as(args, _aval), _as(kwargs, _aval))
        except DataDependentError:
            self._emit_unknown(name, args, kwargs)
            return []
        given = [v for v in _leaves((args, kwargs)) if type(v) is Value]
        alias = [None if leaf.alias is None else given[leaf.alias].ref for leaf in outcome.leaves]
        self._draws += OPS[name].kind in RANDOM
        ref = self._g.add(
            Call,
            op=name,
            **_lowered(_as(args, _ref), _as(kwargs, _ref)),
            outs=len(outcome.leaves),
            alias=tuple(alias) if any(alias) else (),
            writes=tuple(given[place].ref for place in outcome.writes),
            draw=self._draws if OPS[name].kind in RANDOM else None,
        )
        msgspec.to_builtins(self._g.nodes[-1])  # what is no data is left out
        found = [
            Value(
                Ref(ref.node, out),
                leaf.aval,
                weight=leaf.alias is not None and given[leaf.alias].weight,
            )
            for out, leaf in enumerate(outcome.leaves)
        ]
        self._pool += found
        return found

    def _emit_unknown(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call whose results have shapes that only numbers tell: of constants, with guards."""
        found = flatten(call(name, _as(args, self._number), _as(kwargs, self._number)))
        lowered = _lowered(_as(args, _ref), _as(kwargs, _ref))
        ref = self._g.add(Call, op=name, **lowered, outs=len(found))
        msgspec.to_builtins(self._g.nodes[-1])
        for out, tensor in enumerate(found):
            self._g.guard(Ref(ref.node, out), tuple(tensor.shape), "shape")
        self._pool += [Value(Ref(ref.node, out), aval_of(one)) for out, one in enumerate(found)]

    def _number(self, value: Value) -> torch.Tensor:
        """The numbers of a constant. Raises KeyError for anything else."""
        node = self._g.nodes[value.ref.node]
        return self._g.constants[getattr(node, "key", "")]


@cache
def _names(writing: bool = False) -> list[str]:
    """The operations, or those in place."""
    return [one for one in sorted(samples()) if not writing or OPS[one].kind in EFFECTS]


def _avals(result: Any) -> list[Aval]:
    return [leaf for leaf in result.leaves if type(leaf) is Aval]


def _aval(value: Value) -> Aval:
    return value.aval


def _ref(value: Any) -> Any:
    return Complex(value.real, value.imag) if type(value) is complex else value.ref


def _as(arg: Any, what: Any) -> Any:
    """A structure with something else in place of each value."""
    if type(arg) is Value or (type(arg) is complex and what is _ref):
        return what(arg)
    if type(arg) in (tuple, list):
        return type(arg)(_as(item, what) for item in arg)
    if isinstance(arg, dict):
        return {key: _as(value, what) for key, value in arg.items()}
    if isinstance(arg, slice):
        return slice(*(_as(part, what) for part in (arg.start, arg.stop, arg.step)))
    return arg


def _leaves(arg: Any) -> list[Any]:
    """What is in a structure, in flattening order."""
    if isinstance(arg, dict):
        arg = tuple(arg.values())
    elif isinstance(arg, slice):
        arg = (arg.start, arg.stop, arg.step)
    elif not isinstance(arg, (tuple, list)):
        return [arg]
    return [leaf for item in arg for leaf in _leaves(item)]
