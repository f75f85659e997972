"""`keep_seconds=` of a block: it travels with the job, or is refused where there is none."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import nn

import weft
from tests.client.scripted import Scripted
from weft.client.progress import LoadBar
from weft.errors import UnknownOptionError
from weft.settings import Settings
from weft.wire.messages import ProgressEvent, StateEvent, Submit, decode

X = torch.ones(2, 4)


@pytest.fixture
def script() -> Scripted:
    torch.manual_seed(0)
    return Scripted({"net": nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()})


def asked(script: Scripted) -> list[float | None]:
    """What the jobs so far asked for."""
    sent = script.said("POST", "/api/jobs")
    return [decode(call.content, Submit).keep_seconds for call in sent]


def model(script: Scripted, remote: Any = None) -> weft.Model:
    return weft.Model(script.models["net"][0], remote=remote or script.server())


def test_it_travels_with_its_own_jobs_only(script: Scripted) -> None:
    net = model(script)
    with net.trace(X, keep_seconds=7):
        net.output.save()
    with net.trace(X):
        net.output.save()
    with net.trace(X, keep_seconds=0.5, blocking=False):
        net.output.save()

    async def later() -> None:
        async with net.trace(X, keep_seconds=9):
            net.output.save()

    asyncio.run(later())
    assert asked(script) == [7.0, None, 0.5, 9.0]


@pytest.mark.parametrize("given", [0, -1, "1h", True, float("nan")])
def test_what_is_no_time_is_refused(script: Scripted, given: Any) -> None:
    with pytest.raises(UnknownOptionError, match="seconds above 0"):
        model(script).trace(X, keep_seconds=given)
    assert script.said("POST") == []


@pytest.mark.parametrize("remote", [False, "local"])
def test_where_there_is_no_job_it_is_refused(script: Scripted, remote: Any) -> None:
    with pytest.raises(UnknownOptionError, match="no job to be kept"):
        model(script).trace(X, keep_seconds=7, remote=remote)


def test_an_experiment_has_no_job_to_be_kept(script: Scripted) -> None:
    net = model(script)
    with net.trace(X) as tracer:
        net.output.save("y")
    with pytest.raises(UnknownOptionError, match="keep_seconds"):
        tracer.graph.run(net, X, keep_seconds=7)


# -- a load that a job waits for -------------------------------------------------------------------


def test_a_bar_shows_a_load_until_something_else_happens(monkeypatch, capsys) -> None:
    monkeypatch.setattr("weft.client.progress._can_show", lambda settings: True)
    bar = LoadBar(Settings())
    bar.hear(ProgressEvent(done=0, total=0, kind="load"))
    assert capsys.readouterr().err == "", "nobody knows how much it is"
    bar.hear(ProgressEvent(done=1 << 20, total=4 << 20, kind="load"))
    bar.hear(ProgressEvent(done=3 << 20, total=4 << 20, kind="load"))
    said = capsys.readouterr().err
    assert "loading the model" in said and "75%" in said and "4.19M" in said
    bar.hear(StateEvent(state="running"))
    assert bar._bar is None
    bar.hear(ProgressEvent(done=1, total=2))
    assert bar._bar is None


def test_no_bar_where_nobody_watches() -> None:
    bar = LoadBar(Settings(progress=False))
    bar.hear(ProgressEvent(done=1, total=4, kind="load"))
    assert bar._bar is None
