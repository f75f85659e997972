"""Health, metrics and what is counted: they say what is so."""

from __future__ import annotations

import errno
import json
import logging
import re
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

import weft
from tests.service.gate import ANN, MODEL, PRINT, House, card_of, submit_of
from weft.cli import main
from weft.service.fleet.places import ledger_of
from weft.service.gateway import health
from weft.service.gateway.metrics import METRICS
from weft.service.jobs.tally import Count, tallied
from weft.service.store.database import is_full
from weft.service.store.interface import Ledger
from weft.service.store.logs import JsonLines, TextLines
from weft.service.store.memory import MemoryLedger
from weft.service.store.sqlite import open_ledger
from weft.settings import Settings
from weft.testing import tiny_path
from weft.testing.service import serve

OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"


@pytest.fixture(params=["memory", "sqlite"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    found: Any = MemoryLedger() if request.param == "memory" else open_ledger(tmp_path / "l.sqlite")
    yield found
    found.close()


@pytest.fixture
def house(tmp_path: Path) -> House:
    found = House(Settings(metrics="loopback"))
    found.ledger.put_card(card_of("other"))
    found.app.gateway.scratch = str(tmp_path)
    return found


# -- counts ---------------------------------------------------------------------------------------


def test_counts_add_up_and_signs_of_life_are_the_last(ledger: Ledger) -> None:
    one = Count("b", (("model", "tiny"), ("state", "done")), 2.0)
    ledger.add_tallies([one, Count("a"), one])
    ledger.add_tallies([Count("a", (), 0.5)])
    assert ledger.tallies() == [Count("a", (), 1.5), replace(one, value=4.0)]
    ledger.beat("checker", 5.0)
    ledger.beat("checker", 7.0)
    ledger.beat("worker tiny", 6.0)
    assert ledger.beats() == {"checker": 7.0, "worker tiny": 6.0}


def test_counts_outlive_the_process_that_made_them(tmp_path: Path) -> None:
    for _ in range(2):
        ledger = open_ledger(tmp_path / "l.sqlite")
        ledger.add_tallies([Count("a")])
        ledger.close()
    ledger = open_ledger(tmp_path / "l.sqlite")
    assert ledger.tallies() == [Count("a", (), 2.0)]
    ledger.close()


def test_a_job_is_counted_once_when_it_is_over(house: House) -> None:
    before = house.ledger.job(house.job())
    assert before is not None
    assert tallied(before, replace(before, state="running")) == []
    done = replace(before, state="done", stages={"run": 0.3}, attempts=1, batch=5, ended=1e12)
    names = [one.name for one in tallied(before, done)]
    assert names.count("weft_jobs_finished_total") == 1
    counted = {(one.name, one.labels): one.value for one in tallied(before, done)}
    model = ("model", before.model)
    assert counted["weft_stage_seconds_bucket", (model, ("stage", "run"), ("le", "0.5"))] == 1
    assert counted["weft_batch_jobs_bucket", (model, ("le", "8"))] == 1
    assert counted["weft_jobs_merged_total", (model,)] == 1
    assert tallied(done, done) == []


# -- metrics --------------------------------------------------------------------------------------


def families(house: House) -> dict[str, Any]:
    said = house.ask("GET", "/metrics", None)
    assert said.status_code == 200, said.text
    assert said.headers["content-type"].startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(said.text)}


def value(family: Any, name: str, **labels: str) -> float:
    (found,) = [
        s.value for s in family.samples if s.name == name and labels.items() <= s.labels.items()
    ]
    return found


def test_metrics_say_what_happened(house: House) -> None:
    house.job(request_id="a")
    house.do()
    house.job(request_id="b")
    house.submit(submit_of(request_id="c"), "weft_wrong")
    found = families(house)
    assert value(found["weft_jobs_finished"], "weft_jobs_finished_total", state="done") == 1
    assert value(found["weft_jobs"], "weft_jobs", state="received") == 1
    stages = found["weft_stage_seconds"]
    assert value(stages, "weft_stage_seconds_count", stage="run") == 1
    assert value(stages, "weft_stage_seconds_bucket", stage="run", le="+Inf") == 1
    requests = found["weft_http_requests"]
    by = {"route": "/api/jobs", "method": "POST"}
    assert value(requests, "weft_http_requests_total", status="201", **by) == 2
    assert value(requests, "weft_http_requests_total", status="401", **by) == 1
    buckets = [s.value for s in stages.samples if s.name.endswith("_bucket")]
    assert buckets and all(count >= 0 for count in buckets)


def test_refusals_are_counted_by_their_limit() -> None:
    house = House(Settings(metrics="loopback", requests_per_minute=2))
    for _ in range(4):
        house.ask("GET", "/api/jobs")
    found = families(house)["weft_refusals"]
    assert value(found, "weft_refusals_total", limit="requests_per_minute") == 2


REFUSED: dict[str, tuple[dict[str, Any], Callable[[House], httpx.Response]]] = {
    "nodes": ({"nodes": 1}, lambda house: house.submit(submit_of())),
    "queued_jobs": ({"queued_jobs": 0}, lambda house: house.submit(submit_of())),
    "body_bytes": ({"body_bytes": 10}, lambda house: house.submit(submit_of())),
    "longest_keep_seconds": (
        {"longest_keep_seconds": 1.0},
        lambda house: house.submit(submit_of(keep_seconds=2.0)),
    ),
    "sessions": (
        {"sessions": 0},
        lambda house: house.ask(
            "POST",
            "/api/sessions",
            json={"request_id": "s", "model": MODEL, "fingerprint": PRINT},
        ),
    ),
    "choices": (
        {"choices": 1},
        lambda house: house.ask(
            "POST", "/v1/completions", json={"model": MODEL, "prompt": [1], "n": 2}
        ),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_counted_under_the_setting_that_was_met(name: str) -> None:
    given, ask = REFUSED[name]
    house = House(Settings(metrics="loopback", **given))
    said = ask(house)
    assert said.status_code in (413, 429), said.text
    assert f"the limit {name} is {given[name]:g}" in said.json()["message"]
    found = families(house)["weft_refusals"]
    assert value(found, "weft_refusals_total", limit=name) == 1


def test_metrics_name_no_owner(house: House) -> None:
    house.job()
    house.do()
    text = house.ask("GET", "/metrics", None).text
    assert "ann" not in text
    assert ANN not in text


def test_metrics_need_a_key_with_the_scope_unless_they_are_open(house: House) -> None:
    assert (
        house.ask("GET", "/metrics", None, headers={"X-Forwarded-For": "1.2.3.4"}).status_code
        == 401
    )
    closed = House()
    assert closed.ask("GET", "/metrics", None).status_code == 401
    assert closed.ask("GET", "/metrics").status_code == 403


def test_the_document_has_every_metric(house: House) -> None:
    rows = re.findall(r"^\| `(weft_\w+)` \| (\w+) \| (.*) \| (.*) \|$", OPERATING.read_text(), re.M)
    told = [
        (name, one.kind, ", ".join(f"`{label}`" for label in one.labels) or "-", one.text)
        for name, one in METRICS.items()
    ]
    assert rows == told
    assert set(families(house)) == set(METRICS)


# -- the log --------------------------------------------------------------------------------------


def test_requests_and_jobs_have_a_line_each(house: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    said = house.submit(submit_of())
    house.do()
    lines = [json.loads(JsonLines("gateway").format(record)) for record in caplog.records]
    (request,) = [line for line in lines if line["message"] == "request"]
    assert request["request"] == said.headers["weft-request-id"]
    assert (request["owner"], request["status"]) == ("ann", 201)
    jobs = [line for line in lines if line["message"] == "job"]
    assert [line["state"] for line in jobs] == ["received", "queued", "running", "done"]
    assert {line["job"] for line in jobs} == {request["job"]} == {said.json()["id"]}
    assert {line["request"] for line in jobs} == {request["request"]}
    assert {(line["owner"], line["model"]) for line in jobs} == {("ann", "tiny")}
    assert all("seconds" in line for line in jobs[1:])
    text = "\n".join(TextLines().format(record) for record in caplog.records)
    for secret in (ANN, "mine.py", "h.save()"):
        assert secret not in text


def test_a_line_of_text_cannot_be_forged() -> None:
    record = logging.LogRecord("weft.gateway", logging.INFO, "", 0, "request", (), None)
    record.path = "/a\n12:00:00 info job state=done"
    line = TextLines().format(record)
    assert "\n" not in line
    assert 'path="' in line


# -- health ---------------------------------------------------------------------------------------


def looked(house: House, path: str = "/health/ready") -> tuple[int, dict[str, str]]:
    house.app.gateway.looked = (-1e9, {})
    said = house.ask("GET", path, None)
    assert said.json()["ready"] is (said.status_code == 200) or path.endswith("live")
    return said.status_code, said.json()["parts"]


def test_a_well_server_is_ready(house: House) -> None:
    status, parts = looked(house)
    assert (status, parts["store"], parts["disk"], parts["models"]) == (
        200,
        "ok",
        "ok",
        "2 of 2 ready",
    )
    assert looked(house, "/health")[0] == 200


def test_it_is_not_ready_while_it_drains_and_lives(house: House) -> None:
    house.app.gateway.drain()
    status, parts = looked(house)
    assert (status, parts["gateway"]) == (503, "draining")
    assert house.ask("GET", "/health/ready", None).headers["retry-after"]
    assert looked(house, "/health/live")[0] == 200
    said = house.submit(submit_of())
    assert said.status_code == 503
    assert int(said.headers["retry-after"]) > 0


def test_it_is_not_ready_where_the_store_cannot_be_written(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(house.ledger, "add_tallies", full)
    status, parts = looked(house)
    assert (status, parts["store"]) == (503, "failing")


def test_it_is_not_ready_where_the_disk_is_full_or_gone(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "LEAST_FREE", 1 << 62)
    assert looked(house)[1]["disk"] == "full"
    house.app.gateway.scratch = "/nowhere/at/all"
    status, parts = looked(house)
    assert (status, parts["disk"]) == (503, "failing")


def test_it_is_not_ready_where_a_process_is_silent(house: House) -> None:
    now = house.app.gateway.clock()
    house.ledger.beat("checker", now)
    house.ledger.beat("worker tiny", now)
    assert looked(house)[0] == 200
    house.ledger.beat("checker", now - 1000)
    assert looked(house)[1]["checker"] == "silent"
    house.ledger.beat("checker", now)
    house.ledger.beat("worker tiny", now - 60)
    status, parts = looked(house)
    assert (status, parts["models"]) == (503, "1 of 2 ready")
    house.job()  # a worker that has a job in hand is not silent
    house.price()
    house.begin()
    assert looked(house)[0] == 200


def test_health_is_not_looked_at_for_each_request(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "KEPT_SECONDS", 100.0)
    for _ in range(20):
        house.ask("GET", "/health", None)
    found = families(house)["weft_health_checks"]
    assert value(found, "weft_health_checks_total") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [(OSError(errno.ENOSPC, "full"), 503), (OSError(errno.EDQUOT, "quota"), 503)]
    + [(OSError(errno.EIO, "broken"), 500)],
)
def test_who_sends_something_to_a_full_disk_is_told_so(
    house: House, monkeypatch: pytest.MonkeyPatch, error: OSError, status: int
) -> None:
    def put(*args: Any, **options: Any) -> bool:
        raise error

    monkeypatch.setattr(house.objects, "put", put)
    said = house.submit(submit_of())
    assert said.status_code == status
    assert ("no room on its disk" in said.json()["message"]) is (status == 503)
    assert ("retry-after" in said.headers) is (status == 503)


def test_sqlite_says_that_the_disk_is_full(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "l.sqlite") as rows:
        rows.execute("PRAGMA max_page_count = 2")
        rows.execute("CREATE TABLE one (text TEXT)")
        with pytest.raises(sqlite3.OperationalError) as full:
            rows.execute("INSERT INTO one VALUES (?)", ("x" * 100_000,))
        with pytest.raises(sqlite3.OperationalError) as other:
            rows.execute("SELECT nothing FROM nowhere")
    rows.close()
    assert is_full(full.value) and not is_full(other.value)


# -- weft doctor and weft status -------------------------------------------------------------------


def reply_of(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def findings(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    status = main(["doctor", "--json", "--port", "0", *words])
    return status, {one["what"]: one for one in json.loads(capsys.readouterr().out)}


def test_the_doctor_finds_a_machine_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_ledger(ledger_of(tmp_path)).close()
    status, found = findings(capsys, "--data", str(tmp_path), str(tiny_path()))
    bad = [one for one in found.values() if one["word"] == "bad" and one["what"] != "disk"]
    assert not bad
    assert found["model"]["word"] == found["port"]["word"] == found["torch"]["word"] == "ok"
    assert status == int(found["disk"]["word"] == "bad")


def test_the_doctor_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = ledger_of(tmp_path)
    open_ledger(ledger).close()
    with sqlite3.connect(ledger) as rows:
        rows.execute("PRAGMA user_version = 999")
    rows.close()
    empty = tmp_path / "nothing"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        far = "http://127.0.0.1:1"
        words = ("--data", str(tmp_path), "--port", port, "--server", far, str(empty))
        status, found = findings(capsys, *words)
    assert status == 1
    for what in ("database", "port", "model", "server"):
        assert found[what]["word"] == "bad", what
    assert "999" in found["database"]["said"]


@pytest.mark.parametrize("bind", ["127.0.0.1", "::1", "localhost"])
def test_the_doctor_listens_where_a_server_would(
    bind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, found = findings(capsys, "--data", str(tmp_path), "--bind", bind)
    with socket.socket(socket.AF_INET6 if ":" in bind else socket.AF_INET) as there:
        try:
            there.bind((bind, 0))
        except OSError:
            pytest.skip("this machine has no such address")
    assert found["port"]["word"] == "ok", found["port"]


@pytest.mark.parametrize("answer", [b"SSH-2.0-x\r\n", *map(reply_of, (b"{}", b"[1]", b"<html>"))])
def test_the_doctor_is_told_by_something_else(
    answer: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever answers, it is a finding, and all others are there."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def once() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=once)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        status, found = findings(capsys, "--data", str(tmp_path), "--server", url)
        thread.join()
    assert status == 1 and found["server"]["word"] == "bad"
    assert "no Weft server" in found["server"]["said"]
    assert found["sandbox"]["word"] == "ok"


def test_the_doctor_knows_the_words_of_the_sandbox(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, found = findings(capsys, "--data", str(tmp_path), "--sandbox", "requier")
    assert found["sandbox"]["word"] == "bad" and "requier" in found["sandbox"]["said"]


def test_the_status_of_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    with serve({}) as server:
        assert main(["status", "--server", server.url]) == 0
        assert "up for" in capsys.readouterr().out
        assert main(["status", "--json", "--server", server.url]) == 0
        assert json.loads(capsys.readouterr().out)["jobs"] == []
        assert main(["doctor", "--json", "--port", "0", "--server", server.url]) in (0, 1)
        found = {one["what"]: one for one in json.loads(capsys.readouterr().out)}
        assert found["server"]["word"] == found["key"]["word"] == "ok"


def test_the_error_of_a_failed_job_names_its_request() -> None:
    """Through checker and worker, to the note that the client's error has."""
    with serve({"tiny": tiny_path()}) as server:
        model = weft.LanguageModel("tiny", remote=server.url)
        with pytest.raises(weft.WeftError) as failed, model.trace("one two"):
            h = model.model.layers[1].output
            h[torch.tensor([1_000_000])].save()
        (job,) = server.ledger.jobs("local", 10)
    assert job.state == "failed"
    assert re.fullmatch("[0-9a-f]{16}", job.asked)
    assert any(job.asked in note for note in failed.value.__notes__)
