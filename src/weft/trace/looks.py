"""Looks: a number that the block needs while it is being recorded.

The graph recorded so far runs until the wanted value is known, the number is handed over, and
recording goes on. Each look leaves a `Guard`: a later run in which it comes out differently fails.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from weft.errors import LookError
from weft.graph.node import Arg, Call, Guard, Name, Ref, Save, Seq
from weft.kernels.abstract import flatten
from weft.kernels.aval import aval_of
from weft.kernels.execute import call as execute

from . import special
from .arguments import abstract
from .lines import user_line, where
from .value import Family, Value, make

if TYPE_CHECKING:
    from .recorder import Recorder, RunPrefix

_SMALL = 64


class Looks:
    """The looks of one recording. `index` and `at` tell the latest site looked at, and its line."""

    def __init__(self, recorder: Recorder, run_prefix: RunPrefix | None) -> None:
        self.recorder = recorder
        self.run_prefix = run_prefix
        self.index = -1
        self.at = 0

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """A torch function that answers with numbers (`item`, `bool`, `equal`, ...)."""
        tensors: list[torch.Tensor] = []
        special.tensors_in((args, kwargs), tensors)
        reals = iter([self.tensor(one) for one in tensors])
        lent = abstract(list(args), reals), abstract(kwargs, reals)
        return func(*lent[0], **lent[1])

    def tensor(self, value: Any) -> torch.Tensor:
        """The numbers of one value, with a guard on them."""
        if isinstance(value, Value):
            value = self.recorder.own(value)
        if not isinstance(value, Value):
            client = self.recorder.clients
            if not client.is_dirty(value):
                return value
            value = client.use(value)
        real = self._fetch([value])[0]
        self._guard(value, real)
        return real

    def _fetch(self, values: list) -> list[torch.Tensor]:
        """Runs the graph recorded so far; returns the numbers of `values`."""
        recorder = self.recorder
        if self.run_prefix is None:
            raise LookError(
                "a number is needed here, and this block does not run",
                line=where(user_line()),
                fix="keep the branch in the graph with torch.where, or use model.trace",
            )
        at = recorder.here()
        saves = tuple([Save(name=str(i), value=v._ref, at=at) for i, v in enumerate(values)])
        got = self.run_prefix(recorder.graph(saves), recorder.clients.constants)
        time = max(max(v._time, v._family.time) for v in values)
        if time > self.index:
            self.index, self.at = time, at
        return [got[str(i)] for i in range(len(values))]

    def _guard(self, value: Any, real: torch.Tensor) -> None:
        recorder = self.recorder
        if real.numel() <= _SMALL:
            node = Guard(value=value._ref, expected=_plain(real.tolist()), at=recorder.here())
            recorder.append(node)
            return
        rtol = 1e-5 if real.dtype in (torch.float32, torch.float64) else 1e-2
        scale = float(real.abs().max()) if real.dtype.is_floating_point else 0.0
        handle: Any = recorder.handle(value)
        close: Any = torch.isclose(handle, real.clone(), rtol=0.0, atol=rtol * scale, equal_nan=True)
        recorder.append(Guard(value=close.all()._ref, expected=True, at=recorder.here()))

    def shapes(
        self,
        name: str,
        args: tuple,
        kwargs: dict,
        lowered: tuple,
        lowered_kw: tuple,
        tensors: list,
    ) -> Any:
        """An operation whose result's shape depends on numbers (`x[x > 0]`): looks at the shape."""
        recorder = self.recorder
        reals = iter(self._fetch(tensors))
        lent = abstract(list(args), reals), abstract(kwargs, reals)
        result = execute(name, tuple(lent[0]), lent[1])
        outs = flatten(result)
        at = recorder.here()
        node = Call(op=name, args=lowered, kwargs=lowered_kw, outs=len(outs), at=at)
        number = recorder.append(node).node
        time = max(max(t._time, t._family.time) for t in tensors)
        values = []
        for out, real in enumerate(outs):
            ref = Ref(number, out)
            expected = Seq("tuple", tuple(real.shape))
            recorder.append(Guard(value=ref, expected=expected, look="shape", at=at))
            values.append(make(recorder, ref, aval_of(real), Family(ref, time, at), time, at))
        return _rebuild(result, iter(values))


def _plain(numbers: Any) -> Arg:
    if isinstance(numbers, list):
        return Seq("list", tuple([_plain(item) for item in numbers]))
    if isinstance(numbers, float) and not math.isfinite(numbers):
        return Name("float", str(numbers))
    return numbers


def _rebuild(result: Any, values: Any) -> Any:
    """`result` with the next of `values` for each tensor in it."""
    if isinstance(result, torch.Tensor):
        return next(values)
    if isinstance(result, (tuple, list)):
        return type(result)([_rebuild(item, values) for item in result])
    return result
