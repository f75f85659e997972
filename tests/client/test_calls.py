"""Calls that do not go well at once: tried again, refused, explained."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import torch

import weft
from tests.client.scripted import Scripted, failing, later, refused, silent, told
from weft.errors import (
    AccessError,
    LimitError,
    RemoteError,
    ServerAwayError,
    VersionMismatchError,
    WeftError,
    WrongModelError,
)
from weft.testing.same import bitwise
from weft.wire.messages import ErrorReport


def run(model: Any, x: Any) -> Any:
    with model.trace(x):
        return model[1].output.save()


@pytest.mark.parametrize("fault", [refused, silent, lambda r: httpx.Response(502)])
@pytest.mark.parametrize(
    "path", ["/api/hello", "/api/models", "/api/jobs", "/api/jobs/job-1/result"]
)
def test_a_call_that_broke_is_made_again(
    model: Any, script: Scripted, x: Any, hidden: Any, path: str, fault: Any
) -> None:
    script.fault("POST" if path == "/api/jobs" else "GET", path, fault, times=2)
    bitwise(run(model, x), hidden)
    assert not script.faults and len(script.jobs) == 1


def test_pauses_grow_and_end_with_the_time_there_is(script: Scripted, net: Any, x: Any) -> None:
    server = script.server(retry_seconds=10.0)
    model = weft.Model(net, remote=server)  # type: ignore[arg-type]
    run(model, x)
    script.fault("POST", "/api/jobs", refused, times=1000)
    began = script.clock.now
    with pytest.raises(ServerAwayError, match="http://scripted:1") as caught:
        run(model, x)
    assert 8 <= script.clock.now - began <= 10
    assert script.clock.slept[0] <= 0.05 and 1 <= max(script.clock.slept) <= 2
    assert "weft serve" in str(caught.value) and "WEFT_HOST" in str(caught.value)
    assert __file__ in str(caught.value.line)
    server.close()


def test_a_server_that_never_was_there_is_given_up_sooner(script: Scripted, net: Any) -> None:
    server = script.server(retry_seconds=1000.0, connect_seconds=3.0)
    script.fault("GET", "/api/hello", refused, times=1000)
    began = script.clock.now
    with pytest.raises(ServerAwayError):
        weft.models(server)  # type: ignore[arg-type]
    assert script.clock.now - began <= 3
    server.close()


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_says_when_to_come_back(
    model: Any, script: Scripted, x: Any, hidden: Any, status: int
) -> None:
    script.fault("POST", "/api/jobs", later("7", status=status))
    bitwise(run(model, x), hidden)
    assert script.clock.slept == [7.0]


def test_a_pause_longer_than_the_time_there_is_raises(model: Any, script: Scripted, x: Any) -> None:
    script.fault("POST", "/api/jobs", later("70"))
    with pytest.raises(LimitError, match="too many jobs wait"):
        run(model, x)
    assert not script.clock.slept


def test_a_refusal_that_names_no_time_raises_at_once(model: Any, script: Scripted, x: Any) -> None:
    script.fault("POST", "/api/jobs", later("", code="model-not-ready", status=503))
    with pytest.raises(RemoteError, match="too many"):
        run(model, x)
    assert not script.clock.slept


def test_other_protocols_are_refused_with_both_versions(
    model: Any, script: Scripted, x: Any
) -> None:
    script.protocols = (2, 3)
    with pytest.raises(VersionMismatchError) as caught:
        run(model, x)
    for part in (weft.__version__, "protocol 1", "9.9", "2, 3", "update weft"):
        assert part in str(caught.value)
    assert not script.said("POST")


def test_the_handshake_is_made_once(model: Any, script: Scripted, x: Any) -> None:
    run(model, x), run(model, x)
    assert len(script.said("GET", "/api/hello")) == 1


def test_something_else_at_the_address_is_named(model: Any, script: Scripted, x: Any) -> None:
    script.fault("GET", "/api/hello", lambda r: httpx.Response(404, text="<html>nginx</html>"))
    with pytest.raises(
        RemoteError, match=r"scripted:1 answered GET /api/hello with status 404"
    ) as e:
        run(model, x)
    assert "Weft server" in str(e.value)


def test_a_text_that_is_no_message_is_named(model: Any, script: Scripted, x: Any) -> None:
    script.fault("GET", "/api/hello", lambda r: httpx.Response(200, text="<html>hello</html>"))
    with pytest.raises(RemoteError, match="message"):
        run(model, x)


def test_an_error_keeps_class_line_and_way_out(model: Any, script: Scripted, x: Any) -> None:
    report = {"code": "access", "message": "no key\x1b[2J", "line": "a.py:3: h", "fix": "have one"}
    script.fault("POST", "/api/jobs", failing(**report))
    with pytest.raises(AccessError) as caught:
        run(model, x)
    error = caught.value
    assert (error.line, error.fix) == ("a.py:3: h", "have one")
    assert "\x1b" not in str(error) and "no key" in str(error)


def test_a_code_of_a_newer_server_is_an_error_all_the_same(
    model: Any, script: Scripted, x: Any
) -> None:
    script.fault("POST", "/api/jobs", failing(code="not known yet", message="it is so"))
    with pytest.raises(RemoteError, match="it is so"):
        run(model, x)


def test_the_key_goes_along_and_in_no_address(model: Any, script: Scripted, x: Any) -> None:
    run(model, x)
    for call in script.calls:
        assert call.headers["authorization"] == "Bearer weft_key"
        assert call.headers["weft-protocol"] == "1"
        assert call.headers["accept-encoding"] == "identity"
        assert "weft_key" not in str(call.url)


def test_a_model_that_is_not_there_is_named_with_those_that_are(
    script: Scripted, server: Any, x: Any
) -> None:
    other = weft.Model(torch.nn.Linear(4, 4), remote=server)
    with pytest.raises(WrongModelError, match="it serves: net"), other.trace(x):
        other.output.save()


def test_models_print_as_a_table(server: Any) -> None:
    found = weft.models(server)
    assert [model.id for model in found] == ["net"]
    head, row = repr(found).splitlines()
    assert head.split() == ["id", "class", "dtype", "parameters", "state", "memory", "last", "use"]
    assert row.split() == ["net", "Sequential", "float32", "58", "ready"]


def test_a_model_that_failed_to_load_says_why(model: Any, script: Scripted, x: Any) -> None:
    from msgspec.structs import replace

    from weft.wire.messages import ModelList

    broken = [replace(info, state="failed", reason="no\x07 memory") for info in script._infos()]
    script.fault("GET", "/api/models", lambda r: told(ModelList(models=tuple(broken))))
    with pytest.raises(WeftError, match=r"no\\x07 memory"):
        run(model, x)


def test_a_model_that_loads_is_waited_for(
    model: Any, script: Scripted, x: Any, hidden: Any
) -> None:
    from msgspec.structs import replace

    from weft.wire.messages import ModelList

    loading = [replace(info, state="loading", fingerprint="") for info in script._infos()]
    script.fault("GET", "/api/models", lambda r: told(ModelList(models=tuple(loading))), times=3)
    bitwise(run(model, x), hidden)
    assert script.clock.slept == [0.5] * 3


def test_an_error_report_in_json_is_read(model: Any, script: Scripted, x: Any) -> None:
    report = ErrorReport(code="limit", message="too much")
    from weft.wire.messages import encode

    answer = httpx.Response(
        413, content=encode(report, "json"), headers={"content-type": "application/json"}
    )
    script.fault("POST", "/api/jobs", lambda r: answer)
    with pytest.raises(LimitError, match="too much"):
        run(model, x)
