"""Results: from a finished job to tensors in this process.

A whole result must have the size and the SHA-256 that the server said; else `ResultChangedError`.
A large one, and saves that are asked for by name, go to the disk first, so that a broken connection
costs only what was not there yet.
"""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from urllib.parse import quote

import torch

from weft.errors import MessageError, ResultChangedError
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


def fetch(
    talk: Talk, job: str, info: ResultInfo, data: bytes = b""
) -> Steps[tuple[Manifest, dict[str, Any]]]:
    """The whole result: its manifest, and what was saved by name. `data` is it, if it came."""
    if data:
        check(info, len(data), hashlib.sha256(data).hexdigest())
        return opened(data)
    path = path_of(job, "/result")
    if info.bytes < LARGE:
        answer = yield from talk.call("GET", path, job=job)
        check(info, len(answer.body), hashlib.sha256(answer.body).hexdigest())
        return opened(answer.body)
    with tempfile.TemporaryFile() as file:
        coming = Coming(job, path, file, info.bytes, f'"{info.sha256}"')
        yield from to_disk(talk, coming)
        check(info, file.tell(), coming.sha.hexdigest())
        return opened_file(file)


def fetch_named(talk: Talk, job: str, names: Iterable[str]) -> Steps[dict[str, Any]]:
    """Some saves only, by name."""
    asked = "&".join(f"name={quote(name, safe='')}" for name in names)
    with tempfile.TemporaryFile() as file:
        yield from to_disk(talk, Coming(job, path_of(job, f"/result?{asked}"), file))
        _, saved = opened_file(file)
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


@dataclass
class Coming:
    """A file on its way to the disk. Size and ETag are those of the first answer, if not known."""

    job: str
    path: str
    file: BinaryIO
    size: int | None = None
    tag: str = ""
    sha: Any = field(default_factory=hashlib.sha256)

    @property
    def is_there(self) -> bool:
        return self.size is not None and self.file.tell() >= self.size

    def rest(self) -> dict[str, str]:
        """Headers that ask for what is not there yet."""
        start = self.file.tell()
        return {"range": f"bytes={start}-", "if-range": self.tag} if start else {}

    def place(self, answer: Answer) -> int:
        """Checks that the answer goes on where the file ends; gives the size of the whole."""
        start = self.file.tell()
        told = answer.headers.get("content-range", "")
        if start and (answer.status != 206 or not told.startswith(f"bytes {start}-")):
            raise ResultChangedError(
                "the result is not the one that was being fetched any more", fix="fetch it again"
            )
        if self.size is None:
            length = answer.headers.get("content-length", "")
            if not length.isdecimal():
                raise MessageError("the server does not say how large the result is")
            self.size, self.tag = int(length), answer.headers.get("etag", "")
        return self.size

    def add(self, piece: bytes) -> None:
        self.file.write(piece)
        self.sha.update(piece)


def to_disk(talk: Talk, coming: Coming) -> Steps[None]:
    """Fetches a file, going on where a connection broke."""
    patience, told = Patience(talk), None
    with ExitStack() as stack:
        while not coming.is_there:
            try:
                answer = yield from talk.call(
                    "GET", coming.path, headers=coming.rest(), job=coming.job, stream=True
                )
                size = coming.place(answer)
                told = told or stack.enter_context(bar(talk.server.settings, "result", size))
                yield from _pour(talk, coming, patience, told)
            except Broken as why:
                yield from patience.broken(why, coming.job)
    coming.file.flush()


def _pour(talk: Talk, coming: Coming, patience: Patience, told: Any) -> Steps[None]:
    """What one connection brings."""
    while piece := (yield More()):
        patience.reset()
        talk.traffic.down += len(piece)
        coming.add(piece)
        told(len(piece))
        if coming.file.tell() > (coming.size or 0):
            break
    yield Shut()
    if not coming.is_there:
        raise Broken("the result ended early")


def opened_file(file: BinaryIO) -> tuple[Manifest, dict[str, Any]]:
    with (
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole,
        memoryview(whole) as view,
    ):
        return opened(view)


def check(info: ResultInfo, size: int, sha256: str) -> None:
    if (size, sha256) != (info.bytes, info.sha256):
        raise ResultChangedError(
            f"what arrived ({size} bytes, SHA-256 {sha256[:12]}...) is not what the server said it "
            f"would send ({info.bytes} bytes, {info.sha256[:12]}...)",
            fix="fetch it again; if it stays so, tell who runs the server",
        )
