"""Sending a job: once, with its constants there, and its events to their end."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
import torch

import weft
from tests.client.scripted import Scripted, event, no_such, refused, silent, told
from weft.client import jobs, sync
from weft.client.core import Talk
from weft.errors import MessageError, NoSuchError, RunError, ServerAwayError
from weft.testing.same import bitwise
from weft.wire.messages import ErrorReport, JobInfo, StateEvent, Submit, decode, encode


def run(model: Any, x: Any) -> Any:
    with model.trace(x):
        return model[1].output.save()


def submits(script: Scripted) -> list[Submit]:
    return [decode(call.content, Submit) for call in script.said("POST", "/api/jobs")]


def test_an_answer_that_got_lost_does_not_make_a_second_job(
    model: Any, script: Scripted, x: Any, hidden: Any
) -> None:
    def lost(request: httpx.Request) -> httpx.Response:
        script.served(request)
        return silent(request)

    script.fault("POST", "/api/jobs", lost, times=2)
    bitwise(run(model, x), hidden)
    first, *others = submits(script)
    assert len(others) == 2 and {s.request_id for s in others} == {first.request_id}
    assert len(script.jobs) == 1


def test_two_blocks_are_two_requests(model: Any, script: Scripted, x: Any) -> None:
    run(model, x), run(model, x)
    assert len({s.request_id for s in submits(script)}) == len(script.jobs) == 2


def test_what_goes_with_a_job(model: Any, script: Scripted, x: Any) -> None:
    run(model, x)
    (submit,) = submits(script)
    assert submit.model == "net" and submit.strict and not submit.look
    assert submit.fingerprint == script.models["net"][1].fingerprint
    assert any(__file__ in where.file for where in submit.graph.where)


# -- events that break off -----------------------------------------------------------------------


def whole_stream(script: Scripted, job: str) -> bytes:
    return b"".join(script._said(job, 0))


def heard(server: Any, job: str) -> list[tuple[int, str]]:
    steps = jobs.events(Talk(server), job)
    return [(number, type(event).__name__) for number, event in sync.each(server, steps)]


def test_events_that_break_anywhere_are_all_there_once(
    model: Any, script: Scripted, x: Any
) -> None:
    with model.trace(x) as tracer:
        for number in range(3):
            tracer.log("line", number)
        model[1].output.save()
    expected = [(1, "StateEvent"), (2, "StateEvent"), (3, "LogEvent"), (4, "LogEvent")]
    expected += [(5, "LogEvent"), (6, "EndEvent")]
    size = len(whole_stream(script, "job-1"))
    for cut in range(0, size, 17):
        script.pieces = [cut, cut // 2, 3]
        assert heard(model._places.pick(None).backend.server, "job-1") == expected, cut


def test_a_block_goes_on_where_its_stream_broke(
    model: Any, script: Scripted, x: Any, hidden: Any, capsys: Any
) -> None:
    for cut in range(5, 400, 31):
        script.pieces = [cut]
        with model.trace(x) as tracer:
            tracer.log("once")
            h = model[1].output.save()
        bitwise(h, hidden)
        assert capsys.readouterr().out == "once\n", cut
    assert len(script.jobs) == len(range(5, 400, 31))


def test_going_on_says_what_came_last(model: Any, script: Scripted, x: Any) -> None:
    job = JobInfo(id="job-1", state="received", model="net", created=0.0)
    begun = [event("accepted", encode(job, "json"))]
    begun += [event("state", encode(StateEvent(state="queued"), "json"), 1)]

    def cut(request: httpx.Request) -> httpx.Response:
        script.served(request)
        script.pieces = [len(b"".join(begun))]
        return script._stream(begun)

    script.fault("POST", "/api/jobs", cut)
    run(model, x)
    (again,) = script.said("GET", "/api/jobs/job-1/events")
    assert again.headers["last-event-id"] == "1"


def test_a_server_that_stays_away_leaves_the_way_to_the_job(
    model: Any, script: Scripted, x: Any
) -> None:
    script.pieces = [250]
    script.fault("GET", "/api/jobs/job-1/events", refused, times=1000)
    with pytest.raises(
        ServerAwayError, match=r"weft.Job.get\('job-1', remote='http://scripted:1'\)"
    ):
        run(model, x)


def test_a_job_that_is_gone_is_an_error(model: Any, script: Scripted, x: Any) -> None:
    script.pieces = [250]
    script.fault("GET", "/api/jobs/job-1/events", lambda r: no_such())
    with pytest.raises(NoSuchError):
        run(model, x)


def test_an_end_that_is_said_once_more_has_no_number(
    server: Any, model: Any, script: Scripted, x: Any
) -> None:
    run(model, x)
    end = event("end", encode(script.notes["job-1"][-1], "json"))
    script.fault("GET", "/api/jobs/job-1/events", lambda r: script._stream([end]))
    assert heard(server, "job-1") == [(1, "EndEvent")]


def test_events_of_a_newer_server_are_passed_over(
    server: Any, model: Any, script: Scripted, x: Any
) -> None:
    run(model, x)
    new = [event("mood", b'{"good": true}', 1), *script._said("job-1", 1)]
    script.fault("GET", "/api/jobs/job-1/events", lambda r: script._stream(new))
    assert heard(server, "job-1") == [(2, "StateEvent"), (3, "EndEvent")]


# -- errors of the run ---------------------------------------------------------------------------


def test_the_models_own_error_keeps_its_class_and_the_users_line(
    model: Any, script: Scripted, x: Any
) -> None:
    with pytest.raises(IndexError) as caught, model.trace(x):
        h = model[1].output[torch.tensor([7])].save()
    assert isinstance(caught.value, RunError) and caught.value.kind == "IndexError"
    with pytest.raises(weft.WeftError, match="IndexError"):
        h + 1


# -- constants -----------------------------------------------------------------------------------


def with_constant(model: Any, x: Any, constant: torch.Tensor) -> torch.Tensor:
    with model.trace(x):
        h = (model[1].output.sum() + constant).save()
    return h


def test_a_large_constant_is_uploaded_once(
    model: Any, script: Scripted, x: Any, hidden: Any
) -> None:
    large = torch.randn(100_000)
    for _ in range(3):
        bitwise(with_constant(model, x, large.clone()), hidden.sum() + large)
    (put,) = script.said("PUT")
    assert len(put.content) > 400_000
    assert all(len(s.tensors) < 1000 for s in submits(script))
    assert len(script.said("POST", "/api/constants/missing")) == 1


def test_what_the_server_has_already_is_not_uploaded(script: Scripted, net: Any, x: Any) -> None:
    large = torch.randn(100_000)
    for _ in range(2):  # another process with the same key knows nothing of the first
        server = script.server()
        with_constant(weft.Model(net, remote=server), x, large)  # type: ignore[arg-type]
        server.close()
    assert len(script.said("PUT")) == 1


def test_a_constant_that_the_server_lost_is_sent_again(
    model: Any, script: Scripted, x: Any, hidden: Any
) -> None:
    large = torch.randn(100_000)
    with_constant(model, x, large)
    script.constants.clear()
    bitwise(with_constant(model, x, large), hidden.sum() + large)
    assert len(script.said("PUT")) == 2 and len(script.jobs) == 2


def test_a_server_that_keeps_losing_constants_is_given_up(
    model: Any, script: Scripted, x: Any
) -> None:
    large = torch.randn(100_000)

    def loses(request: httpx.Request) -> httpx.Response:
        script.constants.clear()
        return script.served(request)

    script.fault("POST", "/api/jobs", loses, times=100)
    with pytest.raises(MessageError, match="losing"):
        with_constant(model, x, large)


def test_a_server_cannot_ask_for_what_is_not_in_the_request(
    model: Any, script: Scripted, x: Any
) -> None:
    report = ErrorReport(code="no-such", message="more", missing=("0" * 64,))
    script.fault("POST", "/api/jobs", lambda r: told(report, 409))
    with pytest.raises(MessageError, match="does not have"):
        run(model, x)


def test_small_constants_go_inside(model: Any, script: Scripted, x: Any, hidden: Any) -> None:
    small = torch.randn(100)
    bitwise(with_constant(model, x, small), hidden.sum() + small)
    assert not script.said("PUT") and not script.said("POST", "/api/constants")


def test_a_broken_upload_is_made_again_in_pieces(
    model: Any, script: Scripted, x: Any, hidden: Any
) -> None:
    large = torch.randn(1_000_000)
    script.fault("PUT", "/api/constants", silent)
    bitwise(with_constant(model, x, large), hidden.sum() + large)
    first, second = script.said("PUT")
    assert first.content == second.content
    assert int(second.headers["content-length"]) == len(second.content)
    assert "transfer-encoding" not in second.headers


# -- giving up -----------------------------------------------------------------------------------


def test_ctrl_c_cancels_the_job(model: Any, script: Scripted, x: Any, monkeypatch: Any) -> None:
    def interrupted(given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weft.client.remote.print_log", interrupted)
    with pytest.raises(KeyboardInterrupt), model.trace(x):
        model[1].output.save()
    assert len(script.said("POST", "/api/jobs/job-1/cancel")) == 1


def test_ctrl_c_ends_even_if_the_server_does_not_hear_it(
    model: Any, script: Scripted, x: Any, monkeypatch: Any
) -> None:
    def interrupted(given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weft.client.remote.print_log", interrupted)
    script.fault("POST", "/api/jobs/job-1/cancel", refused, times=10)
    with pytest.raises(KeyboardInterrupt), model.trace(x):
        model[1].output.save()
    assert not script.clock.slept


def test_a_cancelled_task_cancels_the_job(model: Any, script: Scripted, x: Any) -> None:
    async def main() -> None:
        def stop(request: httpx.Request) -> httpx.Response:
            task.cancel()
            return refused(request)  # so that something is awaited

        async def block() -> None:
            async with model.trace(x):
                model[1].output.save()

        script.pieces = [250]
        script.fault("GET", "/api/jobs/job-1/events", stop)
        task = asyncio.create_task(block())
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert len(script.said("POST", "/api/jobs/job-1/cancel")) == 1
