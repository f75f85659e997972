"""`model.sweep`: one experiment at every point of a grid, and a labelled result.

    def patch(tracer, layer, position):
        layers[layer].output[:, position] = clean[layer][:, position]
        return model.lm_head.output[0, -1, token]

    effect = model.sweep(prompt, patch, layer=range(12), position=range(9))    # Labelled, [12, 9]

Each point is an invoke of the same input, so what a block of invokes shares the points share
(`engine.merging`): one pass for many points, and one computation of what they have in common before
their first edits. Here it is decided how many points are one block, what a failing point means, and
what comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from weft.client.progress import counted
from weft.errors import (
    AccessError,
    CancelledError,
    InputError,
    LimitError,
    ModelNotReadyError,
    OtherModelError,
    ServerAwayError,
    ServerError,
    SettingError,
    SweepError,
    UnknownOptionError,
    VersionMismatchError,
    WeftError,
    WorkerLostError,
    WrongModelError,
)
from weft.families.call import ModelCall
from weft.settings import Settings, load
from weft.trace.away import filled
from weft.trace.lines import line_of_error, user_line, where
from weft.trace.value import Value

from .budget import Budget, is_memory
from .grid import Grid
from .invoke import Invoke
from .labelled import Labelled
from .tracer import Tracer

if TYPE_CHECKING:
    from .handle import Handle

MOST_FAILURES = 10
"""After so many failing points the rest is not tried."""

_EVERYBODYS = (
    *(ServerAwayError, AccessError, VersionMismatchError, WrongModelError, OtherModelError),
    *(ModelNotReadyError, WorkerLostError, CancelledError, ServerError, SettingError),
)
"""Errors that are no point's own. To look for the point that cost a worker would cost others."""

Point = dict[str, Any]
"""What a function returned for one point: tensors by name."""

ALONE = "value"
"""The name of what a function returns without one."""


class _PointError(Exception):
    """The function raised at a point."""

    def __init__(self, number: int, cause: Exception) -> None:
        super().__init__(number)
        self.number = number
        self.cause = cause


class _EnoughError(Exception):
    """Too many points have failed."""


