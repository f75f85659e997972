"""Which models a server has: what stands on its command line or in its file, as data.

Deployment.parse("openai-community/gpt2")      # id: the text itself
Deployment.parse("./models/tiny")              # id: "tiny", the folder's name
Deployment.parse("small=./models/tiny")        # id: "small"
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from weft.errors import SettingError
from weft.settings import Settings

MOST = 100
"""Models of one server: each has a bell, whose ends every process of it gets at its start."""


class Deployment(Struct, frozen=True, kw_only=True):
    """One model of a server. `id` is what clients call it, `source` a folder or an id of the hub.

    `device` is what `from_pretrained` calls `device_map`; `dtype` and `attn_implementation` have
    their names there. A `pinned` one is loaded at once and stays; another when a job needs it.
    `weights_leave` and `weights_bytes` say whether clients may have its weights, and how many bytes
    of them; None: as the server's settings say.
    """

    id: str
    source: str
    dtype: str | None = None
    attn_implementation: str | None = None
    device: str | None = None
    pinned: bool = True
    weights_leave: bool | None = None
    weights_bytes: int | None = None

    @classmethod
    def parse(cls, text: str, **options: Any) -> Deployment:
        """From `MODEL` or `NAME=MODEL`."""
        name, given, source = text.rpartition("=")
        if not source or (given and not name):
            raise SettingError(f"{text!r} names no model", fix="give MODEL or NAME=MODEL")
        folder = Path(source).expanduser()
        if folder.is_dir():
            source = str(folder.resolve())
            name = name or Path(source).name
        elif source.startswith(("/", "./", "../", "~")):
            raise SettingError(
                f"there is no folder {source}",
                fix="give the folder of a model, or an id of the hub",
            )
        return cls(id=name or source, source=source, **options)

    def options(self) -> dict[str, Any]:
        """Options of loading, for `load_options`."""
        given = {
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "device_map": self.device,
        }
        return {name: value for name, value in given.items() if value is not None}

    def weights(self, settings: Settings) -> tuple[bool, int]:
        """Whether they may leave, and if not, how many bytes a day may tell of them."""
        leave, most = self.weights_leave, self.weights_bytes
        return (
            settings.weights_leave if leave is None else leave,
            settings.weights_bytes if most is None else most,
        )

    def tree_options(self) -> dict[str, Any]:
        """The same, for a tree without weights, which is on no device."""
        return replace(self, device=None).options()

    def same_weights(self) -> str:
        """What a measure of memory is a measure of."""
        return f"{self.source} {self.dtype} {self.attn_implementation} {self.device}"


def parse_all(texts: list[str], **options: Any) -> list[Deployment]:
    """All models of a command line. Raises `SettingError` where two have one name."""
    return checked([Deployment.parse(text, **options) for text in texts])


def checked(models: Iterable[Deployment]) -> list[Deployment]:
    """The models. Raises `SettingError` where two have one name, or there are too many."""
    found = list(models)
    ids = [model.id for model in found]
    for id in ids:
        if ids.count(id) > 1:
            raise SettingError(
                f"two models are called {id!r}", fix="name them: weft serve a=MODEL b=MODEL"
            )
    if len(found) > MOST:
        raise SettingError(
            f"{len(found)} models are more than one server has: at most {MOST}",
            fix="start several servers",
        )
    return found
