"""Strangers: 31 of them around one's own, as requests on a server or as invokes of one block.

    with around(lane) as mine:         # half of them are waiting already
        ...                            # send one's own
        mine()                         # the other half comes after it

    with invoked(lane) as tracer:      # half of them stand before, the other half after it
        with tracer.invoke(...):
            ...

They read, take their time and fill the model with NaN; on a server they also fail, and try to
change its weights. Each of them must end as it would alone: with a result, or with the error that
it deserves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.families import zoo
from weft.errors import ReadOnlyError

from .lanes import Lane, hidden

COUNT = 31


@contextmanager
def around(lane: Lane) -> Iterator[Callable[[], None]]:
    """Sends strangers before and after; in the end each must have got what it deserves."""
    kinds = (_reads, _fails, _is_slow, _fills_with_nan, _changes_weights)
    checks: list[Callable[[], None]] = []

    def send(numbers: range) -> None:
        for number in numbers:
            checks.append(kinds[number % len(kinds)](lane, zoo.tokens(9, seed=number)[0]))

    send(range(COUNT // 2))
    yield lambda: send(range(COUNT // 2, COUNT))
    assert len(checks) == COUNT
    for check in checks:
        check()


@contextmanager
def invoked(lane: Lane) -> Iterator[Any]:
    """Invokes before and after; prompts of many lengths. An invoke that fails would end the block
    for all, so none does."""
    kinds = (_read, _slow, _nan, _huge)
    saved: list[tuple[Any, bool]] = []

    def invoke(tracer: Any, numbers: range) -> None:
        for number in numbers:
            args, kwargs = lane.subject.give(zoo.tokens(3 + number % 19, seed=number)[0])
            with tracer.invoke(*args, **kwargs):
                act = kinds[number % len(kinds)]
                saved.append((act(hidden(lane.layer(0).output)).save(), act is not _nan))

    with lane.model.trace() as tracer:
        invoke(tracer, range(COUNT // 2))
        yield tracer
        invoke(tracer, range(COUNT // 2, COUNT))
    for got, is_finite in saved:
        (_finite if is_finite else _all_nan)(got)


def _read(h: Any) -> Any:
    return h.sum(-1)


def _slow(h: Any) -> Any:
    h = h.float()
    for _ in range(20):
        h = (h @ h.transpose(-1, -2)).softmax(-1) @ h
    return h


def _nan(h: Any) -> Any:
    h[:] = float("nan")
    return h


def _huge(h: Any) -> Any:
    h[:] *= 1e30
    return h


def _reads(lane: Lane, row: list[int]) -> Callable[[], None]:
    with lane.block(lane.subject.give(row), blocking=False) as tracer:
        _read(hidden(lane.layer(0).output)).save("h")
    return lambda: _finite(tracer.job.result()["h"])


def _fails(lane: Lane, row: list[int]) -> Callable[[], None]:
    with lane.block(lane.subject.give(row), blocking=False) as tracer:
        hidden(lane.layer(1).output)[:, torch.tensor([99])].save("h")

    def check() -> None:
        try:
            tracer.job.result()
        except IndexError:
            return
        raise AssertionError("a stranger's index out of range was no error")

    return check


def _is_slow(lane: Lane, row: list[int]) -> Callable[[], None]:
    with lane.block(lane.subject.give(row), blocking=False) as tracer:
        _slow(hidden(lane.layer(0).output)).save("h")
    return lambda: _finite(tracer.job.result()["h"])


def _fills_with_nan(lane: Lane, row: list[int]) -> Callable[[], None]:
    with lane.block(lane.subject.give(row), blocking=False) as tracer:
        _nan(hidden(lane.layer(0).output)).save("h")
    return lambda: _all_nan(tracer.job.result()["h"])


def _changes_weights(lane: Lane, row: list[int]) -> Callable[[], None]:
    try:
        with lane.block(lane.subject.give(row), blocking=False):
            lane.model.get(f"{lane.subject.paths.embedding}.weight").zero_()
    except ReadOnlyError:
        return lambda: None
    raise AssertionError("a weight could be written")


def _finite(tensor: Any) -> None:
    assert tensor.isfinite().all(), "a stranger got numbers that are not its own"


def _all_nan(tensor: Any) -> None:
    assert tensor.isnan().all(), "a stranger's own NaN were lost"
