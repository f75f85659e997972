"""Jobs of a live server: sent and left, followed, cancelled, fetched from anywhere."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

import weft
from tests.client.live import DOOR, MOMENT, gated_net, soon
from weft.client import events as sse
from weft.client.transport import httpx
from weft.errors import CancelledError, FailedRunError, NoSuchError, NotFinishedError
from weft.testing.same import bitwise
from weft.wire.messages import EndEvent, LogEvent, ProgressEvent, StateEvent


def sent(gated: Any, x: Any) -> tuple[Any, Any]:
    with gated.trace(x, blocking=False) as tracer:
        tracer.log("before the gate", gated[0].output[0, 0])
        h = gated[1].output.save("h")
        tracer.log("behind it", gated[1].output[0, 0])
    return tracer, h


@pytest.fixture
def slow(live: Any) -> Any:
    return weft.Model("slow", remote=live.url)


@pytest.fixture
def beyond(x: Any) -> torch.Tensor:
    """What comes through the gate for `x`: `[3, 8]`."""
    with torch.no_grad():
        return gated_net()[0](x)


def test_a_job_from_being_sent_to_its_result(gated: Any, x: Any, beyond: Any, capsys: Any) -> None:
    with DOOR.closed():
        tracer, h = sent(gated, x)
        assert isinstance(tracer.job, weft.Job)
        DOOR.reached.wait()
        status = tracer.job.status()
        assert (status.state, status.attempts, status.model) == ("running", 1, "gated")
        assert status.price and status.price.saved_bytes == 3 * 8 * 4 and not status.result
        assert not status.look
        with pytest.raises(NotFinishedError, match=r"job\.result\(\)"):
            h + 1
        with pytest.raises(NotFinishedError):
            tracer.job.delete()
        with pytest.raises(NotFinishedError, match=r"running after 0\.05 s"):
            tracer.job.wait(0.05)
    results = tracer.job.result()
    assert type(h) is torch.Tensor and results["h"] is h and tracer.job.result("h") is h
    bitwise(h, beyond)
    assert capsys.readouterr().out.count("behind it") == 1
    status = tracer.job.status()
    assert status.state == "done" and set(status.stages) >= {"price", "queue", "run"}
    assert status.result and status.result.names == ("h",) and tracer.stages == status.stages
    assert status.expires and status.expires > status.created
    with pytest.raises(NoSuchError, match="it saved: h"):
        tracer.job.result("k")


def test_events_tell_its_life_as_it_happens(gated: Any, x: Any, beyond: Any) -> None:
    with DOOR.closed():
        tracer, _ = sent(gated, x)
        told = []
        for event in tracer.job.events():
            told.append(event)
            if isinstance(event, ProgressEvent):
                DOOR.open()
    progress = [(event.done, event.total) for event in told if isinstance(event, ProgressEvent)]
    assert progress in ([(1, 2)], [(1, 2), (2, 2)])  # before the gate, and perhaps behind it
    states = [event.state for event in told if isinstance(event, StateEvent)]
    assert states == ["received", "queued", "running"]
    logs = [event.text for event in told if isinstance(event, LogEvent)]
    assert logs == [f"{where} {float(beyond[0, 0])}" for where in ("before the gate", "behind it")]
    assert isinstance(told[-1], EndEvent) and told[-1].job.state == "done"
    again = list(tracer.job.events())
    assert again == told


def test_a_log_arrives_while_the_job_runs(
    live: Any, gated: Any, x: Any, beyond: Any, monkeypatch: Any
) -> None:
    printed = []

    def heard(text: str, **_: Any) -> None:
        printed.append((text, live.ledger.jobs("local")[0].state))
        DOOR.open()  # else the job would never go on

    monkeypatch.setattr("builtins.print", heard)
    with DOOR.closed(), gated.trace(x) as tracer:
        tracer.log("it is", gated[0].output[0, 0])
        gated[1].output.save()
    assert printed == [(f"it is {float(beyond[0, 0])}", "running")]


def test_a_job_is_cancelled_while_it_waits(gated: Any, x: Any) -> None:
    with DOOR.closed():
        first, _ = sent(gated, x)
        DOOR.reached.wait()
        second, h = sent(gated, x)
        soon(lambda: second.job.status().state == "queued")
        assert second.job.status().ahead == 1
        assert second.job.cancel().state == "cancelled"
        with pytest.raises(FailedRunError, match="cancelled"):
            h + 1
        for _ in range(2):
            with pytest.raises(CancelledError):
                second.job.result()
    assert first.job.wait().state == "done"
    assert first.job.cancel().state == "done"  # what is over stays as it is


def slowly(model: Any, **options: Any) -> Any:
    """A block that looks at a hundred places, one after another."""
    with model.trace(torch.ones(2), **options) as tracer:
        tracer.log("begun", model[0].input)
        weft.save([model[n].output for n in range(100)], name="all")
    return tracer


def test_a_job_is_cancelled_while_it_runs(slow: Any) -> None:
    with DOOR.closed(MOMENT):
        tracer = slowly(slow, blocking=False)
        DOOR.reached.wait()
        assert tracer.job.cancel().state == "running"
        assert tracer.job.wait().state == "cancelled"
    with pytest.raises(CancelledError):
        tracer.job.result()


def test_ctrl_c_cancels_the_job_that_is_waited_for(live: Any, slow: Any, monkeypatch: Any) -> None:
    begun = threading.Event()

    def interrupt() -> None:
        begun.wait()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    monkeypatch.setattr("builtins.print", lambda *text, **_: begun.set())
    thread = threading.Thread(target=interrupt)
    with DOOR.closed(MOMENT):
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            slowly(slow)
        job = live.ledger.jobs("local")[0]
        assert weft.Job.get(job.id, live.url).wait().state == "cancelled"
    thread.join()


ELSEWHERE = """
import json, sys, weft
job = weft.Job.get(sys.argv[1])
print(job.status().state, flush=True)
h = job.result("h")
print(json.dumps([job.log, h.tolist(), list(job.result()), job.status().state]))
job.delete()
"""


def test_a_job_is_fetched_from_another_process(
    live: Any, gated: Any, x: Any, beyond: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("WEFT_HOST", live.url)
    with DOOR.closed():
        tracer, _ = sent(gated, x)
        DOOR.reached.wait()
        other = subprocess.Popen(
            [sys.executable, "-c", ELSEWHERE, tracer.job.id], stdout=subprocess.PIPE, text=True
        )
        assert other.stdout is not None and other.stdout.readline() == "running\n"
    out, _ = other.communicate(timeout=60)
    log, h, names, after = json.loads(out.splitlines()[-1])
    assert other.returncode == 0 and after == "done" and names == ["h"]
    assert "before the gate" in log[0] and "behind it" in log[-1]
    bitwise(torch.tensor(h), beyond)
    with pytest.raises(NoSuchError):  # the other one has removed it
        weft.Job.get(tracer.job.id, live.url)


def test_a_job_that_nobody_has_is_named(live: Any) -> None:
    with pytest.raises(NoSuchError) as caught:
        weft.Job.get("0" * 26, live.url)
    assert caught.value.code == "no-such"


def test_events_have_numbers_and_resume_behind_the_last(live: Any, gated: Any, x: Any) -> None:
    tracer, _ = sent(gated, x)
    tracer.job.wait()
    path = f"{live.url}/api/jobs/{tracer.job.id}/events"
    with httpx().Client(headers={"Authorization": f"Bearer {live.key}"}) as client:

        def numbers(**headers: str) -> list[int | None]:
            parser = sse.Parser()
            return [m.id for m in parser.feed(client.get(path, headers=headers).content)]

        whole = numbers()
        assert whole == list(range(1, len(whole) + 1))
        for last in range(len(whole) - 1):
            assert numbers(**{"Last-Event-ID": str(last)}) == whole[last:]