class Sweep:
    """One run over a grid. `opened()` gives a fresh block without an input."""

    def __init__(
        self,
        handle: Handle,
        call: ModelCall,
        opened: Callable[[], Tracer],
        function: Callable[..., Any],
        grid: Grid,
        batch: int | str,
    ) -> None:
        if batch != "auto" and not (type(batch) is int and batch > 0):
            raise UnknownOptionError(
                f"batch is 'auto' or a number of points, not {batch!r}",
                fix="batch='auto', or batch=8",
            )
        grid.check(function)
        self._handle = handle
        self._call = call
        self._opened = opened
        self._function = function
        self._grid = grid
        self._settings: Settings = load()
        self._budget = Budget.of(handle, call, self._settings, None if batch == "auto" else batch)  # type: ignore[arg-type]
        self._found: dict[int, Point] = {}
        self._failed: dict[int, Exception] = {}
        self._bare = False
        self._names: set[str] = set()

    def run(self) -> Labelled | dict[str, Labelled]:
        """Runs every point. Raises `SweepError`, with the others' results, where points failed."""
        points = list(range(len(self._grid)))
        try:
            with counted(self._settings, "sweep", len(points)) as self._tick:
                self._all(points)
        except _EnoughError:
            pass
        if self._failed:
            raise self._error()
        return self._result()

    # -- blocks ------------------------------------------------------------------------------------

    def _all(self, points: Sequence[int]) -> None:
        while points:
            done = self._some(points[: self._budget.points])
            points = [number for number in points if number not in done]

    def _some(self, points: Sequence[int]) -> set[int]:
        """One block, of as many of these points as fit; those of them that are over."""
        taken: list[int] = []
        tracer = self._opened()
        try:
            kept = self._record(tracer, points, taken)
        except _PointError as error:
            return self._fail(error.number, error.cause)
        except _EVERYBODYS:
            raise
        except Exception as error:
            if len(taken) < 2:
                if not taken:
                    raise
                return self._fail(taken[0], error)
            if is_memory(error) or isinstance(error, LimitError):
                self._budget.shrink(len(taken) // 2)
                return set()
            del tracer
            middle = len(taken) // 2  # it is some point's own: the others are not to suffer
            self._all(taken[:middle])
            self._all(taken[middle:])
            return set(taken)
        for number, one in kept.items():
            self._found[number] = {
                name: tracer.results[key] if isinstance(key, str) else key
                for name, key in one.items()
            }
        self._tick(len(taken))
        return set(taken)

    def _record(
        self, tracer: Tracer, points: Sequence[int], taken: list[int]
    ) -> dict[int, dict[str, Any]]:
        """Records these points in a block, until it is full; what each saves under which name."""
        kept: dict[int, dict[str, Any]] = {}
        with tracer:
            for number in points:
                if taken and self._budget.is_full(len(taken), tracer._recorder):
                    break
                try:
                    with Invoke(tracer, self._call, {}):
                        given = self._function(tracer, **self._grid.points[number])
                        kept[number] = self._saved(number, given)
                except _EVERYBODYS:
                    raise
                except Exception as error:
                    raise _PointError(number, error) from error
                taken.append(number)
        return kept

    def _saved(self, number: int, given: Any) -> dict[str, Any]:
        """Saves what the function returned: by name, the name of the save, or a tensor."""
        self._bare = not isinstance(given, Mapping)
        named = {ALONE: given} if self._bare else given
        if not named or not all(isinstance(name, str) for name in named):
            raise InputError(
                f"the function returned a dict with the names {list(named)}",
                fix="return a tensor, or a dict of tensors whose names are texts",
            )
        names = self._names = self._names or set(named)
        if set(named) != names:
            raise InputError(
                f"the function returned {sorted(named)}, but {sorted(names)} at the first point",
                fix="return the same names at every point",
            )
        return {name: self._one(number, name, value) for name, value in named.items()}

    def _one(self, number: int, name: str, value: Any) -> Any:
        if isinstance(value, Value) and filled(value) is None:
            key = f"{number} {name}"
            value.save(key)
            return key
        if isinstance(value, torch.Tensor):
            return value.detach().clone()
        if isinstance(value, (bool, int, float, complex)):
            return torch.tensor(value)
        raise InputError(
            f"the function returned {type(value).__name__} for {name!r}; a sweep brings tensors",
            fix="return a tensor, or a dict of named tensors",
        )

    # -- the end -----------------------------------------------------------------------------------

    def _fail(self, number: int, error: Exception) -> set[int]:
        self._failed[number] = error
        if len(self._failed) >= MOST_FAILURES:
            raise _EnoughError
        self._tick(1)
        return {number}

    def _result(self) -> Labelled | dict[str, Labelled]:
        names = next(iter(self._found.values()))
        found = {name: self._labelled(name) for name in names}
        return found[ALONE] if self._bare else found

    def _labelled(self, name: str) -> Labelled:
        """One name's tensors at all points, NaN where there is none."""
        grid = self._grid
        tensors = {number: one[name] for number, one in self._found.items()}
        first = next(iter(tensors.values()))
        for number, tensor in tensors.items():
            if tensor.shape != first.shape or tensor.dtype != first.dtype:
                raise self._unlike(name, number, tensor, first)
        if len(tensors) < len(grid):
            if not (first.is_floating_point() or first.is_complex()):
                tensors = {number: tensor.double() for number, tensor in tensors.items()}
                first = first.double()
            missing = torch.full_like(first, float("nan"))
            tensors = {number: tensors.get(number, missing) for number in range(len(grid))}
        values = torch.stack([tensors[number] for number in range(len(grid))])
        values = values.reshape(*grid.shape, *first.shape)
        rest = [f"dim_{number}" for number in range(first.dim())]
        return Labelled(values, (*grid.dims, *rest), grid.coords, name)

    def _unlike(
        self, name: str, number: int, tensor: torch.Tensor, first: torch.Tensor
    ) -> SweepError:
        at = self._grid.name(next(iter(self._found)))
        kinds = [f"{str(t.dtype)[6:]}{list(t.shape)}" for t in (first, tensor)]
        return SweepError(
            f"{name!r} is {kinds[0]} at {at}, but {kinds[1]} at {self._grid.name(number)}",
            fix="return tensors of one shape and dtype; what there is stands in the error's "
            "`points`",
            points={self._grid.name(n): one for n, one in self._found.items()},
        )

    def _error(self) -> SweepError:
        number, cause = next(iter(self._failed.items()))
        failed = {self._grid.name(n): error for n, error in self._failed.items()}
        said = cause.message if isinstance(cause, WeftError) else f"{type(cause).__name__}: {cause}"
        others = [name for name in failed if name != self._grid.name(number)]
        more = f"\n  so did {len(others)} further: {'; '.join(others)}" if others else ""
        left = len(self._grid) - len(self._failed) - len(self._found)
        more += f"\n  {left} points were not tried any more" if left else ""
        error = SweepError(
            f"at the point {self._grid.name(number)} of the sweep: {said}{more}",
            line=_line(cause),
            fix=_fix(cause, bool(self._found)),
            result=self._result() if self._found else None,
            failed=failed,
            points={self._grid.name(n): one for n, one in self._found.items()},
        )
        error.__cause__ = cause
        return error


def _line(cause: Exception) -> Any:
    """The user's line of what happened at a point."""
    for line in (getattr(cause, "line", None), getattr(cause, "weft_line", None)):
        if line is not None:
            return line
    found = line_of_error(cause)
    return where(user_line() if found is None else found)


def _fix(cause: Exception, others: bool) -> str | None:
    own = getattr(cause, "fix", None) if isinstance(cause, WeftError) else None
    kept = "what the other points gave is in the error's `result`, with NaN at failed points"
    return "; ".join([text for text in (own, kept if others else None) if text]) or None
