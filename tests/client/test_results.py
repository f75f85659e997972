"""What comes back: checked, resumed, in the right form."""

from __future__ import annotations

import io
import sys
from typing import Any

import httpx
import pytest
import torch

import weft
from tests.client.scripted import Scripted, Stream
from weft.client import progress, results, sync
from weft.client.core import Talk
from weft.errors import NoSuchError, ResultChangedError, ServerAwayError
from weft.settings import Settings
from weft.testing.same import bitwise

RESULT = "/api/jobs/job-1/result"


def run(model: Any, x: Any) -> Any:
    with model.trace(x):
        return model[1].output.save("h")


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result is a large one."""
    monkeypatch.setattr(results, "LARGE", 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int64", "bool", "complex64"])
def test_every_dtype_comes_back(model: Any, x: Any, hidden: Any, dtype: str) -> None:
    to = getattr(torch, dtype)
    with model.trace(x):
        h = model[1].output.to(to).save()
    bitwise(h, hidden.to(to))


def test_containers_come_back_in_their_form(model: Any, x: Any, hidden: Any) -> None:
    with model.trace(x) as tracer:
        h = model[1].output
        saved = weft.save({"a": [h, h + 1], "b": (h * 2,)}, name="all")
    bitwise(saved["a"][0], hidden), bitwise(saved["a"][1], hidden + 1)
    bitwise(saved["b"][0], hidden * 2)
    assert tracer.results["all"] is saved and type(saved["b"]) is tuple


def test_a_client_tensor_that_was_written_is_filled(model: Any, x: Any, hidden: Any) -> None:
    kept = torch.zeros(2, 3, 8)
    with model.trace(x):
        kept[1] = model[1].output
    bitwise(kept, torch.stack([torch.zeros(3, 8), hidden]))


def test_the_place_where_the_pass_ended_is_told(model: Any, x: Any) -> None:
    with model.trace(x) as tracer:
        model[1].output.save()
    assert tracer.ended is not None and tracer.ended.path == "1"


def test_time_and_traffic_are_told(model: Any, script: Scripted, x: Any) -> None:
    with model.trace(x) as tracer:
        model[1].output.save()
    assert tracer.stages["run"] == 0.25 and tracer.stages["round trip"] >= 0
    sent = sum(len(call.content) for call in script.calls)
    assert tracer.traffic.up == sent > 0
    assert tracer.traffic.down > len(script.results["job-1"])
    assert tracer.where == "http://scripted:1"


# -- what is not as it was said ------------------------------------------------------------------


def changed(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("how", [changed, lambda d: d[:-1], lambda d: d + b"x", lambda d: b""])
def test_a_result_that_is_another_is_refused(
    model: Any, script: Scripted, x: Any, how: Any
) -> None:
    script.fault("GET", RESULT, lambda r: httpx.Response(200, content=how(script.results["job-1"])))
    with pytest.raises(ResultChangedError, match="SHA-256"):
        run(model, x)


def test_a_large_result_that_is_another_is_refused(
    model: Any, script: Scripted, x: Any, large: None
) -> None:
    def other(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Stream([changed(script.results["job-1"])]))

    script.fault("GET", RESULT, other)
    with pytest.raises(ResultChangedError, match="SHA-256"):
        run(model, x)


def test_a_large_result_that_is_too_long_is_not_read_to_its_end(
    model: Any, script: Scripted, x: Any, large: None
) -> None:
    def endless(request: httpx.Request) -> httpx.Response:
        data = script.results["job-1"]
        return httpx.Response(200, stream=Stream([data, b"x", AssertionError("read on")]))  # type: ignore[list-item]

    script.fault("GET", RESULT, endless)
    with pytest.raises(ResultChangedError):
        run(model, x)


# -- large ones ----------------------------------------------------------------------------------


def cut_at(script: Scripted, *sizes: int) -> None:
    """The result's connection breaks after so many bytes, again and again."""

    def cut(size: int) -> Any:
        def broken(request: httpx.Request) -> httpx.Response:
            whole = script._result(request, "job-1")
            data = b"".join(whole.stream)  # type: ignore[arg-type]
            headers = {k: v for k, v in whole.headers.items() if k == "content-range"}
            pieces: list[Any] = [data[:size], httpx.ReadError("cut")]
            return httpx.Response(whole.status_code, headers=headers, stream=Stream(pieces))

        return broken

    for size in sizes:
        script.fault("GET", RESULT, cut(size))


