"""What a key may do at the gateway: its scopes, how long it is good, when it was used."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from tests.service.gate import House
from weft.service.fleet.keys import LOCAL_FILE, local_key
from weft.service.gateway.app import ROUTES
from weft.service.gateway.entry import Entry
from weft.service.gateway.openapi import document
from weft.service.jobs.scopes import SCOPES, USUAL, allows
from weft.service.store.database import Database
from weft.service.store.interface import Key
from weft.service.store.keys import digest
from weft.service.store.sqlite import open_ledger
from weft.service.store.tables import MIGRATIONS

NOW = time.time()


@pytest.fixture
def house() -> House:
    return House()


def with_key(house: House, name: str, **fields: Any) -> str:
    house.ledger.add_key(Key("eve", hashlib.sha256(name.encode()).hexdigest(), 0.0, **fields))
    return name


def row_of(house: House, hashed: str) -> Key:
    found = house.ledger.key(hashed)
    assert found is not None
    return found


# -- scopes --------------------------------------------------------------------------------------


def test_what_scopes_allow() -> None:
    may = {one: {need for need in SCOPES if allows((one,), need)} for one in SCOPES}
    assert may == {
        "run": {"run", "read"},
        "read": {"read"},
        "deploy": {"deploy", "read"},
        "metrics": {"metrics"},
        "admin": set(SCOPES),
    }
    assert not allows((), "read")


def test_every_route_names_a_scope_that_there_is() -> None:
    assert {entry.scope for entry in ROUTES} <= set(SCOPES)


@pytest.mark.parametrize("entry", [e for e in ROUTES if e.key], ids=lambda e: e.method + e.path)
def test_a_key_without_the_scope_is_refused_by_its_name(house: House, entry: Entry) -> None:
    others = tuple(one for one in SCOPES if not allows((one,), entry.scope))
    few, fit = with_key(house, "few", scopes=others), with_key(house, "fit", scopes=(entry.scope,))
    path = entry.path.format(id="A" * 26, digest="d" * 64, name="mine", model="tiny")
    said = house.ask(entry.method, path, few)
    assert said.status_code == 403
    assert f"'{entry.scope}'" in said.json()["message"]
    assert all(other in said.json()["message"] for other in others)
    assert said.json()["fix"]
    assert house.ask(entry.method, path, fit).status_code != 403


def test_reading_is_no_running(house: House) -> None:
    reader = with_key(house, "reader", scopes=("read",))
    assert house.ask("GET", "/api/jobs", reader).status_code == 200
    assert house.ask("POST", "/api/jobs", reader, content=b"").status_code == 403


def test_the_document_says_which_scope_a_route_needs() -> None:
    paths = document(ROUTES, "0")["paths"]
    assert paths["/api/jobs"]["get"]["security"] == [{"key": ["read"]}]
    assert paths["/api/jobs"]["post"]["security"] == [{"key": ["run"]}]


# -- time ----------------------------------------------------------------------------------------


def test_a_key_of_the_past_says_since_when(house: House) -> None:
    past = with_key(house, "past", expires=86400.0)
    said = house.ask("GET", "/api/jobs", past)
    assert said.status_code == 401
    assert said.headers["www-authenticate"].startswith("Bearer")
    assert "1970-01-02 00:00 UTC" in said.json()["message"]
    assert house.ask("GET", "/api/jobs", with_key(house, "good", expires=NOW + 1e6)).is_success


def test_when_a_key_was_used_is_known_to_a_minute(house: House) -> None:
    used = with_key(house, "used")
    gateway = house.app.gateway
    hashed = hashlib.sha256(used.encode()).hexdigest()
    assert row_of(house, hashed).used is None
    for at, then in ((1000.0, 1000.0), (1030.0, 1000.0), (1061.0, 1061.0)):
        gateway.clock = lambda at=at: at
        assert house.ask("GET", "/api/jobs", used).is_success
        assert row_of(house, hashed).used == then


# -- keys from before ----------------------------------------------------------------------------


def test_keys_from_before_scopes_go_on(tmp_path: Path) -> None:
    Database(tmp_path / "old.sqlite", MIGRATIONS[:1]).close()
    with sqlite3.connect(tmp_path / "old.sqlite") as rows:
        rows.execute("INSERT INTO key VALUES ('ann', 'd1', 1.0, NULL)")
        rows.execute("INSERT INTO key VALUES ('bob', 'd2', 2.0, 3.0)")
    rows.close()
    ledger = open_ledger(tmp_path / "old.sqlite")
    assert ledger.keys() == [Key("ann", "d1", 1.0), Key("bob", "d2", 2.0, 3.0)]
    assert ledger.keys()[0].scopes == USUAL
    ledger.close()


def test_the_key_of_this_machine_has_all_scopes_also_one_from_before(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "weft.sqlite")
    key = local_key(tmp_path, ledger, 1.0)
    assert ledger.keys()[0].scopes == SCOPES
    ledger.add_key(Key("local", digest(key), 1.0))
    assert local_key(tmp_path, ledger, 2.0) == key == (tmp_path / LOCAL_FILE).read_text()
    (row,) = ledger.keys()
    assert row.scopes == SCOPES
    ledger.close()
