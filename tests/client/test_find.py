"""Which server is asked, and who gets a key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from weft.client.find import Place, PlainHttpWarning, address, find, is_configured, is_loopback
from weft.errors import ServerAwayError, SettingError
from weft.settings import Settings, load, state_folder

HERE = "http://127.0.0.1:8765"


def leave(url: str, key: str = "weft_local", pid: int | None = None, name: str = "one") -> Path:
    """What a server leaves for clients of its user."""
    folder = state_folder() / "servers"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"url": url, "key": key, "pid": pid or os.getpid()}))
    return file


def test_nothing_configured_says_what_to_do() -> None:
    with pytest.raises(ServerAwayError, match=r"weft serve.*WEFT_HOST"):
        find(True, Settings())
    assert not is_configured(Settings())


def test_the_only_server_here_is_found_with_its_key() -> None:
    leave(HERE)
    assert find(True, Settings()) == Place(HERE, "weft_local")
    assert is_configured(Settings())


def test_the_argument_wins_over_the_settings_and_these_over_what_runs_here() -> None:
    leave("http://127.0.0.1:1")
    settings = Settings(host="http://127.0.0.1:2")
    assert find(True, settings).url == "http://127.0.0.1:2"
    assert find("http://127.0.0.1:3/", settings).url == "http://127.0.0.1:3"


def test_several_servers_here_have_to_be_told_apart() -> None:
    leave("http://127.0.0.1:1", name="one")
    leave("http://127.0.0.1:2", name="two")
    with pytest.raises(SettingError, match=r"127\.0\.0\.1:1, http://127\.0\.0\.1:2"):
        find(True, Settings())


def test_a_dead_server_and_a_strange_file_do_not_count() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    leave(HERE, pid=ended.pid)
    leave(HERE, name="two").write_text("no JSON")
    leave(HERE, name="three").write_text('{"url": 3}')
    with pytest.raises(ServerAwayError):
        find(True, Settings())


def test_the_key_of_a_local_server_is_found_by_its_address() -> None:
    leave(HERE)
    leave("http://127.0.0.1:2", key="other", name="two")
    assert find(HERE, Settings()).key == "weft_local"
    assert find("http://127.0.0.1:9", Settings()).key is None


def test_a_key_of_the_settings_goes_to_the_host_of_the_settings_only() -> None:
    settings = Settings(host="https://served.example", key="secret")
    assert find(True, settings).key == "secret"
    assert find("https://served.example/", settings).key == "secret"
    assert find("https://elsewhere.example", settings).key is None
    assert find("https://elsewhere.example", Settings(key="secret")).key == "secret"


def test_a_key_without_encryption_is_warned_about() -> None:
    with pytest.warns(PlainHttpWarning, match="https"):
        find("http://served.example", Settings(key="secret"))
    find("http://served.example", Settings())
    find("http://localhost:1", Settings(key="secret"))


def test_the_environment_and_the_file_are_read(monkeypatch: Any) -> None:
    file = Path(os.environ["XDG_CONFIG_HOME"]) / "weft" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text('host = "https://file.example"\nkey = "from file"\n')
    assert find(True, load()) == Place("https://file.example", "from file")
    monkeypatch.setenv("WEFT_HOST", "https://env.example")
    assert find(True, load()).url == "https://env.example"


@pytest.mark.parametrize(
    "text",
    [
        *("127.0.0.1:8765", "ftp://a", "http://", "http://user:key@a", "http://a?x=1", "", "a b"),
        "http://a#b",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(SettingError):
        address(text)


def test_what_is_on_this_machine() -> None:
    for url in (HERE, "http://localhost:3", "http://[::1]:3", "http://127.9.9.9"):
        assert is_loopback(url)
    for url in ("http://10.0.0.1", "http://localhost.example", "http://[::2]:3"):
        assert not is_loopback(url)


def test_a_key_is_in_no_text() -> None:
    assert "secret" not in repr(Place(HERE, "secret"))
