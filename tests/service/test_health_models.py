"""Which models have to be there for a server to be ready: those that its own configuration pins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from tests.service.gate import MODEL, House, card_of
from weft.service.fleet.models import Deployment
from weft.service.fleet.residents import Residents
from weft.service.store.memory import MemoryLedger
from weft.service.store.models import Deployed, WorkerMemory
from weft.settings import Settings


def looked(house: House) -> tuple[int, str, str | None]:
    """Status, and what is told of models."""
    house.app.gateway.looked = (-1e9, {})
    said = house.ask("GET", "/health/ready", None)
    parts = said.json()["parts"]
    assert said.json()["ready"] is (said.status_code == 200)
    return said.status_code, parts["models"], parts.get("others")


@pytest.fixture
def house() -> House:
    """`tiny` is pinned by the configuration and well."""
    found = House()
    found.ledger.put_memory(WorkerMemory(model=MODEL, state="ready"))
    return found


def put(house: House, state: str, **memory: Any) -> None:
    """How the model `other` is."""
    house.ledger.put_card(replace(card_of("other"), state=state))
    house.ledger.put_memory(WorkerMemory(model="other", state=state, **memory))


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("state", ["failed", "loading"])
def test_a_bad_model_that_somebody_deployed_takes_the_server_from_nobody(
    house: House, state: str, pinned: bool
) -> None:
    put(house, state, own=False, pinned=pinned)
    there = int(state == "loading" and not pinned)  # its jobs are taken, and wait
    assert looked(house) == (200, "1 of 1 ready", f"{there} of 1 ready")
    put(house, "ready", own=False, pinned=pinned)
    assert looked(house) == (200, "1 of 1 ready", "1 of 1 ready")


def test_a_bad_model_on_demand_is_told_of(house: House) -> None:
    put(house, "failed", pinned=False)
    assert looked(house) == (200, "1 of 1 ready", "0 of 1 ready")
    put(house, "cold", pinned=False)
    assert looked(house) == (200, "1 of 1 ready", "1 of 1 ready")


def test_one_that_the_configuration_pins_has_to_be_there(house: House) -> None:
    put(house, "failed")
    assert looked(house) == (503, "1 of 2 ready", None)
    put(house, "loading")
    assert looked(house) == (503, "1 of 2 ready", None)
    put(house, "ready")
    assert looked(house) == (200, "2 of 2 ready", None)


def test_a_model_of_which_nothing_is_known_yet_is_waited_for(house: House) -> None:
    assert looked(house) == (503, "1 of 2 ready", None)


def test_a_silent_worker_of_one_that_was_deployed_is_told_of(house: House) -> None:
    put(house, "ready", own=False)
    house.ledger.beat("worker other", house.app.gateway.clock() - 1000)
    assert looked(house) == (200, "1 of 1 ready", "0 of 1 ready")
    house.ledger.beat(f"worker {MODEL}", house.app.gateway.clock() - 1000)
    assert looked(house) == (503, "0 of 1 ready", "0 of 1 ready")


def test_who_pinned_a_model_is_known_of_each(tmp_path: Path) -> None:
    """A deployed one of the name of one in the configuration is not served: that one is."""
    ledger = MemoryLedger()
    settings = Settings(model_roots=str(tmp_path))
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            (tmp_path / name / file).touch()
        source = str((tmp_path / name).resolve())
        body = Deployment(id=name, source=source, pinned=True)
        ledger.put_deployed(Deployed(name, msgspec.json.encode(body), "ann", 0.0, 1))
    own = Deployment(id="mine", source=str(tmp_path / "mine"), pinned=True)
    Residents([own], ledger, settings)
    assert {row.model: row.own for row in ledger.memories()} == {"mine": True, "theirs": False}
    Residents([], ledger, settings)  # the next start, without it
    assert {row.model: row.own for row in ledger.memories()} == {"mine": False, "theirs": False}
