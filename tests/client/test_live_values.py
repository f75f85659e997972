"""Streams of a live server: values arrive while the job runs, here, by asyncio, from anywhere."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

import weft
from tests.client.live import DOOR, MOMENT, gated_net, soon
from weft.client.values import opened_value
from weft.errors import CancelledError, LimitError, MessageError, RecordingError
from weft.graph.node import Ref, Seq
from weft.handles.stream import Stream
from weft.testing.same import bitwise
from weft.wire.messages import ValueEvent


@pytest.fixture
def before(x: Any) -> torch.Tensor:
    """What stands before the gate: `[3, 8]`."""
    with torch.no_grad():
        return gated_net()[0](x)


def sent(gated: Any, x: Any, to: Any = None, **options: Any) -> Any:
    with gated.trace(x, blocking=False, **options) as tracer:
        tracer.stream("before", gated[0].output, to=to)
        tracer.stream("behind", gated[1].output, to=to)
        gated[1].output.save("h")
    return tracer


def test_a_value_arrives_while_the_job_runs(gated: Any, x: Any, before: Any) -> None:
    with DOOR.closed():
        tracer = sent(gated, x)
        coming = iter(tracer.stream)
        name, h = next(coming)  # the job stands before the gate, which nobody else opens
        assert name == "before" and tracer.job.status().state == "running"
        bitwise(h, before)
        DOOR.open()
        name, h = next(coming)
        assert name == "behind"
        bitwise(h, before)
        assert list(coming) == []
    assert list(tracer.job.result()) == ["h"]


def test_a_function_is_called_while_a_blocking_job_runs(gated: Any, x: Any, before: Any) -> None:
    heard = []

    def hear(value: Any) -> None:
        heard.append(value)
        DOOR.open()  # else the job would never go on

    with DOOR.closed(), gated.trace(x) as tracer:
        tracer.stream(gated[0].output, to=hear)
        tracer.stream(gated[1].output[0], to=hear)
    bitwise(heard, [before, before[0]])


def test_the_function_of_a_job_hears_when_the_job_is_waited_for(
    gated: Any, x: Any, before: Any
) -> None:
    heard: list[Any] = []
    tracer = sent(gated, x, to=heard.append)
    tracer.job.result()
    assert [name for name, _ in heard] == ["before", "behind"]
    assert len(list(tracer.job.events())) > 2 and len(heard) == 2  # each is heard once
    bitwise(heard[1][1], before)


def test_a_job_streams_in_another_process_too(live: Any, gated: Any, x: Any, before: Any) -> None:
    id = sent(gated, x).job.id
    there = weft.Job.get(id, remote=live.url)
    for _ in range(2):
        streamed = list(there.stream())
        assert [name for name, _ in streamed] == ["before", "behind"]
        bitwise(streamed[0][1], before)


def test_a_stream_is_gone_through_by_asyncio(gated: Any, x: Any, before: Any) -> None:
    async def streamed() -> list[Any]:
        async with gated.trace(x, blocking=False) as tracer:
            tracer.stream(gated[0].output)
            tracer.stream(gated[1].output)
        with pytest.raises(RecordingError, match="async for value"):
            list(tracer.stream)
        seen = []
        async for value in tracer.stream:
            seen.append(value)
            DOOR.open()
        seen += [value async for value in tracer.job.stream()]
        async with gated.trace(x) as tracer:
            tracer.stream(gated[0].output)
        return seen + [value async for value in tracer.stream]

    with DOOR.closed():
        bitwise(asyncio.run(streamed()), [before] * 5)


def slowly(slow: Any, to: Any = None, **options: Any) -> Any:
    """A block that streams at a hundred places, one after another."""
    with slow.trace(torch.ones(2), **options) as tracer:
        for number in range(100):
            tracer.stream(slow[number].output, to=to)
    return tracer


@pytest.fixture
def slow(live: Any) -> Any:
    return weft.Model("slow", remote=live.url)


def test_a_cancelled_job_ends_its_stream(slow: Any) -> None:
    with DOOR.closed(MOMENT):
        tracer = slowly(slow, blocking=False)
        coming = iter(tracer.stream)
        bitwise(next(coming), torch.ones(2))
        assert tracer.job.cancel().state == "running"
        with pytest.raises(CancelledError):
            list(coming)
        with pytest.raises(CancelledError):
            list(tracer.job.stream())


def test_a_failed_job_ends_its_stream_with_its_error(gated: Any, x: Any) -> None:
    with gated.trace(x, blocking=False) as tracer:
        tracer.stream(gated[0].output[0])
        torch.gather(gated[1].output, 0, (gated[1].output * 0).long() + 99).save()
    coming = iter(tracer.stream)
    assert next(coming).shape == (8,)
    with pytest.raises(Exception, match="index") as caught:
        next(coming)
    with pytest.raises(type(caught.value)):
        list(tracer.job.stream())


def test_who_hears_no_more_cancels_the_job(live: Any, slow: Any) -> None:
    """An error of his own while he hears of a value."""

    def fail(value: Any) -> None:
        raise KeyError("mine")

    with DOOR.closed(MOMENT):
        with pytest.raises(KeyError, match="mine"):
            slowly(slow, to=fail)
        soon(lambda: live.ledger.jobs("local")[0].state == "cancelled")


def test_what_is_too_much_to_stream_is_refused_before_it_runs(live: Any, x: Any) -> None:
    model: Any = weft.Model("net", remote=live.url)
    with pytest.raises(LimitError, match="stream_bytes") as caught, model.trace(x) as tracer:
        big = torch.zeros_like(model[1].output[0, 0]).expand(3_000_000)
        tracer.stream(big)
        tracer.stream(big)  # this one
    assert "this one" in str(caught.value.line)


def test_a_job_that_is_begun_anew_gives_each_value_once() -> None:
    class Recorder:
        open, failure = True, None

    stream: Any = Stream(Recorder())  # type: ignore[arg-type]
    stream._to.append(None)
    for number in (0, 1, 0, 1, 2):  # the second worker begins from the beginning
        stream.listen(number, 0, (number,))
    Recorder.open = False
    assert list(stream) == [0, 1, 2]


def test_an_event_with_other_tensors_than_it_speaks_of_is_refused() -> None:
    for value in (Seq("tuple", (Ref(0),)), 3):
        with pytest.raises(MessageError):
            opened_value(ValueEvent(number=0, stream=0, value=value))
