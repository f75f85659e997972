"""`weft jobs`: against a gateway over real HTTP, also over connections that are cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from tests.home import own_home
from tests.service.cutting import cutting
from tests.service.gate import ANN, House, live
from weft.cli import main
from weft.client.servers import close as close_clients
from weft.commands.jobs import seconds_in
from weft.errors import NoSuchError, SettingError, UnknownOptionError
from weft.graph.frame import Frame
from weft.graph.node import Ref
from weft.service.gateway import results
from weft.service.jobs.life import Failed
from weft.settings import Settings
from weft.wire.messages import ErrorReport, Manifest, encode
from weft.wire.results import encode_result

SIZE = 3 << 20


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> House:
    """Its result file is a large one, and this directory a fresh one."""
    numbers = torch.arange(SIZE // 4, dtype=torch.float32)
    tensors = {
        "0": Frame("float32", (SIZE // 4,), numbers.numpy().tobytes()),
        "1": Frame("uint8", (3,), bytes([7, 8, 9])),
    }
    manifest = Manifest(saved=(("h", Ref(0)), ("k", Ref(1))))
    data = encode_result(manifest, tensors)
    monkeypatch.setattr("tests.service.gate.result_file", lambda: data)
    monkeypatch.chdir(tmp_path)
    own_home(monkeypatch, tmp_path, WEFT_KEY=ANN)
    return House(Settings(keep_seconds=100.0, longest_keep_seconds=1e9))


@pytest.fixture
def url(house: House, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with live(house) as at:
        monkeypatch.setenv("WEFT_HOST", at)
        yield at
        close_clients()


def said(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(["jobs", *command]) == 0
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *command: str) -> Any:
    return json.loads(said(capsys, *command, "--json"))


def failed(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert main(["jobs", *command]) == 2
    return capsys.readouterr().err


def test_listing(house: House, url: str, capsys) -> None:
    assert said(capsys, "list").strip() == "there are no jobs"
    ids = [house.job(request_id=f"r{n}") for n in range(3)]
    house.do()
    lines = said(capsys, "list").splitlines()
    assert lines[0].split()[:3] == ["id", "model", "state"]
    assert [line.split()[0] for line in lines[1:]] == ids[::-1]
    assert "3.0 MiB" in lines[3] and "1 ahead, may begin in 0 s" in lines[1]
    assert [one["id"] for one in as_json(capsys, "list")["jobs"]] == ids[::-1]
    assert len(as_json(capsys, "list", "--limit", "2")["jobs"]) == 2
    done = as_json(capsys, "list", "--state", "done")["jobs"]
    assert [one["id"] for one in done] == ids[:1]
    assert as_json(capsys, "list", "--model", "other") == {"jobs": []}
    assert "no state of a job" in failed(capsys, "list", "--state", "lost")


def test_a_list_goes_over_pages(house: House, url: str, monkeypatch) -> None:
    monkeypatch.setattr("weft.client.listing.PAGE", 2)
    ids = [house.job(request_id=f"r{n}") for n in range(5)]
    assert [job.id for job in weft.jobs()] == ids[::-1]
    assert [job.id for job in weft.jobs(limit=3)] == ids[:1:-1]
    assert weft.jobs(state="done") == [] and repr(weft.jobs(limit=1)).count(ids[4]) == 1
    with pytest.raises(UnknownOptionError):
        weft.jobs(limit=0)


def test_showing_and_cancelling(house: House, url: str, capsys) -> None:
    id = house.job()
    text = said(capsys, "show", id)
    assert f"id     {id}" in text and "received" in text
    assert as_json(capsys, "cancel", id)["state"] == "cancelled"
    text = said(capsys, "show", id)
    assert "cancelled by its owner" in text and "expires" in text
    said(capsys, "delete", id)
    assert "no such job" in failed(capsys, "show", id)


def test_keeping(house: House, url: str, capsys) -> None:
    id = house.job()
    house.do()
    assert as_json(capsys, "keep", id, "2d")["expires"] == 4.0 + 2 * 86_400
    assert "longest_keep_seconds" in failed(capsys, "keep", id, "99999d")
    assert "is no time" in failed(capsys, "keep", id, "soon")
    house.ledger.forget(1e9, 1.0)
    assert "has expired" in failed(capsys, "fetch", id)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("30m", 1800), ("1.5h", 5400), ("7d", 604_800), ("5s", 5)]
)
def test_times(text: str, seconds: float) -> None:
    assert seconds_in(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5", "1w", "h", "1h30m", "nan"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(SettingError):
        seconds_in(text)


def test_fetching_writes_a_file_that_safetensors_and_weft_open(house, url, capsys) -> None:
    from safetensors.torch import load_file

    id = house.job()
    house.do()
    assert f"{id}.safetensors" in said(capsys, "fetch", id)
    saved = weft.Job.read(f"{id}.safetensors")
    assert torch.equal(saved["h"], torch.arange(SIZE // 4, dtype=torch.float32))
    assert torch.equal(load_file(f"{id}.safetensors")["0"], saved["h"])
    assert sorted(path.name for path in Path().glob("*afetensors*")) == [f"{id}.safetensors"]
    said(capsys, "fetch", id, "-o", "k.st", "--name", "k")
    assert list(weft.Job.read("k.st")) == ["k"]
    assert "saved nothing under the name 'x'" in failed(capsys, "fetch", id, "--name", "x")
    assert "cannot be written" in failed(capsys, "fetch", id, "-o", "nowhere/h.st")


def test_fetching_goes_on_over_connections_that_are_cut(house, url, monkeypatch) -> None:
    """No byte is fetched twice: what comes after a cut is what was not there."""
    id = house.job()
    data = house.do()
    with cutting(url, [900_000, 1_000_000]) as (wire, cuts):
        monkeypatch.setenv("WEFT_HOST", wire)
        size = weft.Job.get(id).fetch("h.st")
        close_clients()
        assert cuts() == 2
    assert size == len(data) and Path("h.st").read_bytes() == data
    assert not Path("h.st.part").exists()


def test_fetching_goes_on_in_another_process_where_one_was_interrupted(
    house, url, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("WEFT_RETRY_SECONDS", "0.1")
    id = house.job()
    data = house.do()
    with cutting(url, [1_500_000, *[0] * 50]) as (wire, _):
        monkeypatch.setenv("WEFT_HOST", wire)
        error = failed(capsys, "fetch", id, "-o", "h.st")
        close_clients()
    assert "no server answers" in error and not Path("h.st").exists()
    there = Path("h.st.part").stat().st_size
    assert 1_000_000 < there < len(data)
    monkeypatch.setenv("WEFT_HOST", url)
    sent: list[tuple[int, int]] = []

    def cut(spans: Any, start: int, end: int) -> Any:
        sent.append((start, end))
        return real(spans, start, end)

    real = results.cut
    monkeypatch.setattr(results, "cut", cut)
    said(capsys, "fetch", id, "-o", "h.st")
    assert sent == [(there, len(data))]
    assert Path("h.st").read_bytes() == data


def test_what_lies_there_of_another_result_is_not_mixed_in(house, url, capsys) -> None:
    id = house.job()
    data = house.do()
    Path("h.st.part").write_bytes(b"\0" * 1000)
    assert "is not what the server said" in failed(capsys, "fetch", id, "-o", "h.st")
    assert not Path("h.st").exists()
    said(capsys, "fetch", id, "-o", "h.st")
    assert Path("h.st").read_bytes() == data
    Path("h.st.part").write_bytes(b"\0" * (len(data) + 5))
    said(capsys, "fetch", id, "-o", "h.st")
    assert Path("h.st").read_bytes() == data


def test_following_over_cut_connections_tells_everything_once(
    house, url, capsys, monkeypatch
) -> None:
    id = house.job()
    house.price()
    job = house.begin()
    for number in range(40):
        house.log(job, f"line {number}")
    house.finish(job)
    with cutting(url, [700, 900, 1100]) as (wire, cuts):
        monkeypatch.setenv("WEFT_HOST", wire)
        lines = said(capsys, "follow", id).splitlines()
        close_clients()
        assert cuts() == 3
    assert [line for line in lines if line.startswith("line")] == [f"line {n}" for n in range(40)]
    assert lines[-1] == "done"


def test_what_a_failed_job_failed_with_is_said(house, url, capsys) -> None:
    id = house.job()
    house.price()
    job = house.begin()
    report = encode(ErrorReport(code="run", message="index 9 is out of range"), "json")
    house.ledger.step(id, Failed(report), 5.0, job.token)
    assert "index 9" in said(capsys, "show", id) and "index 9" in said(capsys, "list")
    assert "index 9" in failed(capsys, "fetch", id)
    assert said(capsys, "follow", id).splitlines()[-1] == "failed: index 9 is out of range"


def test_a_job_of_somebody_else_is_not_there(house, url, monkeypatch, capsys) -> None:
    id = house.job()
    monkeypatch.setenv("WEFT_KEY", "weft_bob")
    for command in ("show", "follow", "fetch", "cancel", "delete"):
        assert "no such job" in failed(capsys, command, id)
    with pytest.raises(NoSuchError):
        weft.Job.get(id)
