"""Results: from a finished job to tensors in this process.

What arrives must have the size and the SHA-256 that the server said; else `ResultChangedError`. A
large file goes to the disk first, so that a broken connection costs only what was not there yet.
"""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from collections.abc import Iterable
from typing import Any, BinaryIO
from urllib.parse import quote

import torch

from weft.errors import ResultChangedError
from weft.kernels.frames import to_tensor
from weft.wire.messages import Manifest, ResultInfo
from weft.wire.results import decode_result
from weft.wire.structures import build

from .core import Patience, Talk
from .effects import Answer, Broken, More, Shut, Steps
from .jobs import path_of
from .progress import bar

LARGE = 8 << 20
"""Bytes from which a result goes to the disk first."""


def fetch(talk: Talk, job: str, info: ResultInfo) -> Steps[tuple[Manifest, dict[str, Any]]]:
    """The whole result: its manifest, and what was saved by name."""
    path = path_of(job, "/result")
    if info.bytes < LARGE:
        answer = yield from talk.call("GET", path)
        _check(info, len(answer.body), hashlib.sha256(answer.body).hexdigest())
        return opened(answer.body)
    with tempfile.TemporaryFile() as file:
        yield from _to_disk(talk, path, info, file)
        with (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole,
            memoryview(whole) as view,
        ):
            return opened(view)


def fetch_named(talk: Talk, job: str, names: Iterable[str]) -> Steps[dict[str, Any]]:
    """Some saves only, by name."""
    asked = "&".join(f"name={quote(name, safe='')}" for name in names)
    answer = yield from talk.call("GET", path_of(job, f"/result?{asked}"))
    _, saved = opened(answer.body)
    return saved


def opened(data: bytes | memoryview) -> tuple[Manifest, dict[str, Any]]:
    """A result file as manifest and tensors, which are their own."""
    manifest, frames = decode_result(data)  # type: ignore[arg-type]
    tensors = {name: to_tensor(frame) for name, frame in frames.items()}
    saved = {
        name: build(value, lambda ref: tensors[str(ref.node)]) for name, value in manifest.saved
    }
    return manifest, saved


def moved(value: Any, device: torch.device | None) -> Any:
    """`value` with its tensors on a device."""
    if device is None:
        return value
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)([moved(item, device) for item in value])
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return value


# -- large ones ----------------------------------------------------------------------------------


def _to_disk(talk: Talk, path: str, info: ResultInfo, file: BinaryIO) -> Steps[None]:
    """Fetches a file, going on where a connection broke."""
    sha, patience = hashlib.sha256(), Patience(talk)
    with bar(talk.server.settings, "result", info.bytes) as told:
        while file.tell() < info.bytes:
            try:
                answer = yield from talk.call("GET", path, headers=_rest(file, info), stream=True)
                _place(answer, file)
                while piece := (yield More()):
                    patience.reset()
                    talk.traffic.down += len(piece)
                    file.write(piece)
                    sha.update(piece)
                    told(len(piece))
                    if file.tell() > info.bytes:
                        break
                yield Shut()
                if file.tell() < info.bytes:
                    raise Broken("the result ended early")
            except Broken as why:
                yield from patience.broken(why)
    _check(info, file.tell(), sha.hexdigest())
    file.flush()


def _rest(file: BinaryIO, info: ResultInfo) -> dict[str, str]:
    start = file.tell()
    if not start:
        return {}
    return {"range": f"bytes={start}-", "if-range": f'"{info.sha256}"'}


def _place(answer: Answer, file: BinaryIO) -> None:
    """Checks that the answer goes on where the file ends."""
    start = file.tell()
    told = answer.headers.get("content-range", "")
    if start and (answer.status != 206 or not told.startswith(f"bytes {start}-")):
        raise ResultChangedError(
            "the result is not the one that was being fetched any more", fix="fetch it again"
        )


def _check(info: ResultInfo, size: int, sha256: str) -> None:
    if (size, sha256) != (info.bytes, info.sha256):
        raise ResultChangedError(
            f"what arrived ({size} bytes, SHA-256 {sha256[:12]}...) is not what the server said it "
            f"would send ({info.bytes} bytes, {info.sha256[:12]}...)",
            fix="fetch it again; if it stays so, tell who runs the server",
        )
