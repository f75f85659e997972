"""Which models may be deployed by key: folders below the operator's, and ids of the hub that he
listed. What is named is a place to find weights in, never code: nothing is imported from it.

    source_of("/srv/models/tiny", settings)       # "/srv/models/tiny", where that is a root's
    source_of("tiny", settings)                   # the same
    source_of("org/name", settings)               # where model_hub has "org/*"

The gateway asks when somebody deploys, the fleet again before it loads anything.
"""

from __future__ import annotations

import fnmatch
import os
import re
from pathlib import Path

from weft.errors import AccessError, InputError
from weft.settings import Settings

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


def listed(setting: str) -> list[str]:
    """The entries of a setting with commas."""
    return [part.strip() for part in setting.split(",") if part.strip()]


def may_deploy(settings: Settings) -> bool:
    """Whether anything may be deployed by key."""
    return bool(listed(settings.model_roots) or listed(settings.model_hub))


def source_of(asked: str, settings: Settings) -> str:
    """Where the model lies: a real path below one of the roots, or an id of the hub.

    Raises `AccessError` for any other place, whether or not anything is there, and `InputError` for
    a folder of a root that has no weights as safetensors. No path of the server's is in an error.
    """
    for place in _places(asked, settings):
        if place.is_dir():
            return str(_with_weights(place, asked))
    if HUB_ID.fullmatch(asked) and any(
        fnmatch.fnmatchcase(asked, pattern) for pattern in listed(settings.model_hub)
    ):
        return asked
    raise AccessError(
        f"{asked[:200]!r} is not among the models that may be deployed here",
        fix=_what_may(settings),
    )


def _places(asked: str, settings: Settings) -> list[Path]:
    """The real paths that it may mean, below roots only: links and `..` have been followed."""
    if "\0" in asked:
        return []
    found = []
    for root in listed(settings.model_roots):
        real = Path(os.path.realpath(Path(root).expanduser()))
        place = Path(os.path.realpath(real / asked))  # an absolute one stands for itself
        if place != real and place.is_relative_to(real):
            found.append(place)
    return found


def _with_weights(place: Path, asked: str) -> Path:
    has = next(place.glob("*.safetensors"), None) is not None and (place / "config.json").is_file()
    if not has:
        raise InputError(
            f"{asked[:200]!r} has no config.json, or no weights in *.safetensors",
            fix="put the files of one model there; weights of other formats are not loaded",
        )
    return place


def _what_may(settings: Settings) -> str:
    hub = ", ".join(listed(settings.model_hub))
    folders = len(listed(settings.model_roots))
    ways = [f"a model in a folder of its operator's ({folders} of them)"] if folders else []
    ways += [f"an id of the hub such as {hub}"] if hub else []
    if not ways:
        return "its operator can allow some with the settings model_roots and model_hub"
    return f"name {' or '.join(ways)}"