def test_a_large_result_goes_on_where_it_broke(
    model: Any, script: Scripted, x: Any, hidden: Any, large: None
) -> None:
    cut_at(script, 100, 0, 30)
    bitwise(run(model, x), hidden)
    ranges = [call.headers.get("range") for call in script.said("GET", RESULT)]
    assert ranges == [None, "bytes=100-", "bytes=100-", "bytes=130-"]
    sha = script.jobs["job-1"].result.sha256  # type: ignore[union-attr]
    assert script.said("GET", RESULT)[-1].headers["if-range"] == f'"{sha}"'


def test_a_large_result_that_changed_in_between_is_refused(
    model: Any, script: Scripted, x: Any, large: None
) -> None:
    cut_at(script, 100)
    whole = lambda r: httpx.Response(200, stream=Stream([script.results["job-1"]]))
    script.fault("GET", RESULT, whole)
    script.faults.sort(key=lambda fault: fault[2] is whole)
    with pytest.raises(ResultChangedError, match="not the one"):
        run(model, x)


def test_a_server_that_stays_away_in_between_is_given_up(
    model: Any, script: Scripted, x: Any, large: None
) -> None:
    cut_at(script, *[100] + [0] * 200)
    with pytest.raises(ServerAwayError):
        run(model, x)


def test_named_saves_come_alone(
    server: Any, model: Any, script: Scripted, x: Any, hidden: Any
) -> None:
    with model.trace(x):
        model[0].output.save("first")
        model[1].output.save("a name/with?signs")
    steps = results.fetch_named(Talk(server), "job-1", ["a name/with?signs"])
    saved = sync.run(server, steps)
    assert list(saved) == ["a name/with?signs"]
    bitwise(saved["a name/with?signs"], hidden)


def test_a_job_elsewhere_fetches_only_what_it_is_asked_for(
    server: Any, model: Any, script: Scripted, x: Any, hidden: Any, large: None
) -> None:
    with model.trace(x):
        model[0].output.save("first")
        model[1].output.save("second")
    job = weft.Job.get("job-1", server)
    before = len(script.said("GET", RESULT))
    bitwise(job.result("second"), hidden)
    (call,) = script.said("GET", RESULT)[before:]
    assert call.url.params.get_list("name") == ["second"]


def test_a_name_that_was_not_saved_is_named(server: Any, model: Any, x: Any) -> None:
    run(model, x)
    with pytest.raises(NoSuchError, match="it saved: h"):
        weft.Job.get("job-1", server).result("k")


# -- the progress bar ----------------------------------------------------------------------------


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def watched(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """A terminal, and bars for all sizes. Not a fixture: pytest gives each phase its own stderr."""
    monkeypatch.setattr(progress, "LARGE", 1)
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def test_a_bar_shows_on_a_terminal(
    model: Any, x: Any, hidden: Any, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = watched(monkeypatch)
    bitwise(run(model, x), hidden)
    assert "result" in screen.getvalue()


def test_no_bar_without_a_terminal(
    model: Any, x: Any, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LARGE", 1)
    plain = io.StringIO()
    monkeypatch.setattr(sys, "stderr", plain)
    run(model, x)
    assert plain.getvalue() == ""


def test_no_bar_where_it_is_not_wanted(
    script: Scripted, net: Any, x: Any, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = watched(monkeypatch)
    server = script.server(progress=False)
    run(weft.Model(net, remote=server), x)  # type: ignore[arg-type]
    server.close()
    assert screen.getvalue() == ""


def test_no_bar_for_what_is_small() -> None:
    assert not progress._wanted(Settings(), 1000)
