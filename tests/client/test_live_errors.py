"""What a user reads when it does not go well on a live server: class, code, line, way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.client.live import DOOR, check_nothing_left, gated_net, held, plain_net
from tests.leftovers import running, threads_started
from weft import errors
from weft.client import close
from weft.testing.same import bitwise
from weft.wire.messages import encode


class Moody(nn.Module):
    """Raises, in a real pass, what it was last told to."""

    mood: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor and Moody.mood is not None:
            mood, Moody.mood = Moody.mood, None
            return mood()
        return x * 1


class OwnError(Exception):
    """A class that a client does not know."""


def raising(error: BaseException) -> Any:
    def mood() -> None:
        raise error

    return mood


def too_much() -> torch.Tensor:
    """More than any machine has."""
    return torch.empty(1 << 46)


@pytest.fixture(scope="module")
def _strict(tmp_path_factory: Any) -> Iterator[Any]:
    """A server with narrow limits."""
    from weft.testing.service import serve

    state = tmp_path_factory.mktemp("strict")
    limits: Any = {
        "body_bytes": 200_000,
        "constant_bytes": 100_000,
        "log_bytes": 100,
        "memory_bytes": 2_000_000,
        "nodes": 200,
        "queued_jobs": 2,
        "result_bytes": 50_000,
    }
    models = {"net": plain_net(), "moody": nn.Sequential(nn.Linear(4, 8), Moody())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(state))
        with serve({**models, "gated": gated_net()}, **limits) as server:
            yield server, state


@pytest.fixture
def strict(_strict: Any, monkeypatch: Any) -> Iterator[str]:
    server, state = _strict
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    before = held()
    yield server.url
    close()
    check_nothing_left(before)


def line_of(error: BaseException, part: str) -> bool:
    """Whether the error names the line of this file that has `part` in it."""
    assert isinstance(error, weft.WeftError)
    return f"{__file__}:" in str(error.line) and part in str(error.line)


def goes_on(url: str, x: Any, hidden: Any) -> None:
    """The server is as well as before."""
    model = weft.Model("net", remote=url)
    with model.trace(x):
        h = model[1].output.save()
    bitwise(h, hidden)


# -- limits --------------------------------------------------------------------------------------


def test_a_result_that_is_too_large_says_what_to_do(strict: str, x: Any, hidden: Any) -> None:
    model = weft.Model("net", remote=strict)
    refused = pytest.raises(errors.ResultTooLargeError, match="result_bytes")
    with refused as caught, model.trace(x):
        h = model[1].output.flatten()
        wide = h[:, None] + h.new_zeros(24, 1000)
        h = wide.save()  # large
    error = caught.value
    assert error.code == "result-too-large" and isinstance(error, errors.LimitError)
    assert "saves 93.8 KB" in error.message and "result_bytes is 48.8 KB" in error.message
    assert line_of(error, "# large")
    assert error.fix and "slice" in error.fix
    with pytest.raises(errors.FailedRunError, match="result_bytes"):
        h + 1
    goes_on(strict, x, hidden)


def test_a_graph_of_too_many_nodes(strict: str, x: Any, hidden: Any) -> None:
    model = weft.Model("net", remote=strict)
    with pytest.raises(errors.LimitError, match="nodes") as caught, model.trace(x):
        h = model[1].output
        for _ in range(300):
            h = h + 1
        h.save()
    assert caught.value.code == "limit" and "200" in str(caught.value)
    goes_on(strict, x, hidden)


def test_an_operation_that_keeps_too_much(strict: str, x: Any, hidden: Any) -> None:
    model = weft.Model("net", remote=strict)
    with pytest.raises(errors.LimitError, match="memory_bytes") as caught, model.trace(x):
        h = model[1].output.flatten()
        h = h[:, None] + h.new_zeros(24, 1_000_000)  # wide
        h.sum().save()
    assert line_of(caught.value, "# wide")
    goes_on(strict, x, hidden)


def test_a_constant_that_is_too_large(strict: str, x: Any, hidden: Any) -> None:
    model, large = weft.Model("net", remote=strict), torch.ones(10_000_000)
    with pytest.raises(errors.LimitError, match="constant_bytes") as caught, model.trace(x) as t:
        (model[1].output.sum() + large).save()  # too much
    assert line_of(caught.value, "# too much") and caught.value.fix
    assert "40,000,000 bytes" in caught.value.message and "100,000" in caught.value.message
    assert t.traffic.up == 0
    goes_on(strict, x, hidden)


def test_an_input_that_is_too_large(strict: str, net: Any, x: Any, hidden: Any) -> None:
    model, large = weft.Model(net, remote=strict), torch.ones(1_000_000, 4)
    with pytest.raises(errors.LimitError, match="body_bytes is 200,000"), model.trace(large):
        model[1].output.sum().save()
    goes_on(strict, x, hidden)


@pytest.mark.parametrize("size", [60_000, 10_000_000])
def test_the_server_says_so_too(
    strict: str, x: Any, hidden: Any, monkeypatch: Any, size: int
) -> None:
    """Where a client does not count, in the middle of a body too."""
    monkeypatch.setattr("weft.client.remote.fitting", lambda message, limits: encode(message))
    model = weft.Model("net", remote=strict)
    with pytest.raises(errors.LimitError, match="body_bytes"), model.trace(torch.ones(size, 4)):
        model[1].output.sum().save()
    with pytest.raises(errors.LimitError, match="constant_bytes"), model.trace(x):
        (model[1].output.sum() + torch.ones(size)).save()
    goes_on(strict, x, hidden)


def test_a_job_that_runs_too_long(x: Any, hidden: Any) -> None:
    from weft.testing.service import serve

    before = held()
    with serve({"net": plain_net(), "gated": gated_net()}, run_seconds=5.0) as server:
        model = weft.Model("gated", remote=server.url)
        late = pytest.raises(errors.TimeLimitError, match="run_seconds")
        with DOOR.closed(5.5), late as caught, model.trace(x):
            model[1].output.save()
        assert caught.value.code == "time-limit" and isinstance(caught.value, TimeoutError)
        goes_on(server.url, x, hidden)
    close()
    check_nothing_left(before)


def test_more_jobs_than_may_wait(strict: str, x: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("WEFT_RETRY_SECONDS", "0.1")
    model = weft.Model("gated", remote=strict)
    with DOOR.closed():
        sent = []
        with pytest.raises(errors.LimitError, match="queued_jobs"):
            for _ in range(10):
                with model.trace(x, blocking=False) as tracer:
                    model[1].output.save()
                sent.append(tracer.job)
        for job in sent:
            job.cancel()
    assert 2 <= len(sent) <= 3


def test_a_log_that_is_too_long_is_cut_and_says_so(strict: str, x: Any, capsys: Any) -> None:
    model = weft.Model("net", remote=strict)
    with model.trace(x) as tracer:
        for number in range(20):
            tracer.log("this is line", number, model[1].output[0, 0])
        model[1].output.save()
    assert "log_bytes is 100" in capsys.readouterr().out


# -- the model's own errors ----------------------------------------------------------------------


def moody(url: str, x: Any, mood: Any) -> Any:
    model = weft.Model("moody", remote=url)
    Moody.mood = mood
    with model.trace(x):
        model[1].output.save()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("this cannot be"), ValueError),
        (KeyError("a name"), KeyError),
        (ZeroDivisionError("by nothing"), ZeroDivisionError),
        (NotImplementedError("not yet"), NotImplementedError),
        (RuntimeError("it broke"), RuntimeError),
        (OwnError("its own"), RuntimeError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_the_models_own_exception_can_be_caught_as_what_it_is(
    strict: str, x: Any, hidden: Any, error: Exception, kind: type[Exception]
) -> None:
    with pytest.raises(kind) as caught:
        moody(strict, x, raising(error))
    came = caught.value
    assert isinstance(came, errors.RunError) and isinstance(came, RuntimeError)
    assert came.code == "run" and came.kind == type(error).__name__
    assert str(error.args[0]) in str(came)
    assert f"{__file__}:" in "".join(came.__notes__)  # which block it was
    goes_on(strict, x, hidden)


def test_nothing_of_the_servers_machine_comes_with_it(strict: str, x: Any) -> None:
    secret = OwnError("no file '/srv/secret/place.bin' at http://10.1.2.3/x for 0x7f00deadbeef")
    with pytest.raises(errors.RunError) as caught:
        moody(strict, x, raising(secret))
    told = "".join([str(caught.value), repr(caught.value.__cause__), *caught.value.__notes__])
    for part in ("secret", "place.bin", "10.1.2.3", "deadbeef", "Traceback", "worker/loop"):
        assert part not in told
    assert caught.value.__context__ is None or "Moody" not in repr(caught.value.__context__)


def test_an_operation_that_fails_names_its_line(strict: str, x: Any, hidden: Any) -> None:
    model, index = weft.Model("net", remote=strict), torch.tensor([7])
    with pytest.raises(IndexError) as caught, model.trace(x):
        h = model[1].output
        h[index].save()  # here
    assert line_of(caught.value, "# here") and isinstance(caught.value, errors.RunError)
    goes_on(strict, x, hidden)


def test_a_worker_without_memory(strict: str, x: Any, hidden: Any) -> None:
    with pytest.raises(errors.WorkerMemoryError, match="not enough memory") as caught:
        moody(strict, x, too_much)
    error = caught.value
    assert error.code == "worker-memory" and isinstance(error, MemoryError)
    assert error.fix and "smaller" in error.fix
    goes_on(strict, x, hidden)


# -- what is left --------------------------------------------------------------------------------


def test_a_server_that_ends_is_away_and_leaves_nothing(
    x: Any, hidden: Any, monkeypatch: Any
) -> None:
    from weft.testing.service import serve

    monkeypatch.setenv("WEFT_RETRY_SECONDS", "0.2")
    before = held()
    with threads_started() as threads, serve({"net": plain_net()}) as server:
        goes_on(server.url, x, hidden)
        model = weft.Model("net", remote=server.url)
        with model.trace(x, blocking=False) as tracer:
            model[1].output.save()
        tracer.job.wait()
    for asks in (tracer.job.result, tracer.job.status, lambda: list(tracer.job.events())):
        with pytest.raises(errors.ServerAwayError, match=server.url):
            asks()
    with pytest.raises(errors.ServerAwayError), model.trace(x):
        model[1].output.save()
    close()
    check_nothing_left(before)
    assert running(threads) == []
