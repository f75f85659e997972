"""Looks: a number that the block needs while it is being recorded.

The graph recorded so far runs until the wanted value is known, the number is handed over, and
recording goes on. Each look leaves a `Guard`: a later run in which it comes out differently fails.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from weft.errors import LookError
from weft.graph.node import Arg, Guard, Name, Ref, Save, Seq
from weft.kernels.abstract import LeafOut, Outcome, flatten
from weft.kernels.aval import Aval, aval_of
from weft.kernels.execute import call as execute
from weft.kernels.results import tree_of

from . import special
from .arguments import abstract
from .away import filled
from .lines import user_line, where
from .times import FIRINGS
from .trained import trained_here
from .value import Value

if TYPE_CHECKING:
    from .recorder import Recorder, RunPrefix

_SMALL = 64


class Looks:
    """The looks of one recording. `seen`: for each invoke the latest site looked at, and where."""

    def __init__(self, recorder: Recorder, run_prefix: RunPrefix | None) -> None:
        self.recorder = recorder
        self.run_prefix = run_prefix
        self.seen: dict[int, tuple[int, int]] = {}

    def call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """A torch function that answers with numbers (`item`, `bool`, `equal`, ...)."""
        tensors: list[torch.Tensor] = []
        special.tensors_in((args, kwargs), tensors)
        reals = iter([self.tensor(one) for one in tensors])
        lent = abstract(list(args), reals), abstract(kwargs, reals)
        return func(*lent[0], **lent[1])

    def tensor(self, value: Any) -> torch.Tensor:
        """The numbers of one value, with a guard on them."""
        given = value
        if isinstance(value, Value):
            value = self.recorder.own(value)
        if not isinstance(value, Value):
            client = self.recorder.clients
            if not client.is_dirty(value):
                return self._here(given)
            value = client.use(value)
        real = self._fetch([value])[0]
        self._guard(value, real)
        return real

    def _here(self, given: Any) -> torch.Tensor:
        """The numbers of what an earlier block has made, or of a client tensor."""
        if isinstance(given, Value):
            return filled(given)  # type: ignore[return-value]
        trained = trained_here()
        if trained is not None:
            trained.home(given)
        return given

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
        for time in [max(v._time, v._family.time) for v in values]:
            invoke = time // FIRINGS
            self.seen[invoke] = max(self.seen.get(invoke, (-1, 0)), (time, at))
        if len(got) < len(values):
            raise recorder.not_reached("this number is never there", where(user_line()))
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
        close: Any = torch.isclose(
            handle, real.clone(), rtol=0.0, atol=rtol * scale, equal_nan=True
        )
        recorder.append(Guard(value=close.all()._ref, expected=True, at=recorder.here()))

    def outcome(self, name: str, args: tuple, kwargs: dict, tensors: list) -> Outcome:
        """What an operation gives whose result's shape depends on numbers (`x[x > 0]`).

        Looks at its arguments and runs it on them: shapes, shared storage and writes are seen.
        """
        reals = [like(real, t._aval) for real, t in zip(self._fetch(tensors), tensors, strict=True)]
        versions = [real._version for real in reals]
        given = iter(reals)
        lent = abstract(list(args), given), abstract(kwargs, given)
        with torch.no_grad():
            result = execute(name, tuple(lent[0]), lent[1])
        storages = {real.untyped_storage()._cdata: i for i, real in enumerate(reals)}
        objects = {id(real): i for i, real in enumerate(reals)}
        leaves = [
            LeafOut(aval_of(out), storages.get(out.untyped_storage()._cdata), objects.get(id(out)))
            for out in flatten(result)
        ]
        writes = [i for i, real in enumerate(reals) if real._version != versions[i]]
        return Outcome(tree_of(result), tuple(leaves), tuple(writes))

    def guard_shapes(self, number: int, outcome: Outcome) -> None:
        """Guards on the shapes of what node `number` gives, which were looked at."""
        recorder = self.recorder
        for out, leaf in enumerate(outcome.leaves):
            expected = Seq("tuple", tuple(leaf.aval.shape))
            guard = Guard(
                value=Ref(number, out), expected=expected, look="shape", at=recorder.here()
            )
            recorder.append(guard)


def like(real: torch.Tensor, aval: Aval) -> torch.Tensor:
    """`real` with the strides that were recorded: they decide what is a view."""
    if real.stride() == aval.stride or 0 in aval.stride:
        return real
    return torch.empty_strided(aval.shape, aval.stride, dtype=real.dtype).copy_(real)


def _plain(numbers: Any) -> Arg:
    if isinstance(numbers, list):
        return Seq("list", tuple([_plain(item) for item in numbers]))
    if isinstance(numbers, float) and not math.isfinite(numbers):
        return Name("float", str(numbers))
    return numbers
