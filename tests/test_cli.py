"""The command line: what it says, what it takes from where, and how it fails."""

from __future__ import annotations

import argparse
import json
import re
import socket
import sqlite3
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.home import own_home
from weft.cli import main
from weft.commands.options import CLIENT_SETTINGS, add_settings, settings_of
from weft.errors import SettingError
from weft.service.fleet.keys import LOCAL_OWNER, announced, local_key, open_keys
from weft.service.fleet.models import Deployment, parse_all
from weft.service.fleet.serve import listen, url_of
from weft.service.jobs.usage import Usage
from weft.service.store.keys import digest, find
from weft.service.store.lock import lock_folder
from weft.settings import Settings
from weft.testing import tiny_path


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home of its own."""
    own_home(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `weft serve` would serve, instead of doing so."""
    told: dict[str, Any] = {}

    def serve(models: Any, settings: Settings, **options: Any) -> None:
        told.update(models=models, settings=settings, **options)

    monkeypatch.setattr("weft.service.fleet.serve.serve", serve)
    return told


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says that fails by a mistake of the user's: a line, and no traceback."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("weft: ")
    assert "Traceback" not in err
    assert out == ""
    return err


# -- what it says --------------------------------------------------------------------------------


def test_the_help_tells_every_setting_of_a_server(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for field in fields(Settings):
        is_option = re.search(f"--{field.name.replace('_', '-')}[ \\]]", text) is not None
        assert is_option == (field.name not in CLIENT_SETTINGS), field.name


@pytest.mark.parametrize(
    "command",
    [(), ("keys",), ("jobs",), ("serve", "m", "--nothing", "1"), ("serve", "m", "--key")],
)
def test_what_is_not_a_command_is_refused(command: tuple[str, ...], capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_version(capsys) -> None:
    assert main(["version"]) == 0
    assert re.fullmatch(r"weft \d+\.\d+\.\d+\n", capsys.readouterr().out)


# -- settings ------------------------------------------------------------------------------------


def test_settings_come_from_file_environment_and_options(served, home, monkeypatch) -> None:
    (home / "config" / "weft").mkdir(parents=True)
    (home / "config" / "weft" / "config.toml").write_text("port = 1\nattempts = 7\nnodes = 9\n")
    monkeypatch.setenv("WEFT_PORT", "2")
    monkeypatch.setenv("WEFT_RUN_SECONDS", "2.5")
    assert main(["serve", "some/model", "--port", "3", "--data", "d"]) == 0
    settings = served["settings"]
    assert (settings.port, settings.data, settings.run_seconds) == (3, "d", 2.5)
    assert (settings.attempts, settings.nodes) == (7, 9)


def test_models_have_names_and_options(served) -> None:
    given = ["some/model", f"small={tiny_path()}", "--dtype", "bfloat16", "--device", "cpu"]
    assert main(["serve", *given, "--attn-implementation", "eager", "--key-only"]) == 0
    assert [model.id for model in served["models"]] == ["some/model", "small"]
    assert {model.dtype for model in served["models"]} == {"bfloat16"}
    assert served["models"][0].options() == {
        "dtype": "bfloat16",
        "attn_implementation": "eager",
        "device_map": "cpu",
    }
    assert served["models"][0].tree_options()["dtype"] == "bfloat16"
    assert "device_map" not in served["models"][0].tree_options()
    assert served["key_only"] is True


def test_a_folder_is_called_by_its_name() -> None:
    assert Deployment.parse(tiny_path()).id == "tiny"
    assert Deployment.parse("org/name").id == "org/name"
    assert Deployment.parse("a=b=c").source == "c"


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["=x"], "names no model"),
        (["a="], "names no model"),
        (["a=x", "a=y"], "two models are called 'a'"),
        (["./nothing"], "no folder ./nothing"),
    ],
)
def test_models_that_make_no_sense_are_refused(texts: list[str], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        parse_all(texts)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("serve",), "there is no model to serve"),
        (("serve", "/nowhere/model"), "no folder /nowhere/model"),
        (("serve", "m", "--nodes", "-1"), "nodes in an argument should be int"),
        (("serve", "m", "--nodes", str(2**63)), "nodes in an argument should be int"),
        (("serve", "m", "--port", "65536"), "port in an argument should be int up to 65535"),
        (("serve", "m", "--run-seconds", "inf"), "run_seconds in an argument should be float"),
        (("serve", "m", "--run-seconds", "nan"), "run_seconds in an argument should be float"),
        (("keys", "create", "ann", "--expires", "0h"), "'0h' is no time to come"),
        (("keys", "create", "ann", "--limit", "requests_per_minute=0.5"), "NUMBER, a whole one"),
        (("keys", "create", "ann", "--limit", "queued_jobs=1.5"), "NUMBER, a whole one"),
        (("keys", "usage", "--since", "yesterday"), "'yesterday' is no day"),
        (("keys", "usage", "--since", "2030-02-30"), "'2030-02-30' is no day"),
        (("serve", "m", "--bind", "nowhere.invalid"), "cannot listen at nowhere.invalid"),
        (("keys", "add", "no spaces please"), "no name for a key's owner"),
        (("keys", "revoke", "abc"), "0 keys in force"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, said: str, capsys) -> None:
    assert said in failed(capsys, *arguments)


