"""Jobs: sent and left, asked for, fetched from anywhere."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from msgspec.structs import replace

import weft
from tests.client.scripted import Scripted, told
from weft.errors import (
    CancelledError,
    FailedRunError,
    LookError,
    NoSuchError,
    NotFinishedError,
    NotSavedError,
    RunError,
)
from weft.testing.same import bitwise
from weft.wire.messages import EndEvent, LogEvent, StateEvent


def sent(model: Any, x: Any) -> tuple[Any, Any]:
    with model.trace(x, blocking=False) as tracer:
        tracer.log("from afar\x1b[2J")
        h = model[1].output.save("h")
    return tracer, h


def test_handles_of_a_sent_block_wait(model: Any, x: Any, hidden: Any) -> None:
    tracer, h = sent(model, x)
    assert isinstance(tracer.job, weft.Job)
    with pytest.raises(NotFinishedError, match=r"job-1.*\n.*test_job\.py.*\n.*job\.result"):
        h + 1
    results = tracer.job.result()
    assert type(h) is torch.Tensor and results["h"] is h
    bitwise(h, hidden)
    assert tracer.results is results and tracer.stages["run"] == 0.25 and tracer.traffic.down


def test_what_was_not_saved_says_so_afterwards(model: Any, x: Any) -> None:
    with model.trace(x, blocking=False) as tracer:
        left = model[1].output
        model[0].output.save()
    with pytest.raises(NotFinishedError):
        left + 1
    tracer.job.result()
    with pytest.raises(NotSavedError):
        left + 1


def test_a_result_is_fetched_once(model: Any, script: Scripted, x: Any) -> None:
    tracer, h = sent(model, x)
    assert tracer.job.result() is tracer.job.result()
    assert tracer.job.result("h") is h
    assert len(script.said("GET", "/api/jobs/job-1/result")) == 1


def test_a_tensor_that_was_written_is_filled_when_it_comes(model: Any, x: Any, hidden: Any) -> None:
    kept = torch.zeros(3, 8)
    with model.trace(x, blocking=False) as tracer:
        kept[:] = model[1].output
    assert tracer.job.result() == {}
    bitwise(kept, hidden)


def test_a_look_is_refused_in_a_sent_block(model: Any, x: Any) -> None:
    with pytest.raises(LookError, match="blocking=False"), model.trace(x, blocking=False):
        if model[1].output.sum() > 0:
            model[1].output.save()


def test_a_job_that_failed_raises_and_its_handles_say_why(model: Any, x: Any) -> None:
    with model.trace(x, blocking=False) as tracer:
        h = model[1].output[torch.tensor([7])].save()
    for _ in range(2):
        with pytest.raises(IndexError) as caught:
            tracer.job.result()
        assert isinstance(caught.value, RunError)
    with pytest.raises(FailedRunError, match="index 7 is out of bounds"):
        h + 1
    assert tracer.job.status().state == "failed"


def test_a_cancelled_job_says_so(model: Any, script: Scripted, x: Any) -> None:
    tracer, h = sent(model, x)
    gone = replace(script.jobs["job-1"], state="cancelled", result=None)
    script.jobs["job-1"] = gone
    assert tracer.job.cancel().state == "cancelled"
    with pytest.raises(FailedRunError, match="cancelled"):
        h + 1
    script.notes["job-1"] = [EndEvent(job=gone)]
    with pytest.raises(CancelledError):
        tracer.job.result()


def test_its_log_is_printed_once_and_kept(model: Any, x: Any, capsys: Any) -> None:
    tracer, _ = sent(model, x)
    assert tracer.job.log == ()
    tracer.job.result()
    assert capsys.readouterr().out == "from afar\\x1b[2J\n"
    tracer.job.result(), list(tracer.job.events())
    assert capsys.readouterr().out == ""
    assert tracer.job.log == ("from afar\\x1b[2J",)


def test_its_events_are_told_from_the_beginning(
    model: Any, x: Any, hidden: Any, capsys: Any
) -> None:
    tracer, h = sent(model, x)
    for _ in range(2):
        kinds = [type(event) for event in tracer.job.events()]
        assert kinds == [StateEvent, StateEvent, LogEvent, EndEvent]
    for event in tracer.job.events():
        if isinstance(event, EndEvent):
            break
    tracer.job.result()
    bitwise(h, hidden)
    assert capsys.readouterr().out == "" and len(tracer.job.log) == 1


def test_events_may_be_left_early(model: Any, x: Any, hidden: Any) -> None:
    tracer, h = sent(model, x)
    next(iter(tracer.job.events()))
    tracer.job.wait()
    tracer.job.result()
    bitwise(h, hidden)


def test_waiting_ends_with_the_time(model: Any, script: Scripted, x: Any) -> None:
    tracer, _ = sent(model, x)
    done = script.jobs["job-1"]
    script.jobs["job-1"] = replace(done, state="running", result=None)
    served = script.served

    def slowly(request: Any) -> Any:
        script.clock.now += float(request.url.params.get("wait", 0))
        return served(request)

    script.served = slowly  # type: ignore[method-assign]
    with pytest.raises(NotFinishedError, match="running after 50 s"):
        tracer.job.wait(50)
    waits = [c.url.params["wait"] for c in script.calls if "wait" in c.url.params]
    assert waits == ["20.000", "20.000", "10.000"]
    script.jobs["job-1"] = done
    assert tracer.job.wait(50).state == "done"


def test_a_job_by_its_id(server: Any, model: Any, x: Any, hidden: Any, capsys: Any) -> None:
    sent(model, x)
    job = weft.Job.get("job-1", server)
    assert repr(job) == "<Job job-1 done at http://scripted:1>"
    bitwise(job.result("h"), hidden)
    assert list(job.result()) == ["h"]
    assert "from afar" in capsys.readouterr().out
    job.delete()
    with pytest.raises(NoSuchError):
        weft.Job.get("job-1", server)


def test_an_id_is_no_path(server: Any, script: Scripted) -> None:
    with pytest.raises(weft.RemoteError):
        weft.Job.get("../../admin?x=1", server)
    assert script.calls[-1].url.raw_path == b"/api/jobs/..%2F..%2Fadmin%3Fx%3D1"


def test_the_same_with_asyncio(
    model: Any, server: Any, script: Scripted, x: Any, hidden: Any
) -> None:
    async def main() -> None:
        async with model.trace(x) as tracer:
            h = model[1].output.save()
        bitwise(h, hidden)
        assert tracer.stages["run"] == 0.25
        async with model.trace(x, blocking=False) as tracer:
            h = model[1].output.save("h")
        assert isinstance(tracer.job, weft.AsyncJob)
        kinds = [type(event) async for event in tracer.job.events()]
        assert kinds == [StateEvent, StateEvent, EndEvent]
        assert (await tracer.job.status()).state == "done"
        assert (await tracer.job.wait()).state == (await tracer.job.wait(3)).state == "done"
        assert (await tracer.job.result("h")) is h
        bitwise(h, hidden)
        again = await weft.AsyncJob.get(tracer.job.id, server)
        bitwise((await again.result())["h"], hidden)
        await again.cancel()
        await again.delete()

    asyncio.run(main())


def test_an_async_block_that_fails_marks_its_handles(model: Any, script: Scripted, x: Any) -> None:
    async def main() -> None:
        with pytest.raises(IndexError):
            async with model.trace(x):
                h = model[1].output[torch.tensor([7])].save()
        with pytest.raises(FailedRunError, match="out of bounds"):
            h + 1
        with pytest.raises(ZeroDivisionError):
            async with model.trace(x):
                1 / 0

    asyncio.run(main())
    assert len(script.jobs) == 1


def test_a_hundred_async_blocks_at_once(model: Any, script: Scripted, x: Any, hidden: Any) -> None:
    async def one(number: int) -> None:
        async with model.trace(x):
            h = (model[1].output * number).save()
        bitwise(h, hidden * number)

    async def main() -> None:
        await asyncio.gather(*[one(number) for number in range(100)])

    asyncio.run(main())
    assert len(script.jobs) == 100


def test_a_local_block_may_be_async_too(net: Any, x: Any, hidden: Any) -> None:
    async def main() -> None:
        model = weft.Model(net)
        async with model.trace(x):
            h = model[1].output.save()
        bitwise(h, hidden)

    asyncio.run(main())


def test_a_job_of_elsewhere_that_failed(server: Any, model: Any, script: Scripted, x: Any) -> None:
    with model.trace(x, blocking=False):
        model[1].output[torch.tensor([7])].save()
    with pytest.raises(IndexError):
        weft.Job.get("job-1", server).result()


def test_a_reading_error_is_not_the_end(model: Any, script: Scripted, x: Any, hidden: Any) -> None:
    tracer, h = sent(model, x)
    wrong = told(replace(script.jobs["job-1"]))
    script.fault("GET", "/api/jobs/job-1/result", lambda r: wrong)
    with pytest.raises(weft.RemoteError):
        tracer.job.result()
    tracer.job.result()
    bitwise(h, hidden)
