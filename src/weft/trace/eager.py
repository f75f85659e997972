"""Recording with numbers beside it: `trace(eager=True)`.

The block is recorded as ever, and its graph runs when it closes: that gives the results. Beside it
every operation is carried out as soon as it is recorded, so that its error is raised at its line,
and `print`, an f-string or a debugger shows numbers. They come from the graph as far as it is
written, through the same `run_prefix` that answers looks; nothing is guarded, for nothing is
decided by them. What has numbers already is not asked again: an operation on such values, which
changes nothing, is done right here.

Not here: what the numbers of a graph are. If a later line edits an earlier site, the numbers below
it change with the graph; `EagerWarning` says so where they had been shown.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from weft.errors import EagerWarning, GradientError
from weft.graph.node import (
    AnyNode,
    Apply,
    Call,
    Const,
    Fill,
    Graph,
    Guard,
    Log,
    Param,
    Read,
    Ref,
    Save,
    Skip,
    Write,
)
from weft.graph.ops import OPS, RANDOM
from weft.graph.site import Site
from weft.kernels.execute import MAKERS
from weft.kernels.execute import call as execute
from weft.kernels.results import flatten

from . import special
from .arguments import abstract, has
from .clients import Client
from .lines import user_line, where
from .looks import like
from .operations import Operations
from .recorder import Recorder
from .times import FIRINGS
from .value import Value

_SILENT = Const(key="-", shape=(), dtype="float32")
"""Stands for what only the real run does: saves, logs, guards."""
_LOUD = (Save, Log, Guard)
_QUIET = (Read, Apply, Param, Const, *_LOUD)
"""Nodes that change no number of another one; of calls those that write nothing."""
_SHOWS = frozenset((torch.Tensor.__repr__, torch.Tensor.__format__))


class EagerRecorder(Recorder):
    """See the module's text."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.operations = _Operations(self)
        self._numbers = Numbers(self)
        self._shown: dict[int, tuple[int, tuple[str, int]]] = {}  # invoke -> latest site, line
        self._latest: dict[int, int] = {}  # invoke -> latest site of all that were ever shown

    def append(self, node: AnyNode) -> Ref:
        if isinstance(node, (Write, Fill, Skip)) and self._shown:
            self._warn_shown(node.site)
        return super().append(node)

    def observe(self, func: Any, types: Any, args: tuple, kwargs: dict) -> Any:
        if func in _SHOWS and self.clients.dirty and self.clients.is_dirty(args[0]):
            return func(self.now(args[0]), *args[1:], **kwargs)
        return super().observe(func, types, args, kwargs)

    def deliver(self, saved: dict[str, Any]) -> dict[str, Any]:
        self._numbers.forget()
        return super().deliver(saved)

    def fail(self, cause: BaseException | str) -> None:
        self._numbers.forget()
        super().fail(cause)

    def carry_out(self, name: str, args: tuple, kwargs: dict, result: Any, first: int) -> None:
        """The operation that was just recorded as nodes from `first` on, on numbers."""
        made: Any = []
        special.tensors_in(result, made)
        made = [one for one in made if isinstance(one, Value)] or self._written(args, first)
        if made and self.replayed is None and self.looks.run_prefix is not None:
            self._numbers.of_call(name, args, kwargs, made, first)

    def _written(self, args: tuple, first: int) -> list[Any]:
        """What an operation that gives nothing has written."""
        refs = [ref for one in self.nodes[first:] if isinstance(one, Call) for ref in one.writes]
        own = [one for one in args if isinstance(one, Value) and one._ref in refs]
        return own or (list(self.clients.dirty.values()) if refs else [])

    # -- showing -----------------------------------------------------------------------------

    def describe(self, value: Value) -> str:
        real = self.shown(value)
        return super().describe(value) if real is None else repr(real)

    def shown(self, value: Value) -> torch.Tensor | None:
        """The numbers of a value, for people; None where there are none (yet)."""
        if not self.open or not self._own_task() or self.looks.run_prefix is None:
            return None
        (real,) = self._numbers.of([value])
        if real is not None:
            time = max(value._time, value._family.time)
            invoke = time // FIRINGS
            self._shown[invoke] = max(self._shown.get(invoke, (-1, ("", 0))), (time, user_line()))
            self._latest[invoke] = max(self._latest.get(invoke, -1), time)
        return None if real is None else real.to(self.device)

    def now(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a tensor of the user's holds into which the block has written."""
        (real,) = self._numbers.of([self.clients.use(tensor)])
        return tensor if real is None else real.to(tensor.device)

    def _last_needed(self) -> Mapping[int, int]:
        """What was shown was needed, too."""
        last = dict(super()._last_needed())
        for invoke, time in self._latest.items():
            last[invoke] = max(last.get(invoke, -1), time)
        return last

    def _warn_shown(self, site: Site) -> None:
        """Says that an edit changes what was shown."""
        seen = self._shown.get(site.invoke)
        if seen is None or self._time_of(site) >= seen[0]:
            return
        del self._shown[site.invoke]
        text = (
            f"{site} is edited here, after numbers that depend on it were shown at "
            f"{where(seen[1])}: those are not what the block brings back"
        )
        warnings.warn_explicit(text, EagerWarning, *user_line())

    def _time_of(self, site: Site) -> int:
        if self.steps is not None:
            return self.steps.time(site)
        if self.invokes is not None:
            return self.invokes.time(site)
        return self.signature.site(site.path, site.port, site.call).index


class Numbers:
    """The numbers of one recording's values, as far as it is written."""

    def __init__(self, recorder: EagerRecorder) -> None:
        self._recorder = recorder
        self._known: dict[Ref, torch.Tensor | None] = {}  # None: it is not reached
        self._read = 0  # nodes of which is known whether they change numbers
        self._last: AnyNode | None = None  # of these

    def forget(self) -> None:
        """The block is over."""
        self._known.clear()

    def of(self, values: Sequence[Value | Client]) -> list[torch.Tensor | None]:
        """Their numbers; None for what has none yet. Raises what making them raises."""
        known = self._up_to_date()
        missing = [one for one in values if one._ref not in known]
        if missing:
            self._fetch(missing)
        return [known.get(one._ref) for one in values]

    def of_call(self, name: str, args: tuple, kwargs: dict, made: list, first: int) -> None:
        """Makes the numbers of what an operation gave."""
        given: list[torch.Tensor] = []
        special.tensors_in((args, kwargs), given)
        own = [one for one in given if isinstance(one, Value) and one._rec is self._recorder]
        if not self._is_simple(first) or has(np.ndarray, (args, kwargs)):
            self.of(made)
            return
        self.of(own)
        reals = [self._real(one) for one in given]
        if any(one is None for one in reals) or len({one.device for one in reals}) != 1:  # type: ignore[union-attr]
            self.of(made)
            return
        hints = {key: one for key, one in kwargs.items() if key not in special.HINTS}
        rest = iter(reals)
        lent = abstract(list(args), rest), abstract(hints, rest)
        with torch.no_grad():
            results = flatten(execute(name, tuple(lent[0]), lent[1]))
        self._known.update([(one._ref, real) for one, real in zip(made, results, strict=True)])

    def _is_simple(self, first: int) -> bool:
        """Whether all that was recorded is one operation that needs numbers and nothing else."""
        *before, node = self._recorder.nodes[first:] or [_SILENT]
        if not isinstance(node, Call) or any(not isinstance(one, Const) for one in before):
            return False
        kind = OPS[node.op].kind
        return not node.writes and kind not in RANDOM | MAKERS and not self._recorder.clients.dirty

    def _real(self, one: torch.Tensor) -> torch.Tensor | None:
        """A tensor as the run has it; None where that is not known."""
        if not isinstance(one, Value):
            clients = self._recorder.clients
            node: Any = self._recorder.nodes[clients.use(one)._ref.node]
            return clients.constants[node.key]
        real = self._known.get(one._ref) if one._rec is self._recorder else None
        return real if real is not None and real.stride() == one._aval.stride else None

    def _up_to_date(self) -> dict[Ref, torch.Tensor | None]:
        """What is known, without what nodes since then may have changed."""
        nodes = self._recorder.nodes
        read = self._read
        same = read <= len(nodes) and (not read or nodes[read - 1] is self._last)
        if not same or any(_changes(node) for node in nodes[read:]):
            self._known.clear()
        self._read, self._last = len(nodes), nodes[-1] if nodes else None
        return self._known

    def _fetch(self, values: Sequence[Value | Client]) -> None:
        """Runs the graph as far as it is written, up to where these values are known."""
        recorder = self._recorder
        saves = [Save(name=str(number), value=one._ref) for number, one in enumerate(values)]
        graph = self._graph(saves)
        if graph is None and len(values) > 1:
            for one in values:
                self._fetch([one])
            return
        constants = recorder.clients.constants
        run: Any = recorder.looks.run_prefix
        got = {} if graph is None else run(graph, constants)
        for number, one in enumerate(values):
            real = got.get(str(number))
            self._known[one._ref] = None if real is None else like(real.detach(), one._aval)

    def _graph(self, saves: list[Save]) -> Graph | None:
        """The graph so far, without what only the real run does; None where a gradient is needed
        whose backward stands further down."""
        recorder = self._recorder
        nodes = recorder.nodes
        recorder.nodes = [_SILENT if isinstance(one, _LOUD) else one for one in nodes]
        try:
            return recorder.graph(tuple(saves))
        except GradientError:
            if recorder._gradients is None or recorder._gradients.upcoming is None:
                raise
            return None
        finally:
            recorder.nodes = nodes


class _Operations(Operations):
    def record(self, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
        recorder: Any = self.recorder
        first = len(recorder.nodes)
        result = super().record(name, func, args, kwargs)
        recorder.carry_out(name, args, kwargs, result, first)
        return result

    def apply(self, path: str, module: Any, args: tuple, kwargs: dict) -> Any:
        recorder: Any = self.recorder
        first = len(recorder.nodes)
        result = super().apply(path, module, args, kwargs)
        recorder.carry_out(path, args, kwargs, result, first)
        return result


def _changes(node: AnyNode) -> bool:
    """Whether a node may change the numbers of earlier ones."""
    return bool(node.writes) if isinstance(node, Call) else not isinstance(node, _QUIET)