def test_a_setting_that_is_unknown_is_refused(home, capsys, monkeypatch) -> None:
    (home / "config" / "weft").mkdir(parents=True)
    (home / "config" / "weft" / "config.toml").write_text("prot = 1\n")
    assert "did you mean port?" in failed(capsys, "serve", "m")


# -- a place that is taken -----------------------------------------------------------------------


def test_a_port_that_is_taken_is_told(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = failed(capsys, "serve", "m", "--port", port)
    assert f"port {port}" in said and "in use" in said and "--port" in said


def test_a_folder_that_cannot_be_is_told(home, capsys) -> None:
    file = home / "file"
    file.write_text("")
    for words in (("serve", "m", "--port", "0"), ("keys", "list"), ("keys", "create", "ann")):
        said = failed(capsys, *words, "--data", str(file))
        assert f"{file} cannot be the data folder" in said


def test_a_folder_that_another_server_has_is_told(home, capsys) -> None:
    with lock_folder(home / "held"):
        said = failed(capsys, "serve", "m", "--port", "0", "--data", str(home / "held"))
    assert "another server" in said and "data" in said


def test_a_folder_that_is_no_database_is_told(home, capsys) -> None:
    (home / "data").mkdir()
    (home / "data" / "weft.sqlite").write_bytes(b"a letter to my aunt " * 100)
    said = failed(capsys, "serve", "m", "--port", "0", "--data", str(home / "data"))
    assert "cannot be opened as a database" in said
    assert list((home / "state").rglob("*.json")) == []


@pytest.mark.parametrize(
    ("bind", "url"), [("127.0.0.1", r"http://127\.0\.0\.1:\d+"), ("0.0.0.0", r"http://127\..*")]
)
def test_the_address_is_one_that_clients_here_can_use(bind: str, url: str) -> None:
    with listen(bind, 0) as listening:
        assert re.fullmatch(url, url_of(listening))


def test_a_setting_that_is_true_or_false_is_an_option_and_its_opposite() -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser)
    told = {text: parser.parse_args(text.split()).weights_leave for text in ("", "--weights-leave")}
    assert told == {"": None, "--weights-leave": True}
    off = settings_of(parser.parse_args(["--no-weights-leave", "--weights-bytes", "5"]))
    assert (off.weights_leave, off.weights_bytes) == (False, 5)


# -- keys ----------------------------------------------------------------------------------------


def test_keys_are_made_listed_and_revoked(home, capsys) -> None:
    at = ["--data", str(home / "data")]
    assert main(["keys", "list", *at]) == 0
    assert "no keys yet" in capsys.readouterr().out
    assert main(["keys", "add", "ada", *at]) == 0
    key = capsys.readouterr().out.strip()
    assert re.fullmatch("weft_[A-Za-z0-9_-]{43}", key)
    assert main(["keys", "list", *at]) == 0
    listed = capsys.readouterr().out
    assert "ada" in listed and key not in listed and "revoked" not in listed
    with open_keys(home / "data") as ledger:
        found = find(ledger, key)
        assert found is not None and found.owner == "ada"
    assert main(["keys", "revoke", listed.split()[0], *at]) == 0
    with open_keys(home / "data") as ledger:
        assert find(ledger, key) is None
    assert main(["keys", "list", *at]) == 0
    assert "revoked" in capsys.readouterr().out
    assert "0 keys in force" in failed(capsys, "keys", "revoke", listed.split()[0], *at)


