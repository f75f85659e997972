"""`weft doctor --config`: what `weft serve --config` would do, looked at without a server."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from weft.cli import main
from weft.service.fleet import checkup
from weft.service.fleet.models import Deployment
from weft.service.fleet.places import ledger_of
from weft.service.store.interface import Key
from weft.service.store.models import WorkerMemory
from weft.service.store.sqlite import open_ledger
from weft.testing import tiny_path

TINY = sum(file.stat().st_size for file in Path(tiny_path()).glob("*.safetensors"))


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """So much memory is free, whatever this machine has."""
    monkeypatch.setattr(checkup, "free_bytes", lambda: 10 << 30)


class Shown:
    """What was found, by what it is about."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        self.all = [tuple(one.values()) for one in json.loads(text)]

    def of(self, what: str) -> list[tuple[str, str]]:
        return [(word, said) for word, about, said, _ in self.all if about == what]

    def bad(self) -> list[str]:
        """What is wrong with the configuration; the disk of this machine is not its matter."""
        return [f"{what}: {said}" for word, what, said, _ in self.all if word == "bad"]


def doctor(folder: Path, capsys: pytest.CaptureFixture[str], text: str, *more: str) -> Shown:
    (folder / "server.toml").write_text(text)
    words = ("--config", str(folder / "server.toml"), "--port", "0", *more)
    status = main(["doctor", "--json", *words])
    found = Shown(status, capsys.readouterr().out)
    assert status == int(any(one[0] == "bad" for one in found.all))
    assert all(one[3] for one in found.all if one[0] == "bad"), "each says what to do"
    return found


def copied(folder: Path, name: str) -> Path:
    shutil.copytree(tiny_path(), folder / name)
    return folder / name


def server(folder: Path, **settings: Any) -> str:
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    return "\n".join(["[server]", f'data = "{folder / "data"}"', *lines, ""])


def model(**fields: Any) -> str:
    lines = [f"{name} = {json.dumps(value)}" for name, value in fields.items()]
    return "\n".join(["[[models]]", *lines, ""])


def test_a_good_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied(tmp_path, "a"), copied(tmp_path, "b")
    text = server(tmp_path, model_roots=str(tmp_path))
    text += model(source="./a", dtype="bfloat16") + model(source="./b", load="on-demand")
    found = doctor(tmp_path, capsys, text)
    assert [one for one in found.bad() if not one.startswith("disk")] == []
    assert found.of("config") == [("ok", "2 models, 1 of them pinned")]
    (a, b) = found.of("model")
    assert a[0] == b[0] == "ok" and "1 files" in a[1] and "about" in a[1]
    assert found.of("data folder")[0] == ("ok", f"{tmp_path / 'data'} can be written")
    assert (
        found.of("model_roots")[0][0] == found.of("memory")[0][0] == found.of("keys")[0][0] == "ok"
    )


