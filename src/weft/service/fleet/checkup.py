"""What a server of a configuration would do on this machine, looked at without doing it. No torch.

    for finding in planned(models, settings): ...      # of `weft doctor --config`

Sizes are those of the files, in the dtype that is asked for, unless the data folder knows what a
load of the same weights took. Not looked at: whether PyTorch can build the model, and how much
memory an accelerator has.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from math import prod
from pathlib import Path
from typing import NamedTuple

import msgspec

from weft.errors import SettingError
from weft.service.gateway.sources import listed, may_deploy
from weft.service.store.models import WorkerMemory
from weft.settings import Settings, data_folder

from .meter import free_bytes, weight_files
from .models import Deployment
from .places import ledger_of
from .residents import DEVICE_HOST, HOST_BASE, SHARE
from .serve import check_choice

_FLOATS = {"half": 2, "float16": 2, "bfloat16": 2, "float": 4, "float32": 4, "double": 8}
_FLOATS |= {"float64": 8, "float8_e4m3fn": 1, "float8_e5m2": 1}
LONGEST = 100 << 20
"""Bytes of the longest header of a file of tensors."""
MEANS = ("/dev/nvidiactl", "/dev/kfd")
"""What a machine has that has an accelerator called cuda."""


class Finding(NamedTuple):
    """`word` is `ok`, `note` or `bad`; `fix` says what to do."""

    word: str
    what: str
    said: str
    fix: str = ""


def planned(models: Sequence[Deployment], settings: Settings) -> Iterator[Finding]:
    """Whether what is configured can be done: models, memory, roots, words."""
    pinned = sum(model.pinned for model in models)
    yield Finding("ok", "config", f"{len(models)} models, {pinned} of them pinned")
    yield from _words(settings)
    if not models and not may_deploy(settings):
        fix = "name one under [[models]], or say with model_roots which may be deployed"
        yield Finding("bad", "models", "there is no model to serve", fix)
    known = _measured(settings)
    needs: dict[str, int] = {}
    for model in models:
        findings, need = _model(model, known)
        yield from findings
        needs[model.id] = need
    yield from _fitting(models, needs, settings)
    for root in listed(settings.model_roots):
        yield _root(Path(root).expanduser())


def _words(settings: Settings) -> Iterator[Finding]:
    for name, words in (("metrics", ("key", "loopback")), ("log_format", ("json", "text"))):
        try:
            check_choice(name, getattr(settings, name), words)
        except SettingError as error:
            yield Finding("bad", name, error.message, f"say one of {', '.join(words)}")


def _root(root: Path) -> Finding:
    try:
        folders = sum(one.is_dir() for one in root.iterdir())
    except OSError as error:
        fix = "make it, or let the server's user read it; model_roots names it"
        return Finding("bad", "model_roots", f"{root}: {error.strerror}", fix)
    return Finding("ok", "model_roots", f"{root}: {folders} folders")


# -- models ----------------------------------------------------------------------------------------


def _model(model: Deployment, known: dict[str, WorkerMemory]) -> tuple[list[Finding], int]:
    """What is found of a model, and how much host memory a load of it takes; 0: nobody knows."""
    found: list[Finding] = []
    if model.dtype not in (None, "auto") and model.dtype not in _FLOATS:
        fix = "such as bfloat16"
        found.append(_bad(model, f"dtype {model.dtype!r} is no floating-point dtype of torch", fix))
    on_host = model.device in (None, "cpu")
    if not on_host and str(model.device).startswith("cuda") and not _has_device():
        fix = "leave device out, or look at its driver"
        found.append(_bad(model, f"device {model.device!r}: no accelerator is seen here", fix))
    try:
        weights, files = _weights(model)
    except (OSError, ValueError) as error:
        fix = "fetch or save it once more, and let the server's user read it"
        return [*found, _bad(model, str(error), fix)], 0
    if not files:
        return [*found, _absent(model)], 0
    row = known.get(model.id)
    measured = row is not None and row.of == model.same_weights() and row.need > 0
    need = weights + HOST_BASE if on_host else DEVICE_HOST
    if row is not None and measured:
        need = row.need
    if not found:
        said = f"{files} files, {mib(weights)} of weights; {mib(need)} of memory"
        said += ", as measured" if measured else ", about"
        found.append(Finding("ok", "model", f"{model.id}: {said}"))
    return found, need


def _bad(model: Deployment, said: str, fix: str) -> Finding:
    return Finding("bad", "model", f"{model.id}: {said}", fix)


def _absent(model: Deployment) -> Finding:
    if Path(model.source).is_dir():
        fix = "save it with save_pretrained(..., safe_serialization=True)"
        return _bad(model, f"{model.source} has no safetensors", fix)
    said = f"{model.id}: {model.source} is not on this machine, and is fetched at the start"
    return Finding("note", "model", said, "or fetch it before, and serve a folder")


def _weights(model: Deployment) -> tuple[int, int]:
    """Bytes of its weights as they will be, and how many files they are in. Raises `OSError`, and
    `ValueError` for a file that is not whole."""
    folder = Path(model.source)
    if folder.is_dir():
        json.loads((folder / "config.json").read_bytes())
    files = weight_files(model.source)
    return sum(_tensors(file, model.dtype) for file in files), len(files)


def _tensors(file: Path, dtype: str | None) -> int:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > min(LONGEST, file.stat().st_size):
            raise ValueError(f"{file.name} is no file of safetensors")
        try:
            header = json.loads(opened.read(length))
            tensors = [one for name, one in header.items() if name != "__metadata__"]
            end = max([one["data_offsets"][1] for one in tensors], default=0)
            sizes = [_size(one, dtype) for one in tensors]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError(f"{file.name} is no file of safetensors") from None
    whole, there = 8 + length + end, file.stat().st_size
    if there < whole:
        raise ValueError(f"{file.name} is not whole: {there} bytes of {whole}")
    return sum(sizes)


def _size(tensor: dict, dtype: str | None) -> int:
    """Bytes of a tensor, in the dtype that is asked for if it has one with a fraction."""
    begin, end = tensor["data_offsets"]
    floating = re.fullmatch(r"B?F[0-9].*", tensor["dtype"])
    if dtype in _FLOATS and floating:
        return prod(tensor["shape"]) * _FLOATS[dtype]
    return end - begin


def _has_device() -> bool:
    return any(Path(one).exists() for one in MEANS)


# -- memory ----------------------------------------------------------------------------------------


def _fitting(
    models: Sequence[Deployment], needs: dict[str, int], settings: Settings
) -> Iterator[Finding]:
    """Whether what is pinned fits at once, and each other beside it."""
    free = free_bytes()
    budget = settings.models_bytes or int(SHARE * free)
    if not budget:
        return  # this system does not tell
    if settings.models_bytes > free:
        said = f"models_bytes is {mib(settings.models_bytes)}, and {mib(free)} are free now"
        yield Finding("note", "memory", said, "say less, or make room before the start")
    pinned = sum(needs[model.id] for model in models if model.pinned)
    said = f"pinned models need {mib(pinned)} of {mib(budget)}"
    if pinned > budget:
        fix = 'serve fewer, in a smaller dtype, or with load = "on-demand"'
        yield Finding("bad", "memory", said, fix)
        return
    yield Finding("ok", "memory", said)
    for model in models:
        if not model.pinned and pinned + needs[model.id] > budget:
            said = f"beside what is pinned there is no room for its {mib(needs[model.id])}"
            yield _bad(model, said, "pin less, or leave it out: its jobs would be refused")


def mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


# -- the data folder -------------------------------------------------------------------------------


def _measured(settings: Settings) -> dict[str, WorkerMemory]:
    """What loads took before, as far as the data folder tells."""
    found: dict[str, WorkerMemory] = {}
    for body in _rows(settings, "SELECT body FROM memory"):
        try:
            row = msgspec.msgpack.decode(body, type=WorkerMemory)
        except msgspec.DecodeError:
            continue  # of another version
        found[row.model] = row
    return found


def keys(settings: Settings, local: bool) -> Finding:
    """Who will be let in."""
    (count,) = _rows(settings, "SELECT count(*) FROM key WHERE revoked IS NULL") or [0]
    if count or local:
        more = "; one for this machine's user is made at the start" if local else ""
        return Finding("ok", "keys", f"{count} are in force{more}")
    fix = f"weft keys create NAME --data {data_folder(settings)}"
    return Finding("note", "keys", "there is none, so nobody will be let in", fix)


def _rows(settings: Settings, query: str) -> list:
    """The first column, of a ledger that may not be there yet, or be older."""
    ledger = ledger_of(data_folder(settings))
    if not ledger.exists():
        return []
    try:
        with closing(sqlite3.connect(f"{ledger.as_uri()}?mode=ro", uri=True)) as rows:
            return [row[0] for row in rows.execute(query)]
    except sqlite3.Error:
        return []
