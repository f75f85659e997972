"""What a job brings back, as one file: a file of tensors (`wire.frames`) with a manifest.

The manifest says what was saved under which name; `Ref(3)` in it is the tensor `"3"`. A part of a
result, some of its names, is a result file too; `select` makes one and reads no other tensors.

    data = encode_result(Manifest(saved=(("h", Ref(0)),)), {"0": frame})
    manifest, frames = decode_result(data)             # raises MessageError
    part = select(lambda start, end: data[start:end], ["h"])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import BinaryIO

from msgspec.structs import replace

from weft.errors import MessageError, NoSuchError
from weft.graph.frame import Frame
from weft.graph.node import refs

from . import frames as files
from .messages import Manifest, decode, encode

FORMAT = "weft-result"
MAX_HEADER = 100_000_000
"""The manifest is part of it; the limit of the format itself."""

OpenRange = Callable[[int, int], bytes]
"""The bytes of a file from `start` up to `end`."""


def encode_result(manifest: Manifest, frames: Mapping[str, Frame]) -> bytes:
    """The bytes of a result file."""
    _check(manifest, frames.keys())
    return files.write(frames, _metadata(manifest))


def write_result(
    file: BinaryIO, manifest: Manifest, frames: Mapping[str, Frame]
) -> tuple[int, str]:
    """Writes a result file without building it in memory; returns its size and its SHA-256."""
    _check(manifest, frames.keys())
    return files.write_to(file, frames, _metadata(manifest))


def decode_result(data: bytes) -> tuple[Manifest, dict[str, Frame]]:
    """The manifest and the tensors that it speaks of: exactly these. Raises `MessageError`."""
    frames, metadata = files.read(data, MAX_HEADER)
    manifest = _manifest(metadata)
    _check(manifest, frames.keys())
    return manifest, frames


def select(open_range: OpenRange, names: Iterable[str]) -> bytes:
    """A result file with these saves only. Raises `NoSuchError` for a name that it has not."""
    begin, ranges = selection(open_range, names)
    return b"".join([begin, *(open_range(start, end) for start, end in ranges)])


def selection(open_range: OpenRange, names: Iterable[str]) -> tuple[bytes, list[tuple[int, int]]]:
    """The same as a beginning and the ranges of the whole file that follow it."""
    body = files.body_at(open_range(0, 8), MAX_HEADER)
    slots, metadata = files.parse(open_range(8, body))
    manifest = _only(_manifest(metadata), names)
    kept = [slot for slot in slots if slot.name in _tensors(manifest)]
    ranges = [(body + slot.start, body + slot.end) for slot in kept]
    return files.head(_moved(kept), _metadata(manifest)), ranges


def _moved(slots: list[files.Slot]) -> list[files.Slot]:
    """The same tensors without what lay between them."""
    end, moved = 0, []
    for slot in slots:
        start, end = end, end + slot.end - slot.start
        moved.append(replace(slot, start=start, end=end))
    return moved


def _only(manifest: Manifest, names: Iterable[str]) -> Manifest:
    wanted = set(names)
    kept = tuple((name, value) for name, value in manifest.saved if name in wanted)
    missing = sorted(wanted - {name for name, _ in kept})
    if missing:
        raise NoSuchError(f"the job saved nothing under the name {missing[0][:200]!r}")
    return replace(manifest, saved=kept)


def _metadata(manifest: Manifest) -> dict[str, str]:
    return {"format": FORMAT, "manifest": encode(manifest, "json").decode()}


def _manifest(metadata: Mapping[str, str]) -> Manifest:
    if metadata.get("format") != FORMAT or "manifest" not in metadata:
        raise MessageError(f"this is not a result: its format is not {FORMAT!r}")
    return decode(metadata["manifest"].encode(), Manifest, "json")


def _tensors(manifest: Manifest) -> set[str]:
    return {str(ref.node) for _, value in manifest.saved for ref in refs(value)}


def _check(manifest: Manifest, tensors: Iterable[str]) -> None:
    names = [name for name, _ in manifest.saved]
    if len(set(names)) != len(names):
        raise MessageError("this is not a result: a name is saved twice")
    if any(ref.out for _, value in manifest.saved for ref in refs(value)):
        raise MessageError("this is not a result: a tensor has one part only")
    odd = sorted(_tensors(manifest) ^ set(tensors))
    if odd:
        raise MessageError(f"tensor {odd[0][:80]!r} is not both in the result and in its manifest")