def test_sizes_are_those_in_the_dtype_that_is_asked_for() -> None:
    sizes = [
        checkup._weights(Deployment(id="a", source=str(tiny_path()), dtype=dtype))[0]
        for dtype in (None, "float32", "float64", "bfloat16")
    ]
    own, four, eight, two = sizes
    assert 0 < own <= TINY and 2 * two == four and 2 * four == eight


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "prot"),
        ('port = "x"', "port"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_finding_among_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    found = doctor(tmp_path, capsys, f"[server]\n{text}\n")
    ((word, told),) = found.of("config")
    assert word == "bad" and said in told
    assert found.of("port") and found.of("Python")


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor(tmp_path, capsys, server(tmp_path) + model(source="./none"))
    ((word, told),) = found.of("config")
    assert word == "bad" and "there is no folder" in told


def test_models_whose_files_are_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = copied(tmp_path, "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:100_000])
    (copied(tmp_path, "other") / "model.safetensors").write_bytes(b"PK" * 1000)
    (copied(tmp_path, "bare") / "config.json").unlink()
    (copied(tmp_path, "none") / "model.safetensors").unlink()
    names = ("cut", "other", "bare", "none")
    text = server(tmp_path) + "".join(model(source=f"./{name}") for name in names)
    found = doctor(tmp_path, capsys, text)
    told = dict(zip(names, found.of("model"), strict=True))
    assert {word for word, _ in told.values()} == {"bad"}
    assert "not whole: 100000 bytes of" in told["cut"][1]
    assert "no file of safetensors" in told["other"][1]
    assert "config.json" in told["bare"][1]
    assert "has no safetensors" in told["none"][1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_model_that_may_not_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied(tmp_path, "a") / "model.safetensors").chmod(0)
    found = doctor(tmp_path, capsys, server(tmp_path) + model(source="./a"))
    assert found.of("model")[0][0] == "bad"


def test_a_model_of_the_hub_is_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    found = doctor(tmp_path, capsys, server(tmp_path) + model(source="some/model"))
    ((word, told),) = found.of("model")
    assert word == "note" and "some/model is not on this machine" in told


def test_words_that_no_model_or_setting_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkup, "MEANS", (str(tmp_path / "nothing"),))
    copied(tmp_path, "a")
    text = server(tmp_path, metrics="open", log_format="xml", model_roots=str(tmp_path / "no"))
    text += model(id="x", source="./a", dtype="int8") + model(id="y", source="./a", device="cuda")
    found = doctor(tmp_path, capsys, text)
    for what in ("metrics", "log_format", "model_roots"):
        assert found.of(what)[0][0] == "bad", what
    (x, y) = found.of("model")
    assert x[0] == y[0] == "bad" and "int8" in x[1] and "no accelerator" in y[1]


def test_nothing_to_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor(tmp_path, capsys, server(tmp_path))
    assert found.of("models") == [("bad", "there is no model to serve")]
    found = doctor(tmp_path, capsys, server(tmp_path, model_roots=str(tmp_path)))
    assert found.of("models") == []


def test_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c"):
        copied(tmp_path, name)
    one = 300 << 20  # its weights and 256 MiB
    two = [model(source="./a"), model(source="./b")]
    found = doctor(tmp_path, capsys, server(tmp_path, models_bytes=one) + "".join(two))
    assert found.of("memory")[0][0] == "bad" and "of 300 MiB" in found.of("memory")[0][1]
    lazy = model(source="./c", load="on-demand")
    found = doctor(tmp_path, capsys, server(tmp_path, models_bytes=one) + two[0] + lazy)
    assert found.of("memory")[0][0] == "ok"
    assert [word for word, _ in found.of("model")] == ["ok", "ok", "bad"]
    assert "c: beside what is pinned there is no room" in found.of("model")[2][1]
    found = doctor(tmp_path, capsys, server(tmp_path, models_bytes=11 << 30) + two[0])
    assert [word for word, _ in found.of("memory")] == ["note", "ok"]


def test_what_a_load_took_is_known_from_the_data_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = copied(tmp_path, "a")
    of = Deployment.parse(f"a={place}").same_weights()
    ledger = open_ledger(ledger_of(tmp_path / "data"))
    ledger.put_memory(WorkerMemory(model="a", of=of, need=1234 << 20))
    ledger.close()
    found = doctor(tmp_path, capsys, server(tmp_path) + model(source="./a"))
    assert "1234 MiB of memory, as measured" in found.of("model")[0][1]
    found = doctor(tmp_path, capsys, server(tmp_path) + model(source="./a", dtype="float16"))
    assert "about" in found.of("model")[0][1], "another dtype is another load"


def test_who_will_be_let_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied(tmp_path, "a")
    text = server(tmp_path, bind="192.0.2.1") + model(source="./a")
    assert doctor(tmp_path, capsys, text).of("keys")[0][0] == "note"
    ledger = open_ledger(ledger_of(tmp_path / "data"))
    for name, revoked in (("one", None), ("two", 1.0)):
        ledger.add_key(Key(name, hashlib.sha256(name.encode()).hexdigest(), 0.0, revoked))
    ledger.close()
    assert doctor(tmp_path, capsys, text).of("keys") == [("ok", "1 are in force")]
    local = doctor(tmp_path, capsys, text, "--bind", "127.0.0.1")
    assert "made at the start" in local.of("keys")[0][1], "options win over the file"
