"""Results as files: fetched piece by piece, resumed where it was interrupted, whole or not there.

    size = sync.run(server, fetch_to(talk, job, info, Path("h.safetensors"), ()))
    saved = read(Path("h.safetensors"))

What has come so far lies beside the file, as `h.safetensors.part`; the next call goes on there,
also one of another process. The file itself appears when all of it is there and has the SHA-256
that the server said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from weft.errors import NoSuchError, ResultChangedError
from weft.wire.messages import ResultInfo
from weft.wire.reports import escaped

from .core import Talk
from .effects import Steps
from .jobs import path_of
from .results import Coming, check, opened_file, to_disk

PIECE = 1 << 20


def fetch_to(
    talk: Talk, job: str, info: ResultInfo, path: Path, names: Sequence[str]
) -> Steps[int]:
    """Fetches a result, or some saves of it, into a file; its size in bytes."""
    unknown = [name for name in names if name not in info.names]
    if unknown:
        raise NoSuchError(
            f"the job saved nothing under the name {unknown[0]!r}",
            fix=f"it saved: {', '.join(map(escaped, info.names)) or 'nothing'}",
        )
    part = path.with_name(f"{path.name}.part")
    if names:
        size = yield from _some(talk, job, part, names)
    else:
        size = yield from _whole(talk, job, info, part)
    part.replace(path)
    return size


def read(path: Path) -> dict[str, Any]:
    """What a file of a result holds, by name. Raises `MessageError` for one that is none."""
    with path.open("rb") as file:
        return opened_file(file)[1]


def _whole(talk: Talk, job: str, info: ResultInfo, part: Path) -> Steps[int]:
    with part.open("ab+") as file:
        coming = Coming(job, path_of(job, "/result"), file, info.bytes, f'"{info.sha256}"')
        _take_up(coming, info.bytes)
        try:
            yield from to_disk(talk, coming)
            check(info, file.tell(), coming.sha.hexdigest())
        except ResultChangedError:
            part.unlink()  # what lay there was of another result
            raise
        return file.tell()


def _take_up(coming: Coming, size: int) -> None:
    """Goes on behind what is there already, if that can be its beginning."""
    coming.file.seek(0)
    while piece := coming.file.read(PIECE):
        coming.sha.update(piece)
    if coming.file.tell() > size:
        _begin_anew(coming.file)
        coming.sha = hashlib.sha256()


def _begin_anew(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate()


def _some(talk: Talk, job: str, part: Path, names: Sequence[str]) -> Steps[int]:
    """Some saves: a file that the server makes, of which nothing is known before it comes."""
    asked = "&".join(f"name={quote(name, safe='')}" for name in names)
    with part.open("wb+") as file:
        yield from to_disk(talk, Coming(job, path_of(job, f"/result?{asked}"), file))
        return file.tell()
