"""The file of a server, and small parts of the fleet: what is read, measured, sent, dismissed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from tests.service.jobs import PRICED
from tests.service.jobs import job as a_job
from weft.cli import main
from weft.errors import InputError, SettingError
from weft.families.loading import Source, load
from weft.service.fleet import meter
from weft.service.fleet.channel import Channel, DoForget, DoServe
from weft.service.fleet.config import read_config
from weft.service.fleet.loading import counted, weights_of
from weft.service.fleet.models import MOST, Deployment
from weft.service.fleet.orphans import dismiss
from weft.service.fleet.residents import Residents
from weft.service.store.memory import MemoryLedger
from weft.service.store.models import Deployed
from weft.settings import Settings
from weft.testing import tiny_path
from weft.wire.messages import ErrorReport, decode

# -- the file --------------------------------------------------------------------------------------


def written(folder: Path, text: str) -> Path:
    path = folder / "server.toml"
    path.write_text(text)
    return path


def test_a_file_has_settings_and_models(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    path = written(
        tmp_path,
        """
        [server]
        port = 1
        models_bytes = 7
        [[models]]
        id = "gpt2"
        source = "openai-community/gpt2"
        dtype = "bfloat16"
        attn_implementation = "eager"
        device = "cuda:1"
        load = "on-demand"
        weights_leave = true
        weights_bytes = 9
        [[models]]
        source = "./here"
        """,
    )
    models, settings = read_config(path)
    assert settings == {"port": 1, "models_bytes": 7}
    assert models == [
        Deployment(
            id="gpt2",
            source="openai-community/gpt2",
            dtype="bfloat16",
            attn_implementation="eager",
            device="cuda:1",
            pinned=False,
            weights_leave=True,
            weights_bytes=9,
        ),
        Deployment(id="here", source=str(tmp_path / "here")),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[sever]\nport = 1", "did you mean server"),
        ("server = 1", r"\[server\]"),
        ("models = 1", r"\[\[models\]\]"),
        ('[models]\nsource = "a"', r"\[\[models\]\]"),
        ('[[models]]\nsource = "a"\ndytpe = "x"', "did you mean dtype"),
        ('[[models]]\nsource = "a"\nnothing_like_it = 1', "it is one of id, source"),
        ('[[models]]\nid = "a"', "has no source"),
        ('[[models]]\nsource = ""', "should be str"),
        ('[[models]]\nsource = "a"\nload = "lazy"', "pinned, on-demand"),
        ('[[models]]\nsource = "a"\nload = true', "should be str"),
        ('[[models]]\nsource = "a"\nweights_leave = 1', "should be bool"),
        ('[[models]]\nsource = "a"\nweights_bytes = -1', "should be int"),
        ('[[models]]\nsource = "a"\nweights_bytes = true', "should be int"),
        ('[[models]]\nsource = "./nowhere"', "no folder"),
        ('[[models]]\nsource = "a"\n[[models]]\nsource = "b"\nid = "a"', "two models are called"),
        ("".join(f'[[models]]\nsource = "m{n}"\n' for n in range(MOST + 1)), f"at most {MOST}"),
        ("port = ", "cannot be read"),
    ],
)
def test_what_makes_no_sense_in_it_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        read_config(written(tmp_path, text))


def test_a_file_that_is_not_there_is_told() -> None:
    with pytest.raises(SettingError, match="cannot be read"):
        read_config(Path("/nowhere/server.toml"))


def test_options_and_variables_win_over_the_file_and_it_over_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(
        "weft.service.fleet.serve.serve", lambda *a, **k: told.update(models=a[0], settings=a[1])
    )
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "weft").mkdir()
    (tmp_path / "weft" / "config.toml").write_text("attempts = 1\nport = 1\nnodes = 1\n")
    path = written(
        tmp_path,
        '[server]\nport = 2\nnodes = 2\nrun_seconds = 2.0\nlog_bytes = 2\n[[models]]\nsource = "b"',
    )
    monkeypatch.setenv("WEFT_NODES", "3")
    monkeypatch.setenv("WEFT_RUN_SECONDS", "3")
    assert main(["serve", "a", "--config", str(path), "--run-seconds", "4"]) == 0
    found = told["settings"]
    assert (found.attempts, found.port, found.nodes, found.run_seconds) == (1, 2, 3, 4.0)
    assert found.log_bytes == 2 and [model.id for model in told["models"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[server]\nprot = 1", "did you mean port"),
        ('[server]\nport = "1"', "port in .*server.toml should be int"),
        ('[[models]]\nsource = "m"', "two models are called 'm'"),
    ],
)
def test_settings_of_the_file_are_checked_as_all_are(
    tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "m", "--config", str(written(tmp_path, text))]) == 2
    assert re.search(said, capsys.readouterr().err)


# -- weights ---------------------------------------------------------------------------------------


def test_weights_that_stay_do_so_under_every_name(tmp_path: Path) -> None:
    """Whoever may deploy cannot have a model of the operator's with other rules."""
    for name in ("ours", "free"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    stay: Any = {"weights_leave": False, "weights_bytes": 7}
    fixed = [Deployment.parse(f"a={tmp_path / 'ours'}", **stay)]
    ledger = MemoryLedger()
    for id, source in (("b", "ours"), ("c", "free")):
        body = msgspec.json.encode({"id": id, "source": str(tmp_path / source)})
        ledger.put_deployed(Deployed(id, body, "eve", 1.0))
    settings = Settings(model_roots=str(tmp_path))
    found = Residents(fixed, ledger, settings).models
    assert {id: one.weights(settings) for id, one in found.items()} == {
        "a": (False, 7),
        "b": (False, 7),
        "c": (True, settings.weights_bytes),
    }


def test_a_server_loads_no_pickle(tmp_path: Path) -> None:
    """The file is a checkpoint that `transformers` would load, were it allowed to."""
    shutil.copytree(tiny_path(), tmp_path / "m")
    net = load(Source.of(tiny_path()))
    torch.save(net.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "model.safetensors").unlink()
    load(Source.of(str(tmp_path / "m")))
    with pytest.raises(InputError):
        load(Source.of(str(tmp_path / "m")), safetensors_only=True)


def test_what_is_loaded_is_counted_to_the_last_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.service.fleet.loading.TELL", 0.0)
    told: list[int] = []
    with counted(told.append):
        net = load(Source.of(tiny_path()))
    assert told == sorted(told) and told[-1] == sum(p.nbytes for p in net.parameters())
    before = len(told)
    nn.Linear(2, 2)
    assert len(told) == before, "the hook is gone"


def test_tied_weights_count_once() -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    assert weights_of(net) == 9 * 4


# -- measures --------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_process_is_seen_from_outside() -> None:
    """A child says what it took; afterwards it is gone, which is no error."""
    code = "import sys; x = b'x' * (64 << 20); print(flush=True); sys.stdin.read(1)"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        took = meter.process_bytes(child.pid)
        assert 64 << 20 < took < 200 << 20
        child.communicate(b".")
    assert meter.process_bytes(child.pid) == 0
    assert meter.free_bytes() > 64 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="asks for pages in memory")
