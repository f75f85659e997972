"""Which files a checker and a worker need, and nothing else: the walls of their sandbox.

    confined = confined_for(spec, objects)
    confined.begin()                        # before there is a second thread
    ...                                     # the models are loaded
    confined.finish()                       # before the first job

Both have the ledger's file, which holds every user's rows: see docs/security.md for what that
means. Nothing of the store can be changed in place but that; a worker can add objects and remove
them, a checker can remove what a refused job had sent.
"""

from __future__ import annotations

from pathlib import Path

from weft.families import hub
from weft.families.loading import Source
from weft.service.sandbox.confine import Confined, Places
from weft.service.sandbox.landlock import ADD, DRAFT, READ, REMOVE_DIR, REMOVE_FILE, WRITE
from weft.service.sandbox.places import libraries, linked, network
from weft.service.store.shelf import Shelf

from .models import Deployment
from .places import ledger_of, objects_of
from .spec import Spec, settings_of

LARGEST_FILE = 1 << 36
"""Bytes that one file of the store may have at least, whatever one result may have."""


def confined_for(spec: Spec, objects: Shelf) -> Confined:
    """The walls of the process that `spec` describes. The ledger has been opened."""
    settings = settings_of(spec)
    models = [one for one in spec.models if spec.role == "checker" or one.id == spec.model]
    on_cpu = all(model.device in (None, "cpu") for model in models)
    return Confined(
        settings.sandbox,
        _places(spec, models, objects),
        file_bytes=max(LARGEST_FILE, 2 * settings.result_bytes),
        memory=spec.role == "checker" or on_cpu,
    )


def _places(spec: Spec, models: list[Deployment], objects: Shelf) -> Places:
    always = {**libraries(), **_store(spec, objects)}
    loading: dict[Path, int] = {}
    for model in models:
        folder = Source.of(model.source).folder
        if folder is not None:
            always |= {folder.resolve(): READ, **linked(folder)}
            continue
        always[hub.cached(model.source)] = READ
        loading |= dict.fromkeys(hub.writes(), DRAFT)
        loading |= dict.fromkeys(hub.secrets(), READ)
    return Places(always, {**loading, **network()} if loading else None)


def _store(spec: Spec, objects: Shelf) -> dict[Path, int]:
    """The parts of the data folder. SQLite's helper files are there: the fleet has it open."""
    data = Path(spec.data)
    ledger, folder = ledger_of(data), objects_of(data)
    files = [ledger.with_name(ledger.name + more) for more in ("", "-wal", "-shm")]
    return {
        **dict.fromkeys(files, WRITE),
        folder: ADD if spec.role == "worker" else READ | REMOVE_FILE,
        objects.drafts.parent: READ | REMOVE_DIR,
        objects.drafts: DRAFT,
    }
