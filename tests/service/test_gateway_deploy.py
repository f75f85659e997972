"""Models that come and go by key: what is allowed, what is written, what is told of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.service.gate import ANN, MODEL, OPS, PRINT, House, card_of
from weft.errors import AccessError, InputError
from weft.service.gateway import health
from weft.service.gateway.sources import may_deploy, source_of
from weft.service.store.interface import Card, Key
from weft.service.store.models import WorkerMemory
from weft.settings import Settings

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def roots(tmp_path: Path) -> Path:
    """A folder with a model, one with a pickle, and a link out of it; a model outside."""
    for name in ("roots/one", "roots/deep/two", "roots/pickled", "outside"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        file = "pytorch_model.bin" if name.endswith("pickled") else "model.safetensors"
        (tmp_path / name / file).write_bytes(b"")
    (tmp_path / "roots" / "link").symlink_to(tmp_path / "outside")
    return tmp_path / "roots"


def allowing(roots: Path, hub: str = "") -> Settings:
    return Settings(model_roots=str(roots), model_hub=hub)


# -- where models may come from --------------------------------------------------------------------


def test_a_folder_below_a_root_is_named_by_its_path_or_from_the_root(roots: Path) -> None:
    settings = allowing(roots)
    assert source_of("one", settings) == str(roots / "one")
    assert source_of(str(roots / "one"), settings) == str(roots / "one")
    assert source_of("deep/two", settings) == str(roots / "deep" / "two")
    assert source_of("deep/../one", settings) == str(roots / "one")


@pytest.mark.parametrize(
    "asked",
    [
        "",
        ".",
        "..",
        "../outside",
        "link",
        "/",
        "/etc",
        "~",
        "one\0",
        "no-such",
        "deep/../../outside",
    ],
)
def test_nothing_else_is_and_nobody_learns_what_is_there(roots: Path, asked: str) -> None:
    with pytest.raises(AccessError) as refused:
        source_of(asked, allowing(roots))
    assert str(roots) not in str(refused.value)


def test_links_out_of_a_root_are_followed_before_they_are_judged(roots: Path) -> None:
    with pytest.raises(AccessError):
        source_of(str(roots / "link"), allowing(roots))
    both = Settings(model_roots=f"{roots}, {roots.parent}")
    assert source_of(str(roots / "link"), both) == str(roots.parent / "outside")


def test_a_folder_without_safetensors_is_refused(roots: Path) -> None:
    with pytest.raises(InputError, match="safetensors"):
        source_of("pickled", allowing(roots))
    with pytest.raises(InputError):
        source_of("deep", allowing(roots))


def test_the_hub_is_open_only_for_what_is_listed() -> None:
    settings = Settings(model_hub="org/*, gpt2")
    assert source_of("org/name-1.b", settings) == "org/name-1.b"
    assert source_of("gpt2", settings) == "gpt2"
    for asked in ("gpt2-large", "other/name", "org/name/more", "org/", "ORG/name", "org/na me"):
        with pytest.raises(AccessError, match=r"org/\*, gpt2"):
            source_of(asked, settings)
    assert may_deploy(settings) and not may_deploy(Settings())
    with pytest.raises(AccessError, match="model_roots and model_hub"):
        source_of("gpt2", Settings())


# -- asking for it ---------------------------------------------------------------------------------


class Shop(House):
    """A gateway whose fleet takes over at once what it is told to look at."""

    def __init__(self, roots: Path) -> None:
        super().__init__(settings=allowing(roots, "org/*"))
        self.orders: list[tuple[str, str]] = []
        self.app.gateway.order = self.ordered

    def ordered(self, what: str, model: str) -> None:
        self.orders.append((what, model))
        rows = {row.id for row in self.ledger.deployed()}
        fixed = tuple(one for one in self.app.gateway.models if one in self.models)
        self.app.gateway.models = (*fixed, *sorted(rows))

    def deploy(self, key: str = OPS, **query: Any) -> Any:
        content = json.dumps(query)
        return self.ask("POST", "/api/models", key, content=content, headers=JSON)

    def evict(self, key: str = OPS, **query: Any) -> Any:
        content = json.dumps(query)
        return self.ask("POST", "/api/models/evict", key, content=content, headers=JSON)


@pytest.fixture
def shop(roots: Path) -> Shop:
    return Shop(roots)


def test_what_is_deployed_is_written_before_it_is_answered(shop: Shop, roots: Path) -> None:
    told = shop.deploy(source="deep/two", dtype="bfloat16", pinned=True)
    assert told.status_code == 201 and told.json()["id"] == "two"
    (row,) = shop.ledger.deployed()
    assert (row.id, row.owner, row.tries) == ("two", "ops", 1)
    body = msgspec.json.decode(row.body)
    assert body["source"] == str(roots / "deep" / "two")
    assert (body["dtype"], body["pinned"]) == ("bfloat16", True)
    assert shop.orders == [("look", "two")]
    assert "two" in [model["id"] for model in shop.ask("GET", "/api/models").json()["models"]]


def test_the_same_again_is_another_try_and_another_source_a_conflict(shop: Shop) -> None:
    assert shop.deploy(source="one").status_code == 201
    assert shop.deploy(source="one", pinned=True).status_code == 200
    (row,) = shop.ledger.deployed()
    assert row.tries == 2 and msgspec.json.decode(row.body)["pinned"] is True
    again = shop.deploy(source="deep/two", name="one")
    assert again.status_code == 409 and "another source" in again.json()["message"]
    assert shop.deploy(source="one", dtype="float64").status_code == 409


def test_the_operators_own_models_stay_as_they_are(shop: Shop) -> None:
    said = shop.deploy(source="one", name=MODEL)
    assert said.status_code == 409 and "configuration" in said.json()["message"]
    assert shop.evict(model=MODEL, forget=True).status_code == 409
    assert shop.ledger.deployed() == [] and shop.orders == []


@pytest.mark.parametrize(
    "query",
    [
        {},
        {"source": ""},
        {"source": "one", "trust_remote_code": True},
        {"source": "one", "attn_implementation": "org/kernel"},
        {"source": "one", "attn_implementation": "Eager"},
        {"source": "one", "dtype": "float32; import os"},
        {"source": "one", "device": "disk"},
        {"source": "one", "device": "cuda:1\n"},
        {"source": "one", "name": ""},
        {"source": "one", "name": ".."},
        {"source": "one", "name": "../tiny"},
        {"source": "one", "name": "tiny "},
        {"source": "one", "name": "ti\u0301ny"},
        {"source": "one", "name": "\u202eynit"},
        {"source": "one", "name": "a\ntiny  LlamaForCausalLM"},
        {"source": "one", "name": "a\x1b[2J"},
        {"source": "one", "name": "-x"},
    ],
)
def test_what_is_no_option_is_refused(shop: Shop, query: dict[str, Any]) -> None:
    assert shop.deploy(**query).status_code == 400
    assert shop.ledger.deployed() == []


def test_places_that_are_not_allowed_are_refused_by_name(shop: Shop) -> None:
    assert shop.deploy(source="/etc").status_code == 403
    assert shop.deploy(source="gpt2").status_code == 403
    assert shop.deploy(source="pickled").status_code == 422
    assert shop.deploy(source="org/name").json()["id"] == "org/name"


def test_a_key_needs_the_scope(shop: Shop) -> None:
    assert shop.deploy(ANN, source="one").status_code == 403
    assert shop.evict(ANN, model=MODEL).status_code == 403
    assert shop.ledger.deployed() == [] and shop.orders == []


def test_where_nobody_has_the_processes_models_are_fixed(roots: Path) -> None:
    house = House(settings=allowing(roots))
    content = json.dumps({"source": "one"})
    said = house.ask("POST", "/api/models", OPS, content=content, headers=JSON)
    assert said.status_code == 403 and "fixed" in said.json()["message"]


def test_evicting(shop: Shop) -> None:
    shop.ledger.put_memory(WorkerMemory(model=MODEL, pinned=True, host=9))
    pinned = shop.evict(model=MODEL)
    assert pinned.status_code == 409 and "pinned" in pinned.json()["message"]
    shop.ledger.put_memory(WorkerMemory(model=MODEL, pinned=False, host=9))
    assert shop.evict(model=MODEL).json()["host_bytes"] == 9
    assert shop.orders == [("evict", MODEL)]
    unknown = shop.evict(model="nothing")
    assert unknown.status_code == 404 and MODEL in unknown.json()["fix"]


def test_a_key_for_some_models_touches_no_others(shop: Shop) -> None:
    digest = hashlib.sha256(b"weft_few").hexdigest()
    shop.ledger.add_key(Key("few", digest, 0.0, scopes=("deploy",), models=("mine",)))
    assert shop.deploy("weft_few", source="one").status_code == 403
    assert shop.deploy("weft_few", source="one", name="mine").status_code == 201
    assert shop.evict("weft_few", model=MODEL).status_code == 404
    assert shop.evict("weft_few", model="mine", forget=True).status_code == 200


def test_forgetting(shop: Shop) -> None:
    shop.deploy(source="one")
    told = shop.evict(model="one", forget=True)
    assert (told.status_code, told.json()["state"]) == (200, "gone")
    assert shop.ledger.deployed() == []
    assert "one" not in shop.app.gateway.models


# -- what is told of models ------------------------------------------------------------------------


def info(house: House, model: str = MODEL) -> dict[str, Any]:
    models = house.ask("GET", "/api/models").json()["models"]
    return next(one for one in models if one["id"] == model)


@pytest.mark.parametrize(
    ("state", "cached", "told"),
    [("ready", 0, "ready"), ("cold", 0, "cold"), ("cold", 89, "cold"), ("cold", 90, "warm")],
)
def test_a_cold_model_whose_files_are_in_memory_is_warm(
    house: House, state: str, cached: int, told: str
) -> None:
    card = card_of()
    house.ledger.put_card(Card(MODEL, state, card.fingerprint, card.card, card.tables))
    house.ledger.put_memory(WorkerMemory(model=MODEL, files=100, cached=cached, pinned=False))
    assert info(house).get("state", "ready") == told
    assert info(house)["fingerprint"] == PRINT, "it can be recorded on whether it is loaded or not"
    (status, _) = house.ask("GET", "/api/status").json()["models"]
    assert status["state"] == told


@pytest.fixture
def house() -> House:
    return House()


def test_measures_and_the_last_use_are_told(house: House) -> None:
    row = WorkerMemory(
        model=MODEL, host=1, device=2, need=3, need_device=4, weights=5, loaded=6, used=7.5
    )
    house.ledger.put_memory(row)
    told = info(house)
    assert [told[name] for name in ("host_bytes", "device_bytes", "need_bytes")] == [1, 2, 3]
    assert [told[n] for n in ("need_device_bytes", "weight_bytes", "loaded_bytes")] == [4, 5, 6]
    assert told["used"] == 7.5 and "pinned" not in told


@pytest.mark.parametrize("state", ["cold", "loading"])
def test_a_model_on_demand_is_taken_as_well_and_a_pinned_one_is_not(
    house: House, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "KEPT_SECONDS", 0.0)
    card = card_of()
    for model in (MODEL, "other"):
        house.ledger.put_card(Card(model, state, card.fingerprint, card.card, card.tables))
        house.ledger.put_memory(WorkerMemory(model=model, state=state, pinned=False))
    assert house.ask("GET", "/health").status_code == 200
    if state == "loading":
        house.ledger.put_memory(WorkerMemory(model=MODEL, state=state, pinned=True))
        assert house.ask("GET", "/health").status_code == 503


def test_jobs_are_taken_for_cold_and_loading_models_of_the_right_kind_only(house: House) -> None:
    from tests.service.gate import submit_of

    card = card_of()
    for state in ("cold", "loading"):
        house.ledger.put_card(Card(MODEL, state, card.fingerprint, card.card, card.tables))
        assert house.submit(submit_of(request_id=state)).status_code == 201
        other = submit_of(request_id=f"{state}-2", fingerprint="a" * 64)
        assert house.submit(other).status_code == 409
        assert house.ask("GET", "/api/card", params={"model": MODEL}).status_code == 200
    house.ledger.put_card(Card(MODEL, "failed", reason="it needs 9 GiB"))
    refused = house.submit(submit_of(request_id="late"))
    assert refused.status_code == 503 and "9 GiB" in refused.json()["message"]