def test_files_in_memory_are_told_from_files_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"x" * 1_000_001)
    assert meter.weight_files(str(tmp_path)) == [path]
    assert meter.cached_bytes([path]) == (1_000_001, 1_000_001)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    size, cached = meter.cached_bytes([path, tmp_path / "gone"])
    assert size == 1_000_001 and cached < size
    (tmp_path / "empty.safetensors").touch()
    assert meter.cached_bytes([tmp_path / "empty.safetensors"]) == (0, 0)


def test_the_hubs_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "model.safetensors").touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert [path.name for path in meter.weight_files("org/name")] == ["model.safetensors"]
    assert meter.weight_files("org/other") == []


# -- the line between processes --------------------------------------------------------------------


def test_open_files_come_with_the_message_that_they_belong_to() -> None:
    ours, theirs = Channel.pair()
    pairs = [socket.socketpair() for _ in range(3)]
    for number, (one, other) in enumerate(pairs):
        ours.send(DoForget(f"x{number}"))
        ours.send(DoServe(f"m{number}"), (one.fileno(), other.fileno()))
    seen = 0
    while seen < 3:
        for message in theirs.read() or ():
            if not isinstance(message, DoServe):
                continue
            first, second = theirs.files(2)
            with socket.socket(fileno=first) as here, socket.socket(fileno=second):
                here.send(message.model.encode())
                assert pairs[seen][1].recv(9) == f"m{seen}".encode()
            seen += 1
    with pytest.raises(OSError, match="without its open files"):
        theirs.files(1)
    for end in (*[end for pair in pairs for end in pair], ours, theirs):
        end.close()


# -- jobs of no model ------------------------------------------------------------------------------


def test_jobs_of_a_model_that_is_gone_end_by_name_and_others_may_wait_a_while() -> None:
    ledger = MemoryLedger()
    queued, _ = ledger.submit(a_job(100.0, model="gone"), 10)
    ledger.step(queued.id, PRICED, 101.0)
    received, _ = ledger.submit(a_job(102.0, model="gone"), 10)
    served, _ = ledger.submit(a_job(103.0, model="tiny"), 10)
    absent, _ = ledger.submit(a_job(104.0, model="another server's"), 10)
    assert dismiss(ledger, ["tiny", "gone", "another server's"], ["gone"], 105.0, 50.0) == []
    ended = dismiss(ledger, ["tiny"], ["gone"], 105.0, 50.0)
    assert [job.id for job in ended] == [queued.id, received.id]
    error = decode(ended[0].error or b"", ErrorReport, "json")
    assert error.code == "wrong-model" and "'gone'" in error.message
    assert dismiss(ledger, ["tiny"], ["gone"], 106.0, 50.0) == []
    assert [job.id for job in dismiss(ledger, ["tiny"], [], 155.0, 50.0)] == [absent.id]
    assert [job.id for job in ledger.unfinished()] == [served.id]


def test_a_running_job_of_a_model_that_is_gone_is_told_to_stop_once() -> None:
    ledger = MemoryLedger()
    made, _ = ledger.submit(a_job(100.0, model="gone"), 10)
    ledger.step(made.id, PRICED, 101.0)
    ledger.claim("queued", ["gone"], "w", 102.0, 200.0)
    (told,) = dismiss(ledger, [], ["gone"], 103.0, 50.0)
    assert told.state == "running" and told.cancelling
    assert dismiss(ledger, [], ["gone"], 104.0, 50.0) == []
