"""The file of a server: its settings, and its models with what holds for each.

    models, settings = read_config(Path("server.toml"))

    [server]
    port = 8765
    model_roots = "/srv/models"

    [[models]]
    id = "gpt2"
    source = "openai-community/gpt2"

    [[models]]
    source = "./models/llama"            # below the file's own folder; its id is then "llama"
    dtype = "bfloat16"
    load = "on-demand"

A name that it does not know raises, with the nearest that there is.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.errors import SettingError

from .models import Deployment, checked

LOADS = {"pinned": True, "on-demand": False}
FIELDS: dict[str, type] = {
    "id": str,
    "source": str,
    "dtype": str,
    "attn_implementation": str,
    "device": str,
    "load": str,
    "weights_leave": bool,
    "weights_bytes": int,
}
"""What may be said of a model, and what kind of value it is."""


def read_config(path: Path) -> tuple[list[Deployment], dict[str, Any]]:
    """Its models and its settings, which `settings.load` checks. Raises `SettingError`."""
    try:
        found = tomllib.loads(path.expanduser().read_text())
    except (OSError, ValueError) as error:
        raise SettingError(f"{path} cannot be read: {error}") from None
    _known(found, ("server", "models"), f"{path}")
    server, models = found.get("server", {}), found.get("models", [])
    if not isinstance(server, dict):
        raise SettingError(f"server in {path} should be a table", fix="write [server] above it")
    if not isinstance(models, list) or not all(isinstance(one, dict) for one in models):
        raise SettingError(f"models in {path} should be tables", fix="write [[models]] above each")
    folder = path.expanduser().resolve().parent
    read = [_model(one, f"model {n} of {path}", folder) for n, one in enumerate(models, 1)]
    return checked(read), server


def _model(table: Mapping[str, Any], where: str, folder: Path) -> Deployment:
    _known(table, FIELDS, where)
    for name, value in table.items():
        if type(value) is not FIELDS[name] or value == "" or (FIELDS[name] is int and value < 0):
            kind = FIELDS[name].__name__
            raise SettingError(f"{name} in {where} should be {kind}, not {value!r}")
    if "source" not in table:
        raise SettingError(f"{where} has no source", fix='source = "a folder, or an id of the hub"')
    if table.get("load", "pinned") not in LOADS:
        raise SettingError(
            f"load in {where} is {table['load']!r}", fix=f"it is one of {', '.join(LOADS)}"
        )
    options = {n: v for n, v in table.items() if n not in ("id", "source", "load")}
    options["pinned"] = LOADS[table.get("load", "pinned")]
    source = _below(table["source"], folder)
    name = f"{table['id']}=" if "id" in table else ""
    return Deployment.parse(f"{name}{source}", **options)


def _below(source: str, folder: Path) -> str:
    """A folder is meant from where the file is."""
    if source.startswith(("./", "../")) or (folder / source).is_dir():
        return str(folder / source)
    return source


def _known(table: Mapping[str, Any], names: Any, where: str) -> None:
    for name in table:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise SettingError(
                f"{where} says {name!r}, which is nothing that can be said there",
                fix=f"did you mean {near[0]}?" if near else f"it is one of {', '.join(names)}",
            )