def test_a_key_is_made_with_all_that_it_may(home, capsys) -> None:
    at = ["--data", str(home / "data")]
    what = ["--scope", "read", "--scope", "metrics", "--model", "a/b", "--model", "tiny"]
    what += ["--weight", "2.5", "--limit", "nodes=10", "--limit", "run_seconds_per_day=1.5"]
    assert main(["keys", "create", "--owner", "ada", *what, "--expires", "2d", *at]) == 0
    with open_keys(home / "data") as ledger:
        (key,) = ledger.keys()
    assert (key.owner, key.scopes, key.models) == ("ada", ("read", "metrics"), ("a/b", "tiny"))
    assert (key.weight, key.limits) == (2.5, {"nodes": 10, "run_seconds_per_day": 1.5})
    assert key.expires is not None and key.expires - key.created == 2 * 86_400
    capsys.readouterr()
    assert main(["keys", "list", *at]) == 0
    listed = capsys.readouterr().out
    for text in ("ada", "read,metrics", "a/b,tiny", "weight 2.5", "nodes=10", "until 20", "never"):
        assert text in listed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["ann", "--scope", "rum"], "no scope 'rum'"),
        (["ann", "--limit", "node=1"], "did you mean nodes?"),
        (["ann", "--limit", "port=1"], "has no limit 'port'"),
        (["ann", "--limit", "nodes=many"], "write nodes=NUMBER"),
        (["ann", "--limit", "nodes=-1"], "sets no limit"),
        (["ann", "--limit", "nodes=nan"], "sets no limit"),
        (["ann", "--weight", "0"], "weight of 0"),
        (["ann", "--weight", "nan"], "weight of nan"),
        (["ann", "--expires", "2001-01-01"], "no time to come"),
        (["ann", "--expires", "soon"], "no time to come"),
        ([], "one owner"),
        (["ann", "--owner", "bob"], "one owner"),
    ],
)
def test_a_key_that_cannot_be_is_refused(home, capsys, options: list[str], says: str) -> None:
    assert says in failed(capsys, "keys", "create", *options, "--data", str(home / "data"))
    assert not (home / "data").exists()


def test_usage_is_shown_by_day_owner_and_model(home, capsys) -> None:
    at = ["--data", str(home / "data")]
    with open_keys(home / "data") as ledger:
        for day in ("2026-01-01", "2026-01-02"):
            ledger.add_usage([Usage(owner="ann", day=day, model="tiny", jobs=3, cost=2e12, up=7)])
        ledger.add_usage([Usage(owner="bob", day="2026-01-02", requests=11)])
    assert main(["keys", "usage", *at]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["day", "owner", "model", "jobs"]
    assert [row.split()[:3] for row in rows] == [
        ["2026-01-01", "ann", "tiny"],
        ["2026-01-02", "ann", "tiny"],
        ["2026-01-02", "bob", "-"],
    ]
    assert "2e+12" in rows[0] and rows[2].split()[8] == "11"
    assert main(["keys", "usage", "--owner", "ann", "--since", "2026-01-02", *at]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_no_key_is_kept_as_it_is(home, capsys) -> None:
    main(["keys", "add", "ada", "--data", str(home / "data")])
    key = capsys.readouterr().out.strip().encode()
    for path in (home / "data").iterdir():
        assert key not in path.read_bytes()
        assert path.stat().st_mode & 0o077 == 0
    with sqlite3.connect(home / "data" / "weft.sqlite") as rows:
        assert rows.execute("SELECT digest FROM key").fetchall() == [(digest(key.decode()),)]
    rows.close()


def test_the_key_of_this_machines_user_stays_until_it_is_revoked(home) -> None:
    with open_keys(home) as ledger:
        key = local_key(home, ledger, 1.0)
        assert local_key(home, ledger, 2.0) == key
        assert (home / "local.key").stat().st_mode & 0o777 == 0o600
        ledger.revoke(digest(key), 3.0)
        another = local_key(home, ledger, 4.0)
        assert another != key
        known = ledger.keys()
        assert [one.owner for one in known] == [LOCAL_OWNER] * 2


def test_what_is_left_for_clients_goes_with_the_server(home) -> None:
    with announced("http://127.0.0.1:8765", "weft_key") as path:
        assert path.name == "127.0.0.1-8765.json"
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert json.loads(path.read_text())["key"] == "weft_key"
    assert list(path.parent.iterdir()) == []


def test_what_a_later_server_left_at_the_same_address_stays(home) -> None:
    with announced("http://127.0.0.1:8765", "weft_old") as path:
        path.write_text("{}")
    assert path.read_text() == "{}"
