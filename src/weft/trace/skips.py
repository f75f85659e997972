"""Skips and stops as a block sees them: modules that do not run, and passes that end early.

    model.h[3].skip(model.h[3].input)        # h.3 does not run: its output is this
    tracer.stop_if(model.h[4].output.norm() > 10)

A skip acts when the module is about to begin, so its value must exist by then. What would fire
inside the module does not, and what it would have given by itself never exists: whoever has named
such a site before, or names one later, is refused with both lines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from weft.errors import LateEditError, NotReachedError, RecordingError
from weft.graph.node import Ref, Skip, Stop
from weft.graph.site import begin_port, is_inside, operations_of, split_port
from weft.kernels.aval import Aval
from weft.signatures.structure import Opaque

from .containers import flatten
from .lines import where
from .sources import learn
from .times import FIRINGS, TURN
from .value import Value

if TYPE_CHECKING:
    from .recorder import Recorder
    from .sites import Sites, SiteState


class Span(NamedTuple):
    """A skipped call: between these firing indices nothing happens."""

    begin: Any
    end: Any
    path: str
    at: int


def record_skip(
    recorder: Recorder, path: str, value: Any, call: int | None, port: str = "output"
) -> None:
    """`module.skip(value)`; of what is skipped `port` is the output."""
    first = begin_port(port)
    if recorder.invoke is None:
        recorder.sites.state(path, first, call)  # says what is missing, or makes it
    sites: Sites = recorder.sites
    if is_inside(port):
        learn(recorder, path, operations_of(port)[:-1])
        path_and = f"{path}.{split_port(port)[0][:-1]}"
    else:
        path_and = path
    number = sites.only_call(path, f"{port[: -len('output')]}skip") if call is None else call
    begin = sites.state(path, first, number).index
    end = begin - begin % TURN + recorder.signature.site(path, port, number).index
    _refuse_touched(sites, begin, end, path_and)
    output = sites.state(path, port, number)
    values = _values(sites, output, value, begin)
    at = recorder.here()
    recorder.append(Skip(site=output.site, values=values, leaves=tuple(output.tensors), at=at))
    for leaf in output.tensors.values():
        leaf.version += 1
        leaf.edited = at
    recorder.edits.append((end, at))
    sites.skips.append(Span(begin, end, path_and, at))


def refuse_inside(sites: Sites, state: SiteState) -> None:
    """Raises where a site lies inside a module that is skipped."""
    recorder = sites.recorder
    for span in sites.skips:
        if span.begin < state.index < span.end:
            raise NotReachedError(
                f"{state.site} does not fire: {span.path or 'the root'} is skipped, at "
                f"{where(recorder.line_of(span.at))}",
                line=where(recorder.line()),
                fix="skip only the modules inside that are not needed, or leave this line out",
            )


def _refuse_touched(sites: Sites, begin: int, end: int, path: str) -> None:
    recorder = sites.recorder
    name = path or "the root"
    for span in sites.skips:
        if span.begin == begin:
            raise RecordingError(
                f"{name} is skipped twice, first at {where(recorder.line_of(span.at))}",
                line=where(recorder.line()),
                fix="skip it once; later edits go to its .output",
            )
        if begin < span.begin < end:
            raise RecordingError(
                f"{name} is skipped, and with it {span.path}, which is skipped at "
                f"{where(recorder.line_of(span.at))}",
                line=where(recorder.line()),
                fix="leave the inner skip out",
            )
    for state in sites.states.values():
        if begin < state.index <= end:
            line = where(recorder.line_of(_first_use(recorder, state)))
            raise RecordingError(
                f"{name} is skipped after {state.site} was used at {line}: that never exists",
                line=where(recorder.line()),
                fix="use the output below the skip, where it is the given value; or leave the "
                "skip out and write to the output",
            )


def _first_use(recorder: Recorder, state: SiteState) -> int:
    for node in recorder.nodes:
        if getattr(node, "site", None) == state.site:
            return node.at
    return recorder.here()


def _values(sites: Sites, output: SiteState, value: Any, begin: int) -> tuple[Ref, ...]:
    """The tensors that the module gives, in the order of its leaves."""
    given = dict(flatten(value))
    expected = dict(output.signature.leaves)
    for leaf, what in expected.items():
        if isinstance(what, Opaque):
            raise sites.recorder.refusal(
                f"{output.shown(leaf)} is a {what}, which a block cannot make, so "
                f"{output.site.path or 'the root'} cannot be skipped",
                "skip the modules inside it",
            )
    if given.keys() != expected.keys():
        raise sites.other_structure(output, list(expected), list(given))
    found = []
    for leaf, what in expected.items():
        if isinstance(what, Aval):
            found.append(_value(sites, output, leaf, given[leaf], begin))
        else:
            sites.check_plain(output, leaf, given[leaf], what)
    return tuple(found)


def _value(sites: Sites, output: SiteState, leaf: Any, value: Any, begin: int) -> Ref:
    recorder = sites.recorder
    if isinstance(value, Value):
        value = recorder.own(value)
    state = output.tensors[leaf]
    if not isinstance(value, torch.Tensor):
        raise sites.mismatch(state, f"a {type(value).__name__}")
    source: Any = value if isinstance(value, Value) else recorder.clients.use(value)
    sites.check_fit(state, source._aval)
    _check_time(recorder, output, begin, source)
    return source._ref


def _check_time(recorder: Recorder, output: SiteState, begin: int, source: Any) -> None:
    """A skip comes in time if its value exists when the module begins, and nobody has looked."""
    name = str(output.site).replace(".output", "", 1).replace("<root>", "the root")
    line = where(recorder.line())
    time = max(source._time, source._family.time)
    if time > begin and time // FIRINGS == begin // FIRINGS:
        raise LateEditError(
            f"{name} is skipped with a value that exists only after it has begun, made at "
            f"{where(recorder.line_of(source._at))}",
            line=line,
            fix="take the value from its .input or from an earlier site",
        )
    seen = recorder.looks.seen.get(begin // FIRINGS)
    if seen is not None and begin < seen[0]:
        raise LateEditError(
            f"{name} is skipped after a number was looked at that comes later in the pass, at "
            f"{where(recorder.line_of(seen[1]))}",
            line=line,
            fix="move the skip above the look, or keep the branch in the graph with torch.where",
        )


def record_stop(recorder: Recorder, condition: Any) -> None:
    """`tracer.stop()` and `tracer.stop_if(condition)`; a plain truth value decides here and now."""
    ref = None
    if isinstance(condition, torch.Tensor):
        source: Any = recorder.own(condition) if isinstance(condition, Value) else condition
        if not isinstance(source, Value):
            source = recorder.clients.use(source)
        if source._aval.meta.numel() != 1:
            raise recorder.refusal(
                f"tracer.stop_if was given {source._aval!r}, which is not one number",
                "use .any() or .all()",
            )
        recorder.saves.seen(source)
        ref = source._ref
    elif not condition:
        return
    at = recorder.here()
    step = None if recorder.steps is None else recorder.steps.now or 0
    recorder.append(Stop(condition=ref, invoke=recorder.invoke, step=step, at=at))
    recorder.stops.append(at)
